#!/usr/bin/env bash
# Runs a command and starts it again when the machine, not the run, was the reason that it ended:
# exit code 75 (preempted after saving) and death by a signal. Never after 0, 1 or 2.
#
#   launch/run_with_restarts.sh hyperlora train --config configs/avatars.py --workdir gs://B/run
#
# MAX_RESTARTS (default 1000) and RESTART_SECONDS (default 5) can be set in the environment.
set -u
max_restarts=${MAX_RESTARTS:-1000}
pause=${RESTART_SECONDS:-5}
child=0
trap 'kill -TERM "$child" 2>/dev/null; stop=1' TERM INT
stop=0
restarts=0
while true; do
  "$@" &
  child=$!
  wait "$child"
  code=$?
  # A signal to this script ends `wait` early: wait again for the child's own code.
  while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
  done
  if ((code != 75 && code < 128)); then
    exit "$code"
  fi
  if ((stop)) || ((restarts >= max_restarts)); then
    exit "$code"
  fi
  restarts=$((restarts + 1))
  echo "run_with_restarts: exit code $code, restart $restarts of $max_restarts" >&2
  sleep "$pause"
done
