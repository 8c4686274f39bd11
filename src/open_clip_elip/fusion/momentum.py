"""What follows a model in training: its momentum twin, and queues of the twin's features."""
from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import FusionModel


def twin_of(model: FusionModel) -> nn.Module:
    """A copy that `follow` keeps behind the model; takes no gradient."""
    twin = copy.deepcopy(model).requires_grad_(False)
    for part in model.UNTAUGHT:
        if hasattr(twin, part):
            delattr(twin, part)
    return twin


@torch.no_grad()
def follow(twin: nn.Module, model: nn.Module, momentum: float) -> None:
    """Moves every parameter of the twin: m <- momentum m + (1 - momentum) p."""
    leaders = dict(model.named_parameters())
    names, followers = zip(*twin.named_parameters(), strict=True)
    torch._foreach_mul_(followers, momentum)
    torch._foreach_add_(followers, [leaders[name].detach() for name in names], alpha=1 - momentum)


class Queue(nn.Module):
    """The last `size` columns that were put in, random unit vectors at first. Its state is two buffers.

    Args:
        width, size: of the (width, size) `columns`.
        seed: of the random ones, which are the same in all processes.
    """

    def __init__(self, width: int, size: int, seed: int = 0):
        super().__init__()
        start = torch.randn(width, size, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("columns", F.normalize(start, dim=0))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    @property
    def size(self) -> int:
        return self.columns.shape[1]

    def places(self, n: int) -> Tensor:
        """(n,) the columns that the next `n` rows replace: the oldest, and again from the start behind the end."""
        return (self.pointer + torch.arange(n, device=self.pointer.device)) % self.size

    @torch.no_grad()
    def put(self, rows: Tensor) -> None:
        """Replaces the oldest columns by `rows` (n, width)."""
        self.columns[:, self.places(len(rows))] = rows.t().to(self.columns.dtype)
        self.pointer.copy_((self.pointer + len(rows)) % self.size)
