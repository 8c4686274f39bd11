"""Which patches of a picture a model keeps: its removals of tokens, told of the patches that these stand for.

M patches at the tower's input, in rows from the top left.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..identity import ModelError
from ..reduction import Removal, TokenReduction


class Stage(NamedTuple):
    """What one removal leaves of the patches."""

    layer: int  # 1-based: before it, or within
    token: Tensor  # (B, M) int64, the token that each patch is in afterwards; -1: in none
    kept: Tensor  # (B, M) bool, whether it is in that alone
    scores: Tensor | None  # (B, M), by which it was chosen; NaN: it was not alone before. None: by no scores


@torch.no_grad()
def trace(model: nn.Module, image: Tensor, text: Tensor | None = None) -> list[Stage]:
    """The stages of a model in eval mode.

    Args:
        model: any with a `tower` that has a reduction; `image` and `text` are brought to its device.
        image: (B, 3, H, W), normalised.
        text: (B, T) token ids that guide; None, or a method that looks at no text: the image alone decides.

    Raises:
        ModelError: the method does not tell what it removes.
    """
    tower, removals, weight = model.tower, [], model.visual.conv1.weight
    reduction: TokenReduction = tower.reduction
    guidance = None
    if text is not None and reduction.uses_text:
        guidance = text_guidance(model, text.to(weight.device))
    compiled, tower.compiles, reduction.watch = tower.compiles, False, removals.append
    try:
        tower.tokens(image.to(weight.device, weight.dtype), guidance, reduce=True)
    finally:
        tower.compiles, reduction.watch = compiled, None
    rows, columns = model.visual.grid_size
    if not removals and reduction.rrt(rows * columns) > 0:
        raise ModelError(f"{type(reduction).__name__} does not tell which tokens it removes; let it call its `watch`.")
    return stages(removals, len(image), rows * columns)


def text_guidance(model: nn.Module, text: Tensor) -> Tensor:
    """(B, D): what texts (B, T) guide the image tower by, in every family."""
    if hasattr(model, "encode_text_and_guidance"):
        return model.encode_text_and_guidance(text)[1]
    return model.guidance(model.text_states(text))


def stages(removals: list[Removal], batch: int, patches: int) -> list[Stage]:
    """Of removals one after another, on the CPU."""
    token, kept = torch.arange(patches).expand(batch, -1), torch.ones(batch, patches, dtype=torch.bool)
    found = []
    for layer, _, into, scores in removals:
        was_kept, place = kept, token.clamp_min(0)
        if scores is not None:
            scores = scores.float().cpu().gather(1, place).masked_fill(~was_kept, torch.nan)
        token = into.cpu().gather(1, place).masked_fill(token < 0, -1)
        members = torch.zeros(batch, patches + 1, dtype=torch.long).scatter_add(1, token + 1, torch.ones_like(token))
        kept = (token >= 0) & (members.gather(1, token + 1) == 1)
        found.append(Stage(layer + 1, token, kept, scores))
    return found
