#!/usr/bin/env bash
# Zero-shot classification of ImageNet with OpenAI's 80 prompts, as in the paper's Table 5:
#   bash scripts/zero_shot_imagenet.sh epoch_32.pt /data/imagenet [imagenet-v2=/data/v2 ... or flags of training.zero_shot]
# NPROC=4 runs on four GPUs, in the environment that has this package.
set -euo pipefail
checkpoint="${1:?name the checkpoint}" imagenet="${2:?name the folder of ImageNet}"
exec torchrun --standalone --nproc_per_node "${NPROC:-1}" -m training.zero_shot -- \
    --pretrained "$checkpoint" --data "imagenet=$imagenet" "${@:3}"
