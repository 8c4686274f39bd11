#!/usr/bin/env bash
# Image-text retrieval with several captions an image, in both directions (docs/retrieval.md):
#
#   bash scripts/retrieval.sh CHECKPOINT coco=/data/coco flickr30k=/data/flickr30k
#   NPROC=4 MODEL=ViT-B-16 bash scripts/retrieval.sh openai coco=/data/coco --equal-captions-are-hits
#
# CHECKPOINT DATA..., then flags of training.retrieval. MODEL is needed for weights that are not a checkpoint of this
# trainer. NPROC and PYTHON as in scripts/launch.sh; any number of processes gives the same result.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "retrieval: name a checkpoint and data: bash scripts/retrieval.sh epoch_32.pt coco=/data/coco [flags]" >&2
    exit 2
fi
checkpoint="$1"
shift
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" training.retrieval ${MODEL:+--model "$MODEL"} \
    --pretrained "$checkpoint" --data "$@"
