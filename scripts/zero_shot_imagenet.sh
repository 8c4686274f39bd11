#!/usr/bin/env bash
# Zero-shot classification of ImageNet with OpenAI's 80 prompts, as in the paper's Table 5:
#
#   bash scripts/zero_shot_imagenet.sh CHECKPOINT /path/to/imagenet [more data or flags]
#   bash scripts/zero_shot_imagenet.sh epoch_32.pt /data/imagenet imagenet-v2=/data/v2 imagenet-r=/data/imagenet-r
#   MODEL=ViT-B-16 bash scripts/zero_shot_imagenet.sh openai /data/imagenet
#
# A checkpoint of this trainer tells its model by itself; for other weights, or a tag of open_clip, say which with MODEL.
# Everything after the folder goes to training.zero_shot. NPROC and PYTHON as in scripts/launch.sh.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "zero_shot_imagenet: name the checkpoint and the folder of ImageNet:" \
        "bash scripts/zero_shot_imagenet.sh epoch_32.pt /data/imagenet" >&2
    exit 2
fi
checkpoint="$1" imagenet="$2"
shift 2
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" training.zero_shot ${MODEL:+--model "$MODEL"} \
    --pretrained "$checkpoint" --data "imagenet=$imagenet" "$@"
