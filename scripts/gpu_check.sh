#!/usr/bin/env bash
# Does the method run on this machine's GPU, and how fast? Random weights and drawn images: nothing is downloaded.
#
#   bash scripts/gpu_check.sh [--require] [--rehearse] [--steps N] [--limit SECONDS]
#                             [--deepspeed JSON | --no-deepspeed] [RESULTS]
#
# Prints nvidia-smi and the doctor's list; takes a full-size step (ViT-L/14@224, 1.31 B denoiser, batch 16, bf16) of both
# stages beside the libraries' own and every candidate for a faster one, counts where the host waits for the GPU; times
# the step part by part, and under DeepSpeed ZeRO-2 where that is installed; runs a short `enhance tiny` on the GPU.
# Figures go to RESULTS (default: benchmarks/results), each part's as soon as it has them; a part that takes longer than
# --limit (default 240) is ended and the rest go on. Without a GPU: one line and status 0, or 1 with --require;
# --rehearse takes the same way at CPU size on any machine, figures into a temporary folder.
# PYTHON chooses the interpreter (default: .venv/bin/python, else python3); packages may be on PYTHONPATH.
set -u

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
require=0 rehearse=0 steps=20 limit=240 deepspeed="" use_deepspeed=1 results=""
usage() { sed -n '2,/^set/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; }
while [ $# -gt 0 ]; do
  case "$1" in
    --require) require=1 ;;
    --rehearse) rehearse=1 ;;
    --limit) limit=${2:?--limit needs seconds}; shift ;;
    --steps) steps=${2:?--steps needs a number}; shift ;;
    --deepspeed) deepspeed=${2:?--deepspeed needs a JSON}; shift ;;
    --no-deepspeed) use_deepspeed=0 ;;
    -h | --help) usage; exit 0 ;;
    -*) echo "gpu_check: unknown option $1; see --help" >&2; exit 2 ;;
    *) results=$1 ;;
  esac
  shift
done

if [ "$rehearse" -eq 0 ] && { ! command -v nvidia-smi >/dev/null 2>&1 || ! nvidia-smi; }; then
  echo "gpu_check: no GPU here, nothing was checked"
  exit "$require"
fi

python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  [ -x "$here/.venv/bin/python" ] && python=$here/.venv/bin/python
fi
benchmark=$here/benchmarks/enhance_step.py
[ -f "$benchmark" ] || { echo "gpu_check: $benchmark is missing; run this from a checkout" >&2; exit 2; }
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
if [ "$rehearse" -eq 1 ]; then
  name=rehearsal size=(--size tiny --device cpu) variants=(--size reduced --device cpu)
  results=${results:-$work/results}
else
  name=$("$python" -c 'import re, torch
assert torch.cuda.is_available(), "torch sees no GPU: built without CUDA, or too new for the driver"
print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))') ||
    { echo "gpu_check: nvidia-smi sees a GPU, $python cannot use it (above)" >&2; exit 1; }
  size=(--size full) variants=(--size full)
  results=${results:-$here/benchmarks/results}
fi
mkdir -p "$results" || exit 2
failed=0 report=""

# step NAME COMMAND...: run it, keep status and seconds, go on whatever happens.
step() {
  local label=$1 started=$SECONDS status=0
  shift
  echo && echo "== $label"
  timeout --kill-after=10 "$limit" "$@" || status=$?  # 124: it took too long
  [ "$status" -eq 0 ] || { failed=1; echo "== $label failed with status $status" >&2; }
  report="$report${report:+, }\"$label\": {\"status\": $status, \"seconds\": $((SECONDS - started))}"
}

# The doctor asks no hub either; it is to say what a run with downloads would need.
echo && echo "== doctor" && HF_HUB_OFFLINE=0 "$python" -m llava_genhancer doctor openai-l14-224 --output_dir "$work/doctor"

# The candidates first: they are what a short loan of a GPU is for.
step "variants" "$python" "$here/benchmarks/step_variants.py" "${variants[@]}" --rounds "$steps" --compile \
  --output "$results/$name-variants.json"
full=("$python" "$benchmark" "${size[@]}" --steps "$steps")
step "full size" "${full[@]}" --output "$results/$name-full.json"
step "enhance tiny" "$python" -m llava_genhancer enhance tiny --output_dir "$work/run" --precision bf16 \
  --stage1.max_steps 60 --stage1.save_steps 30 --stage1.sample_steps 30 \
  --stage2.max_steps 20 --stage2.save_steps 10 --stage2.sample_steps 10
if [ "$use_deepspeed" -eq 1 ]; then
  deepspeed=${deepspeed:-$here/configs/deepspeed/zero2.json}
  if [ ! -f "$deepspeed" ]; then
    echo "gpu_check: no $deepspeed, DeepSpeed was not tried"
  elif ! "$python" -c 'import deepspeed' 2>/dev/null; then
    echo "gpu_check: deepspeed is not installed or does not import, it was not tried"
  else
    step "full size, DeepSpeed" "${full[@]}" --deepspeed "$deepspeed" --output "$results/$name-full-deepspeed.json"
  fi
fi

printf '{"format": 1, "gpu": "%s", "steps": {%s}}\n' "$name" "$report" >"$results/$name-check.json"
echo && echo "gpu_check: figures in $results/$name-*.json"
exit "$failed"
