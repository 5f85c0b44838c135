#!/usr/bin/env bash
# Makes an environment of the original LLaVA (v1.2.2): the package llava-torch and the versions it was run with. Its
# torch is the main environment's where both have the same Python (links, no copy), and its own otherwise.
#
#   bash scripts/compat_env.sh FOLDER MAIN_VENV
#
# PYTHON chooses the interpreter (default: the main environment's if the old versions run on it, else python3.11, 3.10).
set -euo pipefail

venv=${1:?usage: compat_env.sh FOLDER MAIN_VENV} main=${2:?usage: compat_env.sh FOLDER MAIN_VENV}
pins=(
  transformers==4.37.2 tokenizers==0.15.1 accelerate==0.28.0 deepspeed==0.19.8 peft==0.10.0
  'numpy<2' 'pillow<12' 'protobuf<5' sentencepiece einops requests
)
# Without its own requirements: they pin torch 2.1.2 and bring a web server along.
llava=llava-torch==1.2.2.post1
stamp=$venv/.installed
wanted="${pins[*]} $llava"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  exit 0
fi

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
python=""
for candidate in ${PYTHON:-"$main/bin/python" python3.11 python3.10 python3.12 python3}; do
  case "$(version_of "$candidate")" in 3.10 | 3.11 | 3.12) ;; *) continue ;; esac
  "$candidate" -c 'import ensurepip, venv' 2>/dev/null || continue
  python=$candidate
  break
done
if [ -z "$python" ]; then
  echo "make: transformers 4.37.2 needs Python 3.10, 3.11 or 3.12 and none is here: name one with PYTHON=/path/to/python3.11" >&2
  exit 1
fi

echo "making $venv with $llava and ${pins[0]} ..."
"$python" -m venv --clear "$venv"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
torch=()
if [ "$(version_of "$python")" = "$(version_of "$main/bin/python")" ]; then
  # torch and what only torch needs, by links in a folder of their own: the main environment's numpy, transformers
  # and all the rest stay out of sight.
  from=$("$main/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  mkdir "$venv/shared"
  for entry in "$from"/torch "$from"/torch-*.dist-info "$from"/{torchgen,functorch,nvidia,triton,cuda}* ; do
    [ ! -e "$entry" ] || ln -sfn "$entry" "$venv/shared/"
  done
  (cd "$venv/shared" && pwd) >"$site/shared_torch.pth"
else
  torch=(torch)
fi
install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
install "${pins[@]}" ${torch[@]+"${torch[@]}"}
install --no-deps "$llava"
HF_HUB_OFFLINE=1 "$venv/bin/python" - <<'EOF'
import torch, transformers
import llava.mm_utils, llava.model.builder, llava.train.train
print("torch", torch.__version__, "transformers", transformers.__version__, "and llava.train.train are there")
EOF
printf '%s\n' "$wanted" >"$stamp"
