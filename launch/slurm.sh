#!/usr/bin/env bash
# SLURM with GPUs, one task per GPU; JAX finds coordinator and ranks itself.
#
#   sbatch launch/slurm.sh hyperlora train --config configs/avatars.py --workdir /shared/run
#   launch/slurm.sh --dry-run hyperlora train …        prints the srun command
#
#SBATCH --job-name=hyperlora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -u
dry_run=0
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
if (($# == 0)); then
  echo "usage: sbatch $0 [--dry-run] COMMAND…" >&2
  exit 2
fi
# --kill-on-bad-exit: a dead task ends the step at once; the others would wait in a collective.
command=(srun --kill-on-bad-exit=1 "$@")
if ((dry_run)); then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
export HYPERLORA_DISTRIBUTED=1
"${command[@]}"
code=$?
if ((code == 75 || code >= 128)); then
  echo "slurm: exit code $code, requeueing $SLURM_JOB_ID" >&2
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
