"""Tasks of fusion models whose steps are counted for the log."""
from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor

from open_clip_elip.fusion.bert import Tokens
from open_clip_elip.profile.flops import count, on_meta

from .base import Batch, Cost
from .momentum import DistilledTask


class CountedTask(DistilledTask):
    """A task whose `cost` is fitted to counts of a few steps of two pairs; of later batches nothing is counted."""

    TERMS = 5  # of `_terms`, that batches differ in
    lengths = 4, 8, 16  # that are counted
    coefficients: Tensor | None = None

    def cost(self, batch: Batch) -> Cost:
        """Operations are linear in tokens, masked words and images, and attention makes them quadratic in the longest
        text's length: exact for ALBEF and BLIP, but for the similarities within the batch.

        A METER leaves keys and values of an image out where few words ask (`CoAttention`), so that the quadratic
        changes at some length. Measured at 6 to 50 tokens, the fit is off the count by at most 0.3 % for METER-B-32,
        0.4 % for METER-B-32-ELIP, 0.1 % for METER-B-16-ELIP, and exact for METER-B-16.
        """
        if self.coefficients is None:
            shapes, lengths, fewer = self.on_meta(), self.lengths, 1
            if self.model.text_reduction is not None:
                lengths, fewer = (11, 21, 31), 10  # tokens beside the first of which a share in tenths is whole
            short, sizes = lengths[0], [(length, 2 * length, 1, 0) for length in lengths]
            sizes += [(short, 2 * short - fewer, 1, 0), (short, 2 * short, 2, 0), (short, 2 * short, 1, 1)]
            sizes = sizes[: self.TERMS]
            counts = torch.tensor([shapes.count_two(*one) / 2 for one in sizes], dtype=torch.double)
            rows = torch.stack([self._terms(length, *(n / 2 for n in others)) for length, *others in sizes])
            self.coefficients = torch.linalg.solve(rows, counts)
        pairs, length = batch["text"].shape
        places, false = batch["tokens"].places, len(batch["image"]) / pairs - 1
        tokens = length if places is None else len(places) / pairs
        terms = self._terms(length, tokens, len(batch["chosen"]) / pairs if "chosen" in batch else 0, false)
        return Cost((self.coefficients @ terms).item(), self.model.tower.num_patches() * (1 + false) + tokens)

    def _terms(self, length: float, tokens: float, chosen: float, false: float) -> Tensor:
        """That a pair's operations are a sum of. false: images beside its own."""
        return torch.tensor([1, length, length**2, tokens, chosen, false][: self.TERMS], dtype=torch.double)

    def on_meta(self) -> CountedTask:
        """With shapes only, for `count_two`."""
        shapes = copy.copy(self)
        shapes.model = on_meta(self.model)
        shapes.model.tower.compiles = False
        return shapes

    def count_two(self, length: int, tokens: int, chosen: int, false: int) -> int:
        """Operations of a step on two pairs: so many columns, tokens, masked words and images beside the two."""
        meta = partial(torch.zeros, dtype=torch.long, device="meta")
        mask = (torch.arange(2 * length) < tokens).view(2, length)
        batch = {
            "image": torch.empty(2 + false, 3, *self.model.visual.image_size, device="meta"), "text": meta(2, length),
            "tokens": Tokens.of(mask) if self.model.tower.shortcuts else Tokens(mask),
            "masked": meta(2, length), "chosen": torch.arange(chosen), "labels": meta(chosen),
            **{name: meta(2) for name in ("numbers", "seen", "matches")},
        }  # fmt: skip
        return count(self.model, lambda: self.loss_of(batch)).total

    def loss_of(self, batch: Batch) -> Tensor:
        """Of a batch of shapes."""
        return self.losses(self.model, batch, None)["loss"]
