"""Linear probe: a linear classifier on the image features of a frozen model.

    python -m training.linear_probe --model ViT-B-16-ELIP --pretrained epoch_32.pt --data cifar10=/data/cifar10
    torchrun --nproc_per_node 4 -m training.linear_probe --model ViT-B-16 --pretrained openai \\
        --data imagenet=/data/imagenet --also imagenet-v2=/data/imagenetv2 imagenet-r=/data/imagenet-r
"""
from __future__ import annotations

from functools import partial

from .command import run_command
from .launch import end
from .options.linear_probe import ProbeOptions

main = partial(run_command, ProbeOptions, about=__doc__)  # of an argv; returns the exit code

if __name__ == "__main__":
    end(main())
