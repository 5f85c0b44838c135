#!/usr/bin/env bash
# From a CLIP and images to an enhanced CLIP, a LLaVA that sees with it, and a report. Run it again to go on.
#
#   bash scripts/enhance_then_llava.sh PRESET [--output_dir RUN] [--dry_run] [...]      (--help lists everything)
#
# PRESET  tiny                    a tiny CLIP and Llama in a rendered world: nothing to download, minutes on a CPU
#         vicuna-7b, vicuna-13b   CLIP ViT-L/14@336 and LLaVA-1.5, under DeepSpeed on all GPUs here
#
# PYTHON chooses the interpreter (default: .venv/bin/python, else python3).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  [ -x "$here/.venv/bin/python" ] && python=$here/.venv/bin/python
fi
"$python" -c 'import llava_genhancer' 2>/dev/null || {
  echo "enhance_then_llava: $python has no llava_genhancer: run make install, or name an interpreter with PYTHON=..." >&2
  exit 2
}
# One thread: the toy world's matrices are too small for more, and its figures then depend on no number of cores.
[ "${1:-}" != tiny ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m llava_genhancer.chain "$@"
