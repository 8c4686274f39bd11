"""Fewer text tokens: the first half of the layers sees all of them, the second half a share, chosen by a rule.

Guo et al., "ELIP", Sec. 4.4.1 and Table 7. Which layers these are is the models' business.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import check_number

RULES = ("random", "post", "learned")


@dataclass(frozen=True)
class TextReduction:
    """What stays of a text of n tokens: the one that is pooled (BERT's `[CLS]`, CLIP's end of text), which is not
    counted, and int(keep * (n - 1)) others, at least one. Padding is not counted either.

    rule: "random", drawn from torch's generator of the device; "post", the last ones go first; "learned", by scores.
    Out of range is a ValueError.
    """

    rule: str
    keep: float = 0.6

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"Unknown rule {self.rule!r} of text reduction; known are {', '.join(RULES)}.")
        check_number("keep", self.keep, 1e-6, 1, "a number in (0, 1]")

    def kept(self, tokens: int) -> int:
        """Of so many, the pooled one included in both."""
        others = tokens - 1
        return 1 + min(others, max(1, int(self.keep * others + 1e-9)))

    def choose(
        self, mask: Tensor, always: Tensor, scores: Tensor | None = None, *, most: int = 1,
        device: torch.device | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What stays of B texts of L columns.

        Args:
            mask: (B, L) which columns are tokens.
            always: (B, L) those that stay in any case, the pooled one at least; where they are more than the rule
                keeps, no other stays. most: of them in one text.
            scores: (B, L), the highest stay; for the rule "learned" alone.
            device: of the choice, which may be "meta" while the masks are not; None: theirs.

        Returns:
            (B, K) columns: those that stay always, in their order, then the best; K is what the longest text needs.
            And (B, K), which of them count.
        """
        columns, device = mask.shape[1], device or mask.device
        if self.rule == "post":
            scores = -torch.arange(columns, device=device, dtype=torch.float).expand(mask.shape)
        elif self.rule == "random":
            scores = torch.rand(mask.shape, device=device)
        order = scores.masked_fill(~mask.to(device), -math.inf).masked_fill(always.to(device), math.inf)
        width = max(most, self.kept(columns))
        table = torch.tensor([self.kept(n) for n in range(columns + 1)], device=mask.device)
        counts = table[mask.sum(dim=1)].maximum(always.sum(dim=1))
        best = order.argsort(dim=1, descending=True, stable=True)[:, :width]
        return best, torch.arange(width, device=mask.device) < counts[:, None]
