"""OpenCLIP's ViT driven layer by layer, with the exact shortcuts of `blocks.py`."""
from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .blocks import is_plain, run_block, run_block_at


def can_drive(visual: nn.Module) -> bool:
    """Whether an image tower is one that the functions below know."""
    return isinstance(visual, VisionTransformer) and visual.transformer.batch_first


def only_cls(visual: VisionTransformer) -> bool:
    """Whether nothing but `[CLS]` of the last layer is used."""
    return visual.pool_type == "tok" and visual.attn_pool is None and not visual.output_tokens


def skips_last(model: nn.Module) -> bool:
    """Whether a model computes the last layer of its image tower for the one token that is pooled alone."""
    visual = model.visual
    return getattr(model, "shortcuts", False) and only_cls(visual) and is_plain(visual.transformer.resblocks[-1])


def num_patches(visual: nn.Module) -> int:
    """Patch tokens that enter the first layer in training (M): the grid, less what patch dropout removes."""
    rows, columns = visual.grid_size
    dropout = getattr(visual.patch_dropout, "prob", 0.0)
    return max(1, int(rows * columns * (1 - dropout))) if dropout else rows * columns


def run_layer(
    visual: nn.Module, block: nn.Module, *tensors: Tensor, function: Callable | None = None, shortcuts: bool = True
):
    """One layer of the tower, checkpointed if the tower is: (B, L, D) to (B, L, D).

    With `shortcuts` the last layer of a tower of which only `[CLS]` is used gives (B, 1, D).

    Args:
        tensors: what the block takes, or
        function: called in its place, as `function(block, *tensors)`.
    """
    plain = is_plain(block)
    if function is None:
        function = nn.Module.__call__
        if shortcuts and plain:
            function = run_block_at if only_cls(visual) and block is visual.transformer.resblocks[-1] else run_block
    elif not plain:
        function = functools.partial(_within_hooks, function=function)
    if visual.transformer.grad_checkpointing and torch.is_grad_enabled():
        return checkpoint(function, block, *tensors, use_reentrant=False)
    return function(block, *tensors)


@torch.compiler.disable  # as are the hooks of sharded blocks themselves
def _within_hooks(block: nn.Module, *tensors: Tensor, function: Callable):
    """`function(block, *tensors)` in the place of the block's forward, so that its hooks run around it: those of
    `fully_shard` bring the weights."""
    block.forward = functools.partial(function, block)
    try:
        return block(*tensors)
    finally:
        del block.forward


def pool(visual: nn.Module, x: Tensor) -> Tensor:
    """The tokens after the last layer, (B, L, D), to features (B, output_dim)."""
    features, _ = visual._pool(x)
    return features if visual.proj is None else features @ visual.proj
