"""METER's tasks."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_targets(answers: Sequence[Mapping[str, float]], numbers: Mapping[str, int]) -> Tensor:
    """(B, answers): how right each of the vocabulary is, of the scores that people's answers have."""
    targets = torch.zeros(len(answers), len(numbers))
    for row, given in enumerate(answers):
        for answer, score in given.items():
            if answer in numbers:
                targets[row, numbers[answer]] = score
    return targets


def soft_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy with (B, answers), summed over answers, the mean of the batch."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(targets)
