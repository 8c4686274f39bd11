"""Captions for pictures, by a BLIP model that was fine-tuned for them, or pre-trained.

    python -m training.caption --pretrained model_base_caption_capfilt_large.pth --model BLIP-B-16 \
        --force-image-size 384 --image a.jpg b.png
    python -m training.caption --pretrained logs/captions/checkpoints/best.pt --image pictures --out captions.json
    torchrun --nproc_per_node 4 -m training.caption -- --pretrained best.pt --image coco=data/coco --score

`--image` is a picture, a folder of pictures, shards, or images with captions as training.retrieval takes them.
"""
from __future__ import annotations

from functools import partial

from .command import run_command
from .launch import end
from .options.caption import CaptionCommandOptions

main = partial(run_command, CaptionCommandOptions, about=__doc__)  # of an argv; returns the exit code

if __name__ == "__main__":
    end(main())
