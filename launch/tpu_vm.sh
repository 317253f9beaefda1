#!/usr/bin/env bash
# A TPU VM slice: create it, install, run on every worker, delete it. Edit the block below.
#
#   launch/tpu_vm.sh [--dry-run] create|install|run|stop|delete
#   launch/tpu_vm.sh [--dry-run] queue      a queued resource instead of create (add SPOT=1)
#
# --dry-run prints the exact commands and runs nothing.
set -euo pipefail

NAME=${NAME:-hyperlora}
PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-central2-b}
TYPE=${TYPE:-v5p-128}
VERSION=${VERSION:-v2-alpha-tpuv5}
NODES=${NODES:-1} # slices, for queue
SPOT=${SPOT:-0}
PACKAGE=${PACKAGE:-"hyperlora-jax[tpu,gcs] @ git+https://github.com/OWNER/REPOSITORY"}
CONFIG=${CONFIG:-configs/avatars.py}
WORKDIR=${WORKDIR:-gs://my-bucket/runs/hyperlora}

dry_run=0
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi

call() {
  printf '%q ' "$@"
  echo
  if ((!dry_run)); then
    "$@"
  fi
}

tpu() { call gcloud compute tpus tpu-vm "$@" --project="$PROJECT" --zone="$ZONE"; }
# gcloud numbers the nodes of a queued resource NAME-0, NAME-1, …
nodes() {
  if ((NODES > 1)); then
    for ((node = 0; node < NODES; node++)); do echo "$NAME-$node"; done
  else
    echo "$NAME"
  fi
}
everywhere() {
  local node
  for node in $(nodes); do tpu ssh "$node" --worker=all --command="$1"; done
}

# Every worker restarts its own process on exit code 75 and on signals; see run_with_restarts.sh.
run_command="cd hyperlora && HYPERLORA_DISTRIBUTED=1 nohup ./run_with_restarts.sh \
hyperlora train --config $CONFIG --workdir $WORKDIR > run.log 2>&1 &"

case ${1:-} in
  create)
    extra=()
    if ((SPOT)); then extra+=(--spot); fi
    tpu create "$NAME" --accelerator-type="$TYPE" --version="$VERSION" "${extra[@]}"
    ;;
  queue)
    extra=(--node-id="$NAME")
    if ((NODES > 1)); then extra=(--node-count="$NODES" --node-prefix="$NAME"); fi
    if ((SPOT)); then extra+=(--spot); fi
    call gcloud compute tpus queued-resources create "$NAME" --accelerator-type="$TYPE" \
      --runtime-version="$VERSION" --project="$PROJECT" --zone="$ZONE" "${extra[@]}"
    ;;
  install)
    for node in $(nodes); do
      tpu ssh "$node" --worker=all --command="mkdir -p hyperlora"
      tpu scp --recurse configs launch/run_with_restarts.sh "$node:hyperlora/" --worker=all
    done
    everywhere "pip install '$PACKAGE'"
    ;;
  run) everywhere "$run_command" ;;
  stop) everywhere "pkill -TERM -f run_with_restarts.sh" ;;
  delete)
    if ((NODES > 1)); then
      call gcloud compute tpus queued-resources delete "$NAME" --force --quiet \
        --project="$PROJECT" --zone="$ZONE"
    else
      tpu delete "$NAME" --quiet
    fi
    ;;
  *)
    echo "usage: $0 [--dry-run] create|queue|install|run|stop|delete" >&2
    exit 2
    ;;
esac
