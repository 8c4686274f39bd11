#!/usr/bin/env bash
# Fine-tunes an image tower for classification, on one machine, in one process for each GPU (docs/finetune.md):
#
#   bash scripts/finetune.sh configs/finetune/slip_vit_b.yaml --model ViT-B-16-ELIP --pretrained epoch_32.pt \
#       --data imagenet=/data/imagenet --also imagenet-v2=/data/imagenet-v2 --name my-run --resume latest
#
# CONFIG, then flags of training.finetune. The global batch is the recipe's, whatever the number of processes. Variables:
# those of scripts/launch.sh.
set -euo pipefail

if [ $# -eq 0 ] || [ ! -f "$1" ]; then
    echo "finetune: name a config: bash scripts/finetune.sh configs/finetune/NAME.yaml [flags]" >&2
    exit 2
fi
config="$1"
shift
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" training.finetune --config "$config" "$@"
