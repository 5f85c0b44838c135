#!/usr/bin/env bash
# From a CLIP and images to an enhanced CLIP and a report. Run it again to go on: what is finished is not done twice.
#
#   bash scripts/enhance_then_llava.sh PRESET [--output_dir RUN] [--data PATH] [--mmvp DIR] [any recipe field]
#
# PRESET  tiny                    a tiny CLIP in a rendered world: nothing to download, minutes on a CPU
#         vicuna-7b, vicuna-13b   CLIP ViT-L/14@336, LLaVA-1.5's own tower, under DeepSpeed on all GPUs here
# RUN     the run folder (default: runs/PRESET); the tower will be in RUN/tower, the report in RUN/report.md
# --data  images for the training: tar shards, a folder, a dataset, LLaVA's JSON (or DATA=...); tiny brings its own
# --mmvp  MMVP-VLM's folder, to measure original and enhanced tower (or MMVP=...); without it this step is left out
#
# PYTHON chooses the interpreter (default: .venv/bin/python, else python3), DEEPSPEED the JSON (default: ZeRO-2).
# The LLaVA trainings that the presets are named after are not part of this version: it ends with the report.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usage() { sed -n '2,/^set/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; }
fail() {
  echo "enhance_then_llava: $1" >&2
  exit 2
}

preset="" run="" data=${DATA:-} mmvp=${MMVP:-} fields=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --output_dir | --data | --mmvp)
      [ $# -gt 1 ] || fail "$1 needs a value"
      set -- "$1=$2" "${@:3}"
      continue ;;
    --output_dir=*) run=${1#*=} ;;
    --data=*) data=${1#*=} ;;
    --mmvp=*) mmvp=${1#*=} ;;
    *) if [ -z "$preset" ]; then preset=$1; else fields+=("$1"); fi ;;
  esac
  shift
done
case "$preset" in
  tiny | vicuna-7b | vicuna-13b) ;;
  "") fail "give a preset: tiny, vicuna-7b or vicuna-13b (--help says more)" ;;
  *) fail "no preset '$preset': there are tiny, vicuna-7b and vicuna-13b" ;;
esac
run=${run:-runs/$preset}

python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  [ -x "$here/.venv/bin/python" ] && python=$here/.venv/bin/python
fi
"$python" -c 'import llava_genhancer' 2>/dev/null ||
  fail "$python has no llava_genhancer: run make install, or name an interpreter with PYTHON=..."
# The interpreter's folder first: DeepSpeed looks for ninja on PATH.
PATH=$(dirname "$(command -v "$python")"):$PATH
export PATH

if [ "$preset" = tiny ]; then
  [ -z "$data" ] || fields+=(--data "$data")
  exec "$python" -m llava_genhancer demo --output_dir "$run" ${fields[@]+"${fields[@]}"}
fi

[ -n "$data" ] || fail "$preset needs images to train on: add --data PATH (tar shards, an image folder, a dataset or LLaVA's JSON)"
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
  fail "torch finds no GPU here and $preset needs one: use the preset tiny, or llava-genhancer doctor openai-l14-336"
zero=${DEEPSPEED:-$here/configs/deepspeed/zero2.json}

echo "== enhance ($run)"
"$python" -m deepspeed.launcher.runner --module llava_genhancer enhance openai-l14-336 \
  --data "$data" --output_dir "$run" --deepspeed "$zero" ${fields[@]+"${fields[@]}"}

measured=$run/eval/mmvp_vlm.json
if [ -z "$mmvp" ]; then
  echo "== MMVP-VLM left out: no --mmvp DIR"
elif [ "$measured" -nt "$run/tower/config.json" ]; then
  echo "== MMVP-VLM was measured before: $measured"
else
  echo "== MMVP-VLM"
  original=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["recipe"]["backbone"])' "$run/manifest.json")
  "$python" -m llava_genhancer mmvp-vlm "$original" "$run/tower" --data "$mmvp" --output "$measured"
fi

echo "== report"
"$python" -m llava_genhancer report "$run"
