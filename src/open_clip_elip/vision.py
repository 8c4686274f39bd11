"""OpenCLIP's ViT driven layer by layer, with the exact shortcuts of `blocks.py`."""
from __future__ import annotations

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


def run_layer(visual: nn.Module, block: nn.Module, x: Tensor, shortcuts: bool = True) -> Tensor:
    """One layer of the tower, checkpointed if the tower is: (B, L, D) to (B, L, D).

    With `shortcuts` the last layer of a tower of which only `[CLS]` is used gives (B, 1, D).
    """
    run = nn.Module.__call__
    if shortcuts and is_plain(block):
        run = run_block_at if only_cls(visual) and block is visual.transformer.resblocks[-1] else run_block
    if visual.transformer.grad_checkpointing and torch.is_grad_enabled():
        return checkpoint(run, block, x, use_reentrant=False)
    return run(block, x)


def pool(visual: nn.Module, x: Tensor) -> Tensor:
    """The tokens after the last layer, (B, L, D), to features (B, output_dim)."""
    features, _ = visual._pool(x)
    return features if visual.proj is None else features @ visual.proj
