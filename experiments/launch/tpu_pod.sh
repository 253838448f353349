#!/usr/bin/env bash
# Starts one run on all hosts of a Cloud TPU slice: a v5e-8 (one host), or a pod.
#
#   export TPU=name ZONE=us-west4-a            # PROJECT=... if it is not gcloud's default
#   experiments/launch/tpu_pod.sh setup        # copies this folder (a fresh clone) to all hosts
#   experiments/launch/tpu_pod.sh train CONFIG WORKDIR [--config.a.b=value ...]
#
# WORKDIR is in a bucket (gs://BUCKET/PATH), to which the service account of the TPU can write, or on a
# file system that all hosts share: every host writes its part of a checkpoint there. The same
# command continues a run.
# DRY_RUN=1 prints the commands instead of running them.
set -euo pipefail

usage() {
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

gcloud_tpu() {
  local command=(gcloud compute tpus tpu-vm "$@" --zone="$ZONE" --worker=all)
  if [[ -n "${PROJECT:-}" ]]; then command+=(--project="$PROJECT"); fi
  if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}"
  fi
}

[[ -n "${TPU:-}" && -n "${ZONE:-}" ]] || usage
case "${1:-}" in
  setup)
    gcloud_tpu scp --recurse . "$TPU:grpo_jax"
    gcloud_tpu ssh "$TPU" --command="cd grpo_jax && python3 -m venv .venv && \
.venv/bin/pip install --quiet --requirement requirements.txt --editable '.[tpu]'"
    ;;
  train)
    (($# >= 3)) || usage
    arguments=$(printf '%q ' --config "$2" --workdir "$3" "${@:4}")
    # The environment of these machines does not mention the other hosts: hence `auto`.
    gcloud_tpu ssh "$TPU" --command="cd grpo_jax && \
GRPO_JAX_CLUSTER=auto .venv/bin/python -u -m grpo_jax.train $arguments"
    ;;
  *) usage ;;
esac
