#!/usr/bin/env bash
# gcloud as launch/tpu_vm.sh calls it, on folders: $CLOUD/NODE/state and $CLOUD/NODE/worker-0, -1.
# A VM is preempted, its processes killed, once $CLOUD/preempt-at steps are done in $CLOUD/steps.
set -euo pipefail
echo "$*" >>"$CLOUD/calls"
kind=$3 verb=$4 node=$5
options=("${@:6}")
option() {
  local item
  for item in "${options[@]}"; do [[ $item == "--$1="* ]] && echo "${item#*=}" && return; done
  return 1
}
preempt() {
  local file pid
  for file in "$CLOUD/$1"/worker-*/hyperlora/run.pid; do
    [[ -f $file ]] || continue
    pid=$(<"$file") # its parent writes run.code, its child is the run itself
    for pid in $(ps -o ppid= "$pid") "$pid" $(pgrep -P "$pid"); do kill -KILL "$pid" || true; done
  done
  rm -rf "$CLOUD/$1"/worker-* "$CLOUD/preempt-at"
  echo PREEMPTED >"$CLOUD/$1/state"
}
case "$kind $verb" in
  "tpu-vm create")
    mkdir "$CLOUD/$node" "$CLOUD/$node/worker-0" "$CLOUD/$node/worker-1"
    echo CREATING >"$CLOUD/$node/state"
    ;;
  "tpu-vm describe")
    [[ -d $CLOUD/$node ]] || exit 1
    cat "$CLOUD/$node/state"
    [[ $(<"$CLOUD/$node/state") != CREATING ]] || echo READY >"$CLOUD/$node/state"
    if [[ -f $CLOUD/preempt-at && $(grep -c . "$CLOUD/steps" || true) -ge $(<"$CLOUD/preempt-at") ]]; then
      preempt "$node"
    fi
    ;;
  "tpu-vm ssh")
    [[ $(<"$CLOUD/$node/state") == READY ]] || exit 255
    echo "SSH: Attempting to connect to 2 workers, running"
    where=$(option worker)
    for home in "$CLOUD/$node"/worker-${where/all/*}; do
      (cd "$home" && HOME=$home bash -c "$(option command)")
    done
    ;;
  "tpu-vm scp")
    [[ $5 == --recurse ]]
    files=()
    for item in "${options[@]}"; do
      case $item in
        --*) ;;
        *:*) node=${item%%:*} folder=${item#*:} ;;
        *) files+=("$item") ;;
      esac
    done
    for home in "$CLOUD/$node"/worker-*; do cp -r "${files[@]}" "$home/$folder"; done
    ;;
  "tpu-vm delete") rm -r "${CLOUD:?}/$node" ;;
  *) exit 1 ;;
esac
