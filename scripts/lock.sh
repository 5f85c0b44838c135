#!/usr/bin/env bash
# Writes constraints.txt: what pip resolves today for pyproject.toml's lower bounds, in an environment of its own.
#
#   bash scripts/lock.sh EXTRAS
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bash scripts/make_venv.sh "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[${1:?usage: lock.sh EXTRAS}]"
"$work/venv/bin/python" -m pip check
{
  echo "# The set of versions that the tests ran with: \`make install\` holds to it, \`make lock\` writes it anew."
  "$work/venv/bin/python" -m pip freeze --all --exclude-editable --exclude pip --exclude llava-genhancer | sort -f
} >"$work/constraints.txt"
if grep -n '@\|/' "$work/constraints.txt" | grep -v '^1:'; then
  echo "lock: the lines above name a file or a host, constraints.txt is left as it was" >&2
  exit 1
fi
cp "$work/constraints.txt" constraints.txt
echo "constraints.txt: $(grep -c == constraints.txt) packages"
