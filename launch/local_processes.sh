#!/usr/bin/env bash
# Several processes of one run on this machine: a rehearsal of a pod, with the real collectives.
#
#   launch/local_processes.sh [--dry-run] PROCESSES DEVICES COMMAND…
#   launch/local_processes.sh 2 4 hyperlora train --config configs/avatars.py --workdir runs/pod
#
# Each process simulates DEVICES CPU devices. All are started again together when one of them ends
# by exit code 75 or by a signal; any other code ends the run. SIGTERM to this script goes to all.
set -u
dry_run=0
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
if (($# < 3)); then
  echo "usage: $0 [--dry-run] PROCESSES DEVICES COMMAND…" >&2
  exit 2
fi
processes=$1
devices=$2
shift 2
max_restarts=${MAX_RESTARTS:-100}
pause=${RESTART_SECONDS:-1}
flags="--xla_force_host_platform_device_count=$devices"
flags+=" --xla_cpu_collective_call_terminate_timeout_seconds=300"

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

stop=0
children=()
trap 'stop=1; kill -TERM "${children[@]}" 2>/dev/null' TERM INT
for ((restart = 0; ; restart++)); do
  address="127.0.0.1:${COORDINATOR_PORT:-$(free_port)}"
  children=()
  for ((index = 0; index < processes; index++)); do
    settings=(
      "JAX_PLATFORMS=cpu" "XLA_FLAGS=$flags" "JAX_COORDINATOR_ADDRESS=$address"
      "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$index"
    )
    if ((dry_run)); then
      printf '%q ' env "${settings[@]}" "$@"
      echo
    else
      env "${settings[@]}" "$@" &
      children+=("$!")
    fi
  done
  ((dry_run)) && exit 0
  code=0
  for child in "${children[@]}"; do
    wait "$child"
    status=$?
    while kill -0 "$child" 2>/dev/null; do
      wait "$child"
      status=$?
    done
    # The gravest ending counts: a failure before a restart, a restart before success.
    if ((status != 0 && (code == 0 || (status != 75 && status < 128)))); then
      code=$status
    fi
  done
  if ((code != 75 && code < 128)) || ((stop)) || ((restart >= max_restarts)); then
    exit "$code"
  fi
  echo "local_processes: exit code $code, restart $((restart + 1)) of $max_restarts" >&2
  sleep "$pause"
done
