#!/usr/bin/env bash
# Full fine-tuning with the paper's settings, on ImageNet (docs/finetune.md; other recipes: --config configs/finetune/NAME.yaml):
#   bash scripts/finetune.sh epoch_32.pt /data/imagenet --model ViT-B-16-ELIP [more flags of training.finetune]
# NPROC=4 runs on four GPUs, in the environment that has this package.
set -euo pipefail
checkpoint="${1:?name the checkpoint}" imagenet="${2:?name the folder of ImageNet}"
recipe="$(dirname "${BASH_SOURCE[0]}")/../configs/finetune/elip_paper.yaml"
exec torchrun --standalone --nproc_per_node "${NPROC:-1}" -m training.finetune -- \
    --config "$recipe" --pretrained "$checkpoint" --data "imagenet=$imagenet" "${@:3}"
