"""Image-text retrieval with several captions an image, in both directions: COCO, Flickr30K and the like.

    python -m training.retrieval --model ViT-B-16-ELIP --pretrained epoch_32.pt --data coco=data/coco
    torchrun --nproc_per_node 4 -m training.retrieval -- --model ViT-B-16 --pretrained openai \
        --data coco=data/coco flickr30k=data/flickr30k --equal-captions-are-hits
    python -m training.retrieval --model ALBEF-B-16 --pretrained ALBEF.pth --data coco=data/coco --rerank 256

docs/retrieval.md says what `--data` may be and what is measured.
"""
from __future__ import annotations

from functools import partial

from .command import run_command
from .launch import end
from .options.retrieval import RetrievalOptions

main = partial(run_command, RetrievalOptions, about=__doc__)  # of an argv; returns the exit code

if __name__ == "__main__":
    end(main())
