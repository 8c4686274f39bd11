"""Reasoning over two images (NLVR2), and the task between: to which of two images a text belongs."""
from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip_elip.fusion.objectives import draw, negative_weights
from open_clip_elip.fusion.tokenizer import albef_caption, blip_caption

from ..data.lists import Item, read_pair, text_of
from ..data.samples import Sample
from ..errors import UserError
from . import entailment
from .base import Batch, Progress
from .downstream import Prepared, Setting
from .fused import FusedEncoding
from .momentum import DistilledTask

_SIDES = re.compile("left|right")
SIMILAR = 0.07  # temperature at which a similar image is drawn


def read_item(item: Item) -> tuple[Sequence[str], dict[str, Any]] | str:
    """{"images": [first, second], "sentence", "label": "True" or "False"}."""
    images, sentence, label = item.get("images"), text_of(item, "sentence"), str(item.get("label"))
    if not isinstance(images, list) or len(images) != 2 or not all(isinstance(one, str) for one in images):
        return 'its "images" are not a list of two paths'
    if sentence is None:
        return 'it has no "sentence"'
    if label not in ("True", "False"):
        return f'its "label" is {label}, not True or False'
    return images, {"text": sentence, "label": int(label == "True")}


def prepare(setting: Setting) -> Prepared:
    if setting.built.identity.family != "blip":
        return entailment.prepare(setting, read_item, ramp=1)
    return entailment.prepare(setting, read_item, clean=partial(blip_caption, words=40), change=Swapping)


@dataclass
class Swapping:
    """Half of the time the pictures change places, and left and right with them, as BLIP is trained."""

    encoding: FusedEncoding

    def encode(self, sample: Sample) -> Any:
        if random.random() < 0.5:
            text = _SIDES.sub(lambda side: {"left": "right", "right": "left"}[side[0]], sample.fields["text"].lower())
            sample = sample._replace(images=sample.images[::-1], fields=sample.fields | {"text": text})
        return self.encoding.encode(sample)

    def collate(self, encoded: list[Any]) -> dict[str, Any]:
        return self.encoding.collate(encoded)


class TextAssignmentTask(DistilledTask):
    """Cross-entropy of a `fusion.albef.AlbefAssigner` (ALBEF, Sec. 4.5). There is no twin."""

    def __init__(self, model: nn.Module):
        super().__init__(model, alpha=0)

    def losses(self, model: nn.Module, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        labels = torch.randint(3, (len(batch["text"]),), device=batch["text"].device)
        logits = model(batch["image"], batch["text"], lambda features: choose(features, labels))
        return {"loss": F.cross_entropy(logits, labels)}


def choose(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second image (B,) of each text.

    Its own comes first (label 0) or second (1), a similar one in the other place; or two similar ones, if the batch
    has as many, which differ (2).

    Args:
        features: (B, D) of the images, unit length.
        labels: (B,).
    """
    own = torch.arange(len(features), device=features.device)
    weights = negative_weights(features @ features.t() / SIMILAR, own[:, None] == own)
    similar = draw(weights)
    other = draw(weights.scatter(1, similar.clamp_min(0)[:, None], 0))
    other = other.where(other >= 0, similar)
    return own.where(labels == 0, similar), own.where(labels == 1, similar.where(labels == 0, other))


def prepare_assignment(setting: Setting) -> Prepared:
    """On the data of pre-training, as they are read there."""
    if setting.options.batch_size == 1:
        raise UserError("A batch of one picture has no similar one: raise --batch-size.")
    text = setting.words(albef_caption, setting.built.tokenizer.context_length)
    encoding = FusedEncoding(setting.transform(True, scale=(0.2, 1.0)), text, "caption")
    return Prepared(TextAssignmentTask(setting.built.model), setting.train_data(read_pair, encoding))
