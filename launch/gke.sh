#!/usr/bin/env bash
# A run on GKE as a JobSet (launch/gke/jobset.yaml); the cluster has JobSet and a node pool of TYPE.
#
#   export TYPE=v5p-128 IMAGE=us-docker.pkg.dev/PROJECT/REPOSITORY/hyperlora:1
#   launch/gke.sh image
#   launch/gke.sh run hyperlora train --config configs/avatars.py --workdir gs://BUCKET/run
#
#   image           builds launch/Dockerfile with the extras EXTRAS and pushes it as IMAGE
#   run COMMAND…    on every host of SLICES slices of TYPE
#   status          of the JobSet and its pods
#   logs [-f]       of the first host of the first slice
#   wait            until the JobSet has ended; exit code 0 if it completed
#   delete          SIGTERM to all pods, which save, and the end of the JobSet
#
# `launch/gke.sh --dry-run …` prints the exact calls and the JobSet and makes none. Set by the
# environment: NAME (hyperlora), TYPE (v5litepod-16), SLICES (1), IMAGE, EXTRAS.
set -euo pipefail

NAME=${NAME:-hyperlora}
TYPE=${TYPE:-v5litepod-16}
SLICES=${SLICES:-1}
EXTRAS=${EXTRAS:-tpu,gcs,avatars,tensorboard}
tree=$(cd "$(dirname "$0")/.." && pwd)

dry_run=0
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi

call() {
  printf '%q ' "$@"
  echo
  ((dry_run)) || "$@"
}

image() {
  if [[ -z ${IMAGE:-} ]]; then
    echo "gke: IMAGE is not set, such as us-docker.pkg.dev/PROJECT/REPOSITORY/hyperlora:1" >&2
    exit 2
  fi
  echo "$IMAGE"
}

case ${1:-} in
  image)
    name=$(image)
    call docker build -f "$tree/launch/Dockerfile" --build-arg "EXTRAS=$EXTRAS" -t "$name" "$tree"
    call docker push "$name"
    ;;
  run)
    if (($# < 2)); then
      echo "gke: run: expected a command, such as hyperlora train …" >&2
      exit 2
    fi
    name=$(image)
    jobset=$(python3 "$tree/launch/gke/fill_jobset.py" "$NAME" "$TYPE" "$SLICES" "$name" "${@:2}")
    if ((dry_run)); then
      echo "$jobset"
    else
      kubectl apply -f - <<<"$jobset"
    fi
    ;;
  status)
    call kubectl get jobset "$NAME"
    call kubectl get pods -l "jobset.sigs.k8s.io/jobset-name=$NAME" -o wide
    ;;
  logs)
    call kubectl logs "${@:2}" --tail=100 \
      -l "jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    ;;
  wait)
    call kubectl wait "jobset/$NAME" --timeout=-1s '--for=jsonpath={.status.terminalState}'
    if ((!dry_run)); then
      [[ $(kubectl get jobset "$NAME" -o 'jsonpath={.status.terminalState}') == Completed ]]
    fi
    ;;
  delete) call kubectl delete jobset "$NAME" ;;
  *)
    echo "usage: $0 [--dry-run] image|run COMMAND…|status|logs [-f]|wait|delete" >&2
    exit 2
    ;;
esac
