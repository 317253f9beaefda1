#!/usr/bin/env bash
# What a TPU VM's worker does in ~/hyperlora; tpu_vm.sh copies it there and calls it.
#
#   worker.sh install REQUIREMENT   Python 3.11 (the VM's own is older) and the package, in venv/
#   worker.sh run COMMAND…          in the background, started again as run_with_restarts.sh does
#   worker.sh status                one line: running, or the exit code, and the log's last line
#   worker.sh code                  code=NUMBER; code=running, or code=none without a run
#   worker.sh logs [-f]             the end of run.log; -f follows it
#   worker.sh stop                  SIGTERM: the run saves and ends
set -euo pipefail
cd "$(dirname "$0")"

# The process whose number run.pid holds is alive and still that script.
running() {
  [[ -f run.pid ]] && tr '\0' ' ' 2>/dev/null <"/proc/$(<run.pid)/cmdline" |
    grep -q run_with_restarts
}

code() {
  if running; then
    echo running
  elif [[ -f run.code ]]; then
    cat run.code
  else
    echo none
  fi
}

case ${1:-} in
  install)
    export PATH="$HOME/.local/bin:$PATH"
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv
    mkdir -p source
    tar -xzf source.tar.gz -C source
    [[ -d venv ]] || uv venv --quiet --python 3.11 venv
    uv pip install --quiet --python venv/bin/python --constraint constraints.txt \
      --reinstall-package hyperlora-jax "$2"
    ;;
  run)
    shift
    if running; then
      echo "worker: a run is under way (process $(<run.pid)); stop it first" >&2
      exit 2
    fi
    rm -f run.code
    export PATH="$PWD/venv/bin:$PATH" HYPERLORA_DISTRIBUTED=1
    # shellcheck disable=SC2016 # the inner shell expands these
    setsid nohup bash -c './run_with_restarts.sh "$@" & echo $! >run.pid; wait $!; echo $? >run.code' \
      run "$@" >>run.log 2>&1 </dev/null &
    ;;
  status) echo "$(hostname): $(code)  $(tail -n 1 run.log 2>/dev/null | tr '\r' '\n' | tail -n 1)" ;;
  code) echo "code=$(code)" ;;
  logs) tail -n 100 "${@:2}" run.log ;;
  stop) if running; then kill -TERM "$(<run.pid)"; fi ;;
  *)
    echo "usage: $0 install REQUIREMENT|run COMMAND…|status|code|logs [-f]|stop" >&2
    exit 2
    ;;
esac
