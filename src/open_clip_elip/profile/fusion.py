"""A training step of a fusion model, for the counter and for the clock."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..fusion.albef import Albef
from ..fusion.base import FusionModel
from ..fusion.bert import Tokens
from ..fusion.blip import Blip
from ..fusion.meter import Meter
from ..fusion.momentum import Queue, follow, twin_of
from ..fusion.objectives import CHOSEN, places_to_write
from ..fusion.steps import albef_losses, blip_losses, meter_losses, stream_of, teach
from ..reduction.text import TextReduction
from .flops import Flops, count
from .measure import TrainStep

QUEUE, MOMENTUM, ALPHA = 65536, 0.995, 0.4  # of ALBEF's pre-training


class FusionStep(TrainStep):
    """As `TrainStep`, with momentum twin and queues; on texts (B, L), token ids on the CPU."""

    def __init__(self, model: Albef | Blip, image: Tensor, text: Tensor, precision: str = "fp32"):
        self.twin, width = twin_of(model), model.vision_proj.out_features
        queues = nn.ModuleDict({name: Queue(width, QUEUE) for name in ("image", "text")})
        self.queues = queues.to(image.device)
        self.resident = nn.ModuleList([model, self.twin, self.queues])
        super().__init__(model, image, text, precision)

    def set_batch(self, image: Tensor, text: Tensor) -> None:
        """Of the tokens, as many are chosen as masking chooses on average; all, where captions are written. A batch of
        shapes alone gets negatives, each text and each image once: they cannot be drawn."""
        mask, device, writes = self.model.mask(text), image.device, isinstance(self.model, Blip)
        chosen = places_to_write(mask) if writes else some_places(mask)
        tokens = self.model.tokens_in(text)
        negatives, labels = None, text.flatten()[chosen].to(device)
        if device.type == "meta":
            negatives = [torch.arange(len(text)).roll(1)] * 2
        else:
            tokens, chosen = on(device, tokens), chosen.to(device)
        super().set_batch(image, text.to(device))
        self.words = {"tokens": tokens} if writes else {"tokens": tokens, "masked": self.batch[1], "chosen": chosen}
        self.targets = {"chosen": chosen, "negatives": negatives, "alpha": ALPHA}
        self.targets |= {} if writes else {"labels": labels}

    def pictures(self) -> Tensor:
        """What the image tower makes of the images."""
        guidance = self.batch[0].new_empty(len(self.batch[0]), self.model.visual.output_dim)
        return self.model.image_states(self.batch[0], guidance, reduce=self.model.tower.reduces)

    def compile(self) -> None:
        self.model.tower.compiles = self.twin.tower.compiles = True

    def losses(self) -> dict[str, Tensor]:
        self.taught = teach(self.twin, *self.batch, **self.words)
        losses = blip_losses if isinstance(self.model, Blip) else albef_losses
        return losses(self.model, self.taught, self.queues, *self.batch, **self.words | self.targets)

    def __call__(self) -> None:
        follow(self.twin, self.model, MOMENTUM)
        super().__call__()
        self.queues["image"].put(self.taught.image)
        self.queues["text"].put(self.taught.text)

    def end(self) -> None:
        """Nothing is held in bounds: the temperature hardly moves."""


class MeterStep(TrainStep):
    """As `TrainStep`, on texts (B, L), token ids on the CPU. Half of the texts are to match with another image, which
    is drawn: so images of the batch come again."""

    def set_batch(self, image: Tensor, text: Tensor) -> None:
        """Of the tokens, as many are masked as masking chooses on average."""
        count, device, mask = len(text), image.device, self.model.mask(text)
        seen, half = torch.arange(count), count // 2
        seen[half:] += count - half
        super().set_batch(torch.cat([image, image[half:]]), text.to(device))
        tokens, chosen = self.model.tokens_in(text), some_places(mask)
        labels, matches = text.flatten()[chosen].to(device), (torch.arange(count) < half).long().to(device)
        if device.type != "meta":
            tokens, chosen = on(device, tokens), chosen.to(device)
        seen, self.seen = seen.to(device), torch.cat([torch.arange(count), seen]).to(device)
        self.more = {"masked": self.batch[1], "chosen": chosen, "labels": labels, "seen": seen, "matches": matches}
        self.more["tokens"] = tokens

    def pictures(self) -> Tensor:
        guidance = self.batch[0].new_empty(len(self.seen), self.model.width)
        guidance = None if chooses(self.model.text_reduction) else guidance
        return stream_of(self.model, self.batch[0], guidance, self.seen, reduce=self.model.tower.reduces)[0]

    def compile(self) -> None:
        self.model.tower.compiles = True

    def losses(self) -> dict[str, Tensor]:
        return meter_losses(self.model, *self.batch, **self.more)

    def end(self) -> None:
        """Nothing is held in bounds."""


def make_step(model: FusionModel, *args: Any) -> FusionStep | MeterStep:
    """Of any family; see the steps for what else is given."""
    return (MeterStep if isinstance(model, Meter) else FusionStep)(model, *args)


def some_places(mask: Tensor) -> Tensor:
    """(n,) places of masked tokens, counted through all rows of (B, L)."""
    places = places_to_write(mask)
    return places[torch.arange(0, len(places), 1 / CHOSEN).long()] + 1


def on(device: torch.device, tokens: Tokens) -> Tokens:
    mask, places, whole = tokens
    return Tokens(mask.to(device), None if places is None else places.to(device), whole)


def count_fusion(model: FusionModel, image: Tensor, text: Tensor) -> Flops:
    """As `flops.count_flops`; what is not the image tower's is counted as text, and other work without gradient than
    the scoring of images and texts as the twin's."""
    step, reduction = make_step(model, image, text), model.text_reduction
    pictures, whole = count(model, step.pictures), count(model, step.losses)
    scoring = whole.scoring
    if isinstance(step, FusionStep):
        model.text_reduction = None
        unscored = count(model, step.losses) if chooses(reduction) else whole
        model.text_reduction, scoring = reduction, whole.scoring - unscored.scoring + pictures.scoring
    return Flops(
        whole.forward, whole.backward, scoring, whole.forward - pictures.forward, whole.backward - pictures.backward,
        whole.scoring - scoring,
    )  # fmt: skip


def chooses(reduction: TextReduction | None) -> bool:
    """Whether images score the tokens of texts."""
    return reduction is not None and reduction.rule == "learned"


def words(lengths: Sequence[int], model: FusionModel | None = None) -> Tensor:
    """(B, L) token ids on the CPU of texts of these lengths, L the longest: a start, then others, then padding. For a
    METER that runs as released L is all that it takes."""
    columns, pad = max(lengths), 0 if model is None else model.pad
    if isinstance(model, Meter) and not model.tower.shortcuts:
        columns = model.context_length
    place = torch.arange(columns)
    return torch.where(place < torch.tensor(lengths)[:, None], 1 + pad + (place > 0).long(), pad)
