"""A training step of a fusion model, for the counter and for the clock."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..fusion.albef import Albef
from ..fusion.bert import Tokens
from ..fusion.blip import Blip
from ..fusion.momentum import Queue, follow, twin_of
from ..fusion.objectives import CHOSEN, places_to_write
from ..fusion.steps import albef_losses, blip_losses, teach
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
        chosen = places_to_write(mask)
        if not writes:
            chosen = chosen[torch.arange(0, len(chosen), 1 / CHOSEN).long()] + 1
        tokens = self.model.tokens_in(text)
        negatives, labels = None, text.flatten()[chosen].to(device)
        if device.type == "meta":
            negatives = [torch.arange(len(text)).roll(1)] * 2
        else:
            tokens, chosen = Tokens(*(None if one is None else one.to(device) for one in tokens)), chosen.to(device)
        super().set_batch(image, text.to(device))
        self.words = {"tokens": tokens} if writes else {"tokens": tokens, "masked": self.batch[1], "chosen": chosen}
        self.targets = {"chosen": chosen, "negatives": negatives, "alpha": ALPHA}
        self.targets |= {} if writes else {"labels": labels}

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


def count_fusion(model: Albef | Blip, image: Tensor, text: Tensor) -> Flops:
    """As `flops.count_flops`; what is not the image tower's is counted as text, and other work without gradient than
    its scoring pass as the twin's."""
    step = FusionStep(model, image, text)
    guidance = image.new_empty(len(image), model.visual.output_dim)
    pictures = count(model, lambda: model.image_states(image, guidance, reduce=model.tower.reduces))
    whole = count(model, step.losses)
    return Flops(
        whole.forward, whole.backward, pictures.scoring, whole.forward - pictures.forward,
        whole.backward - pictures.backward, whole.scoring - pictures.scoring,
    )  # fmt: skip


def words(lengths: Sequence[int]) -> Tensor:
    """(B, L) token ids on the CPU of texts of these lengths, L the longest: 1, then 2, then padding."""
    place = torch.arange(max(lengths))
    return (place < torch.tensor(lengths)[:, None]) * (1 + (place > 0))
