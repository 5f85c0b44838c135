#!/usr/bin/env bash
# The chain on several machines of a Slurm cluster, one command:
#
#   sbatch --nodes 2 --gpus-per-node 8 scripts/slurm_enhance_then_llava.sh vicuna-7b --data PATH [...]
#
# It takes what enhance_then_llava.sh takes. The job's machines become DeepSpeed's hostfile; DeepSpeed starts its
# processes there through ssh, so the nodes must let each other in without a password. Submit it again to go on.
#SBATCH --job-name=enhance-then-llava
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=B:TERM@300
set -euo pipefail

[ -n "${SLURM_JOB_NODELIST:-}" ] || {
  echo "slurm_enhance_then_llava: not inside a Slurm job; start it with sbatch" >&2
  exit 2
}
# Slurm runs a copy of this file: the checkout is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:-.}"
hostfile=$(mktemp "${TMPDIR:-/tmp}/hostfile.XXXXXX")
trap 'rm -f "$hostfile"' EXIT
slots=${SLURM_GPUS_ON_NODE:-$(nvidia-smi --list-gpus | wc -l)}
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$slots/" >"$hostfile"

# Five minutes before the time is up, trainings are told to save and end; the second wait is for that.
bash scripts/enhance_then_llava.sh "$@" --hostfile "$hostfile" &
chain=$!
trap 'kill -TERM "$chain"' TERM
status=0
wait "$chain" || status=$?
[ "$status" -lt 128 ] || { status=0; wait "$chain" || status=$?; }
exit "$status"
