#!/usr/bin/env bash
# A TPU VM slice from this machine, by gcloud: create it, install, run, watch, delete it.
#
#   export TYPE=v5p-128 SPOT=1
#   launch/tpu_vm.sh keep hyperlora train --config configs/avatars.py --workdir gs://BUCKET/run
#
#   keep COMMAND…   all of it, until COMMAND ends: create, wait, install, run; a slice that was
#                   preempted is made, installed and started again. Ends with COMMAND's exit code
#   create, queue   the slice at once, or a queued resource (QUEUED=1, the default for NODES > 1)
#   wait            until every VM is ready
#   install         this source tree (or SOURCE) on every worker, with the extras EXTRAS
#   run COMMAND…    on every worker, in the background; see worker.sh
#   status          of the slice and of the run on every worker
#   logs [-f]       of worker 0 (WORKER=all, WORKER=3)
#   stop            SIGTERM to the run, which saves and ends
#   delete          the slice and its queued resource
#
# `launch/tpu_vm.sh --dry-run …` prints the exact calls and makes none. Set by the environment:
#   NAME     of the slice (hyperlora)        TYPE     v5litepod-16, v6e-32, v5p-128, v4-64 …
#   ZONE     by default one that has TYPE    VERSION  of the VM's software, by default TYPE's
#   PROJECT  by default gcloud's             NODES    slices (1)
#   SPOT=1   preemptible                     FILES    more files and folders to copy for install
#   SOURCE   git+https://… to install instead of this tree
set -euo pipefail

NAME=${NAME:-hyperlora}
TYPE=${TYPE:-v5litepod-16}
NODES=${NODES:-1}
QUEUED=${QUEUED:-$((NODES > 1))}
SPOT=${SPOT:-0}
EXTRAS=${EXTRAS:-tpu,gcs,avatars,tensorboard}
SOURCE=${SOURCE:-}
FILES=${FILES:-}
WORKER=${WORKER:-0}
POLL_SECONDS=${POLL_SECONDS:-60}
tree=$(cd "$(dirname "$0")/.." && pwd)

fail() {
  echo "tpu_vm: $1" >&2
  exit 2
}

# Zones and software versions by chip, of cloud.google.com/tpu/docs/regions-zones and …/runtimes.
TYPE=${TYPE/#v5e-/v5litepod-}
case $TYPE in
  v4-*) default=(us-central2-b tpu-ubuntu2204-base) ;;
  v5litepod-*) default=(us-central1-a v2-alpha-tpuv5-lite) ;;
  v5p-*) default=(us-east5-a v2-alpha-tpuv5) ;;
  v6e-*) default=(us-east5-b v2-alpha-tpuv6e) ;;
  tpu7x-*) fail "TYPE=$TYPE: Google gives TPU7x through GKE only; see launch/gke.sh" ;;
  *) fail "TYPE=$TYPE: expected v4-…, v5litepod-… (v5e-…), v5p-… or v6e-…" ;;
esac
ZONE=${ZONE:-${default[0]}}
VERSION=${VERSION:-${default[1]}}

dry_run=0
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi

place=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
ask() { gcloud compute tpus "$@" "${place[@]}" 2>/dev/null; }
# Says the call and makes it, or only says it.
call() {
  local words=(gcloud compute tpus "$@" "${place[@]}")
  if ((dry_run)); then
    printf '%q ' "${words[@]}" && echo
  else
    printf '%q ' "${words[@]}" >&2 && echo >&2
    "${words[@]}"
  fi
}

# gcloud numbers the nodes of a queued resource NAME-0, NAME-1, …
nodes() {
  if ((NODES > 1)); then
    for ((node = 0; node < NODES; node++)); do echo "$NAME-$node"; done
  else
    echo "$NAME"
  fi
}

# What a worker does, on all workers of all nodes or on WHERE.
workers() {
  local node where=$1 words
  shift
  printf -v words '%q ' bash hyperlora/worker.sh "$@"
  for node in $(nodes); do call tpu-vm ssh "$node" "--worker=$where" "--command=$words"; done
}

create() {
  local spot=()
  if ((SPOT)); then spot=(--spot); fi
  if ((QUEUED)); then
    local many=("--node-id=$NAME")
    if ((NODES > 1)); then many=("--node-count=$NODES" "--node-prefix=$NAME"); fi
    call queued-resources create "$NAME" "--accelerator-type=$TYPE" "--runtime-version=$VERSION" \
      "${many[@]}" "${spot[@]}"
  else
    call tpu-vm create "$NAME" "--accelerator-type=$TYPE" "--version=$VERSION" "${spot[@]}"
  fi
}

# READY, CREATING, PREEMPTED, …; of a queued resource that is not active its state; or MISSING.
state() {
  local node found=READY one
  if ((QUEUED)); then
    found=$(ask queued-resources describe "$NAME" '--format=value(state.state)') || found=MISSING
    if [[ $found != ACTIVE ]]; then
      echo "$found"
      return
    fi
  fi
  for node in $(nodes); do
    one=$(ask tpu-vm describe "$node" '--format=value(state)') || one=MISSING
    if [[ $one != READY ]]; then found=$one; fi
  done
  echo "${found/ACTIVE/READY}"
}

gone() { [[ $1 =~ ^(MISSING|PREEMPTED|TERMINATED|STOPPED|SUSPENDED|SUSPENDING|FAILED)$ ]]; }

await() {
  local now node
  if ((dry_run)); then
    if ((QUEUED)); then call queued-resources describe "$NAME" '--format=value(state.state)'; fi
    for node in $(nodes); do call tpu-vm describe "$node" '--format=value(state)'; done
    return
  fi
  while now=$(state) && [[ $now != READY ]]; do
    if gone "$now"; then
      echo "tpu_vm: $NAME is $now" >&2
      return 1
    fi
    echo "tpu_vm: $NAME is $now" >&2
    sleep "$POLL_SECONDS"
  done
}

install() {
  local node packed more requirement="./source[$EXTRAS]"
  packed=$(mktemp -d)
  if [[ -n $SOURCE ]]; then requirement="hyperlora-jax[$EXTRAS] @ $SOURCE"; fi
  read -ra more <<<"$FILES"
  tar -czf "$packed/source.tar.gz" -C "$tree" --exclude=__pycache__ \
    pyproject.toml setup.py README.md LICENSE constraints.txt configs hyperlora_jax
  for node in $(nodes); do
    call tpu-vm ssh "$node" --worker=all '--command=mkdir -p hyperlora/source'
    call tpu-vm scp --recurse "$packed/source.tar.gz" "$tree/constraints.txt" "$tree/configs" \
      "$tree/launch/run_with_restarts.sh" "$tree/launch/worker.sh" "${more[@]}" \
      "$node:hyperlora/" --worker=all
  done
  rm -r "$packed"
  workers all install "$requirement"
}

delete() {
  if ((QUEUED)) || { ((!dry_run)) && ask queued-resources describe "$NAME" >/dev/null; }; then
    call queued-resources delete "$NAME" --force --quiet
  else
    call tpu-vm delete "$NAME" --quiet
  fi
}

# What all workers have come to: the gravest exit code, "running" while one is not at its end,
# "none" where one has not begun, "unknown" where one does not answer.
outcome() {
  local node said='' one
  for node in $(nodes); do
    one=$(ask tpu-vm ssh "$node" --worker=all '--command=bash hyperlora/worker.sh code') ||
      one=code=unknown
    said+="$one"$'\n'
  done
  for one in unknown running none; do
    if [[ $said == *code=$one* ]]; then
      echo "$one"
      return
    fi
  done
  grep -oE '^code=[0-9]+' <<<"$said" | grep -oE '[0-9]+' | sort -n | tail -n 1
}

start() { create && await && install && workers all run "$@"; }

keep() {
  local now code
  if ((dry_run)); then
    start "$@"
    return
  fi
  while true; do
    now=$(state)
    code=none
    if gone "$now"; then
      echo "tpu_vm: $NAME is $now, making it" >&2
      if [[ $now != MISSING ]]; then delete || true; fi
      start "$@" || echo "tpu_vm: not started, again in $POLL_SECONDS s" >&2
    elif [[ $now == READY ]]; then
      code=$(outcome)
      if [[ $code == none ]]; then
        { install && workers all run "$@"; } || echo "tpu_vm: not started" >&2
      elif [[ $code =~ ^[0-9]+$ ]]; then
        echo "tpu_vm: the run on $NAME ended with exit code $code" >&2
        return "$code"
      fi
    fi
    sleep "$POLL_SECONDS"
  done
}

needs_command() { (($# > 1)) || fail "$1: expected a command, such as hyperlora train …"; }

case ${1:-} in
  create) create ;;
  queue) QUEUED=1 && create ;;
  wait) await ;;
  install) install ;;
  run) needs_command "$@" && workers all "$@" ;;
  keep) needs_command "$@" && keep "${@:2}" ;;
  status)
    if ((!dry_run)); then echo "$NAME: $(state)"; fi
    workers all status
    ;;
  logs) workers "$WORKER" "$@" ;;
  stop) workers all stop ;;
  delete) delete ;;
  *)
    echo "usage: $0 [--dry-run] keep COMMAND…|create|queue|wait|install|run COMMAND…|status|logs|stop|delete" >&2
    exit 2
    ;;
esac
