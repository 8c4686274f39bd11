"""Zero-shot classification: the class whose prompts are nearest to the image wins.

    python -m training.zero_shot --model ViT-B-16-ELIP --pretrained epoch_32.pt --data imagenet=/data/imagenet
    torchrun --nproc_per_node 4 -m training.zero_shot --model ViT-B-16 --pretrained openai \\
        --data imagenet=/data/imagenet imagenet-v2=/data/imagenet-v2 imagenet-r=/data/imagenet-r cifar10=/data
"""
from __future__ import annotations

from functools import partial

from .command import run_command
from .launch import end
from .options.zero_shot import ZeroShotOptions

main = partial(run_command, ZeroShotOptions, about=__doc__)  # of an argv; returns the exit code

if __name__ == "__main__":
    end(main())
