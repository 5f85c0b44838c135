#!/usr/bin/env bash
# Makes a virtual environment with Python 3.11 or newer, or says in one line what is missing.
#
#   bash scripts/make_venv.sh FOLDER
#
# PYTHON chooses the interpreter (default: the first of python3.13, 3.12, 3.11, python3, python that will do).
set -euo pipefail

venv=${1:?usage: make_venv.sh FOLDER}
found="" without_venv=""
# A name on PATH may be a version manager's stub that only fails, so each candidate is asked.
for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
  version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
  found="$found${found:+, }$candidate is $version"
  "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue
  # Debian's python3 comes without ensurepip until python3-venv is installed.
  if ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
    without_venv="$candidate cannot make environments: install its venv package (Debian: apt install python$version-venv)"
    continue
  fi
  if ! command -v "${CXX:-c++}" >/dev/null && ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then
    echo "make: no C++ compiler here: going on without DeepSpeed's compiled parts (ZeRO-Offload needs them, nothing else)" >&2
  fi
  # An interrupted installation goes on; an environment of another Python starts anew.
  if [ "$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" != "$version" ]; then
    if ! error=$("$candidate" -m venv --clear "$venv" 2>&1); then
      echo "make: $candidate -m venv $venv failed: $(tail -n 1 <<<"$error")" >&2
      exit 1
    fi
  fi
  exit 0
done
if [ -n "$without_venv" ]; then
  echo "make: $without_venv" >&2
else
  echo "make: Python 3.11 or newer is needed, found ${found:-none}: install one, or name it with make PYTHON=/path/to/python3.11" >&2
fi
exit 1
