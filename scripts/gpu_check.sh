#!/usr/bin/env bash
# Does the method run on this machine's GPU, and how fast? Random weights and drawn images: nothing is downloaded.
#
#   bash scripts/gpu_check.sh [--require] [--steps N] [--deepspeed JSON | --no-deepspeed] [RESULTS]
#
# Prints nvidia-smi and the doctor's list, times a full-size step (ViT-L/14@224, 1.31 B denoiser, batch 16, bf16), alone,
# beside the libraries' own modules, cached, compiled and in other variants, and under DeepSpeed ZeRO-2 where that is
# installed, and runs a short `enhance tiny` on the GPU. Figures go to RESULTS
# (default: benchmarks/results). Without a GPU: one line and status 0, or 1 with --require.
# PYTHON chooses the interpreter (default: .venv/bin/python, else python3); packages may be on PYTHONPATH.
set -u

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
require=0 steps=20 deepspeed="" use_deepspeed=1 results=""
usage() { sed -n '2,/^set/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; }
while [ $# -gt 0 ]; do
  case "$1" in
    --require) require=1 ;;
    --steps) steps=${2:?--steps needs a number}; shift ;;
    --deepspeed) deepspeed=${2:?--deepspeed needs a JSON}; shift ;;
    --no-deepspeed) use_deepspeed=0 ;;
    -h | --help) usage; exit 0 ;;
    -*) echo "gpu_check: unknown option $1; see --help" >&2; exit 2 ;;
    *) results=$1 ;;
  esac
  shift
done

if ! command -v nvidia-smi >/dev/null 2>&1 || ! nvidia-smi; then
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
name=$("$python" -c 'import re, torch
assert torch.cuda.is_available(), "torch sees no GPU: built without CUDA, or too new for the driver"
print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))') ||
  { echo "gpu_check: nvidia-smi sees a GPU, $python cannot use it (above)" >&2; exit 1; }

results=${results:-$here/benchmarks/results}
mkdir -p "$results" || exit 2
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
failed=0 report=""

# step NAME COMMAND...: run it, keep status and seconds, go on whatever happens.
step() {
  local label=$1 started=$SECONDS status=0
  shift
  echo && echo "== $label"
  "$@" || status=$?
  [ "$status" -eq 0 ] || { failed=1; echo "== $label failed with status $status" >&2; }
  report="$report${report:+, }\"$label\": {\"status\": $status, \"seconds\": $((SECONDS - started))}"
}

# The doctor asks no hub either; it is to say what a run with downloads would need.
echo && echo "== doctor" && HF_HUB_OFFLINE=0 "$python" -m llava_genhancer doctor openai-l14-224 --output_dir "$work/doctor"

full=("$python" "$benchmark" --size full --steps "$steps")
step "full size" "${full[@]}" --output "$results/$name-full.json"
# In two calls: a second model beside ours, then the candidates for a faster step, need most of 80 GB each.
variants=("$python" "$here/benchmarks/step_variants.py" --size full --rounds "$steps")
step "beside the libraries" "${variants[@]}" --output "$results/$name-variants.json"
step "variants" "${variants[@]}" --no-libraries --compile --output "$results/$name-variants-compiled.json"
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
step "enhance tiny" "$python" -m llava_genhancer enhance tiny --output_dir "$work/run" --precision bf16 \
  --stage1.max_steps 60 --stage1.save_steps 30 --stage1.sample_steps 30 \
  --stage2.max_steps 20 --stage2.save_steps 10 --stage2.sample_steps 10

printf '{"format": 1, "gpu": "%s", "steps": {%s}}\n' "$name" "$report" >"$results/$name-check.json"
echo && echo "gpu_check: figures in $results/$name-*.json"
exit "$failed"
