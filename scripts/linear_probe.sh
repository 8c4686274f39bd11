#!/usr/bin/env bash
# Linear probes by CLIP's protocol (features before the projection, L-BFGS, a sweep), as in the paper (docs/linear_probe.md):
#   bash scripts/linear_probe.sh epoch_32.pt /data/imagenet [cifar10=/data/cifar ... or flags of training.linear_probe]
# NPROC=4 runs on four GPUs, in the environment that has this package.
set -euo pipefail
checkpoint="${1:?name the checkpoint}" imagenet="${2:?name the folder of ImageNet}"
exec torchrun --standalone --nproc_per_node "${NPROC:-1}" -m training.linear_probe -- \
    --pretrained "$checkpoint" --data "imagenet=$imagenet" "${@:3}"
