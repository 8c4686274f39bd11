"""Full fine-tuning of an image tower for classification, on the trainer of pre-training.

One process:      python -m training.finetune --model ViT-B-16-ELIP --pretrained epoch_32.pt --data cifar10=/data
Four GPUs:        torchrun --nproc_per_node 4 -m training.finetune --config configs/finetune/slip_vit_b.yaml \\
                      --model ViT-B-16-ELIP --pretrained epoch_32.pt --data imagenet=/data/imagenet \\
                      --also imagenet-v2=/data/imagenetv2 imagenet-r=/data/imagenet-r --name my-run --resume latest
Evaluation:       python -m training.finetune --evaluate --resume logs/my-run/checkpoints/epoch_100.pt \\
                      --data imagenet=/data/imagenet
"""
from __future__ import annotations

from functools import partial

from .command import run_command
from .launch import end
from .options.finetune import FinetuningOptions

main = partial(run_command, FinetuningOptions, about=__doc__)  # of an argv; returns the exit code

if __name__ == "__main__":
    end(main())
