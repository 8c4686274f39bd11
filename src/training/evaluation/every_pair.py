"""Retrieval by models that judge pairs alone: every image with every caption. Each tower runs once."""
from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..data.sets.captioned import CaptionedImages
from ..distributed import Ranks
from .passes import EncodeSettings, ImagePass, gather_rows
from .rerank import RECALLS, ranks_within, score_pairs

IMAGES = 256  # whose scores are ranked at a time


def evaluate_every_pair(
    data: CaptionedImages, model: nn.Module, tokenizer: Callable[[list[str]], Tensor], preprocess: Callable, *,
    ranks: Ranks, settings: EncodeSettings, equal_captions_are_hits: bool = False,
) -> tuple[dict[str, float], list[str]]:  # fmt: skip
    """`image_to_text_R@n` and `text_to_image_R@n`, `r_mean`, their mean, `num_images` and `num_captions`; and the names
    of the images that cannot be read, which are left out with their captions. A text that an image has twice counts
    once. Ties count against the model. Collective.

    model: in eval mode, with `text_states`, `to_match`, `read` and `match`, as METER's.
    """
    first: dict[tuple[int, str], int] = {}
    for number, (image, caption) in enumerate(zip(data.image_of.tolist(), data.captions, strict=True)):
        first.setdefault((image, caption), number)
    chosen = torch.tensor(list(first.values()))
    tokens = tokenizer([data.captions[number] for number in chosen.tolist()])
    order = (tokens != model.pad).sum(dim=1).argsort(stable=True)
    chosen, tokens, begin = chosen[order], tokens[order], time.monotonic()
    pictures = ImagePass(model.to_match, data.images, preprocess, ranks=ranks, settings=settings)

    def name(number: int) -> str:
        caption = data.captions[int(chosen[number % len(chosen)])]
        return f"the matching scores of {data.images.name(number // len(chosen))} and {caption!r}"

    numbers, scores = gather_rows(
        score_pairs(model, tokens, None, pictures, ranks=ranks, precision=settings.precision, name=name), ranks
    )
    skipped, seconds = pictures.all_skipped(), time.monotonic() - begin
    logging.info(f"{len(numbers):,} pairs compared, {len(numbers) / seconds:,.0f} a second.")
    images, scores = numbers.view(-1, len(chosen))[:, 0] // len(chosen), scores.view(-1, len(chosen))
    image_of = data.image_of[chosen]
    read = torch.isin(image_of, images)
    image_of, scores = image_of[read], scores[:, read]
    labels = data.same_text()[chosen][read] if equal_captions_are_hits else image_of
    right = _right(images, image_of, labels)
    metrics = {}
    for way, found, wanted in (("image_to_text", scores, right), ("text_to_image", scores.t(), right.t())):
        places = [ranks_within(*part) for part in zip(found.split(IMAGES), wanted.split(IMAGES), strict=True)]
        metrics |= {f"{way}_R@{n}": (torch.cat(places) < n).double().mean().item() for n in RECALLS}
    metrics["r_mean"] = sum(metrics.values()) / len(metrics)
    return metrics | {"num_images": len(images), "num_captions": len(image_of)}, skipped


def _right(images: Tensor, image_of: Tensor, labels: Tensor) -> Tensor:
    """(N, M): whether one of an image's captions has the label of a caption."""
    span = int(labels.max()) + 1
    owned = (image_of * span + labels).unique()
    return torch.cat([torch.isin(part[:, None] * span + labels, owned) for part in images.split(IMAGES)])
