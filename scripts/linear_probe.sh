#!/usr/bin/env bash
# Linear probes as in the paper, by CLIP's protocol (features before the projection, L-BFGS, a sweep of the
# regularisation), on ImageNet and on whatever else is named (docs/linear_probe.md):
#
#   bash scripts/linear_probe.sh CHECKPOINT /path/to/imagenet [more data or flags]
#   bash scripts/linear_probe.sh epoch_32.pt /data/imagenet cifar10=/data/cifar cifar100=/data/cifar \
#       --also imagenet-v2=/data/v2 imagenet-r=/data/imagenet-r
#   MODEL=ViT-B-16 bash scripts/linear_probe.sh openai /data/imagenet
#
# A checkpoint of this trainer tells its model by itself; for other weights, or a tag of open_clip, say which with MODEL.
# Everything after the folder goes to training.linear_probe. NPROC and PYTHON as in scripts/launch.sh.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "linear_probe: name the checkpoint and the folder of ImageNet:" \
        "bash scripts/linear_probe.sh epoch_32.pt /data/imagenet" >&2
    exit 2
fi
checkpoint="$1" imagenet="$2"
shift 2
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" training.linear_probe ${MODEL:+--model "$MODEL"} \
    --pretrained "$checkpoint" --data "imagenet=$imagenet" "$@"
