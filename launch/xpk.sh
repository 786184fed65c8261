#!/usr/bin/env bash
# Train or evaluate on TPU pods of a GKE cluster, one process a TPU host, through XPK (`uv tool install xpk`):
#
#   export CLUSTER=mine IMAGE=REGISTRY/switchyard STORAGE=runs
#   launch/xpk.sh olmoe v6e-256 train.py configs/olmoe_1b_7b.py
#   launch/xpk.sh olmoe-eval v6e-8 eval.py runs/olmoe_1b_7b
#
# `xpk cluster create` makes CLUSTER, launch/Dockerfile IMAGE. STORAGE is a file system that every host sees:
#
#   xpk storage attach runs --cluster=mine --type=gcpfilestore --mount-point=/switchyard/runs …
#
# SLICES is the number of slices (1); XPK_FLAGS go to XPK as they are, such as "--zone=us-east5-b --spot".
# A run that is asked to leave saves and stops, and starts again, as after losing a host.

set -euo pipefail

if (($# < 4)); then
  echo "usage: CLUSTER=… IMAGE=… STORAGE=… $0 NAME TPU_TYPE train.py|eval.py CONFIG|RUN [OPTIONS]" >&2
  exit 2
fi
name=$1 tpu_type=$2
shift 2
read -ra flags <<<"${XPK_FLAGS:-}"

exec xpk workload create \
  --workload="$name" \
  --cluster="$CLUSTER" \
  --tpu-type="$tpu_type" \
  --num-slices="${SLICES:-1}" \
  --docker-image="$IMAGE" \
  --storage="$STORAGE" \
  --max-restarts=100 \
  --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=300 \
  --command="exec python $(printf '%q ' "$@")" \
  "${flags[@]}"
