"""OpenCLIP's residual attention blocks without waste: no transposed copies, and one row where one is all that counts.

The functions compute what the block's own `forward` does, up to rounding, from the block's own modules and weights.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from .reduction.attention import add_attended, add_mlp, project, project_row, take_row


def is_plain(block: nn.Module) -> bool:
    """Whether a block is what the functions below know: not sharded, not hooked, not another kind of attention."""
    if type(block) is not ResidualAttentionBlock or type(block.attn) is not nn.MultiheadAttention:
        return False
    attn = block.attn
    standard = attn.in_proj_weight is not None and attn.bias_k is None and not attn.add_zero_attn
    hooked = any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in (block, attn)
    )
    return standard and attn.batch_first and not attn.dropout and not hasattr(block, "ln_1_kv") and not hooked


def run_block(block: nn.Module, x: Tensor, causal: bool = False) -> Tensor:
    """The block's output (B, L, D) for `x` (B, L, D); `causal`: a token attends to itself and those before it."""
    q, k, v = project(block, x)
    return add_mlp(block, add_attended(block, x, F.scaled_dot_product_attention(q, k, v, is_causal=causal)))


def run_block_at(block: nn.Module, x: Tensor, row: Tensor | None = None) -> Tensor:
    """One row of the block's output, (B, 1, D), at the price of two of its six matrices for the other rows.

    Args:
        block: the last one of a tower of which a single row is pooled.
        x: (B, L, D).
        row: (B,) which row of each sample; it attends to itself and the rows before it. None: the first row (`[CLS]`),
            which attends to all.
    """
    mask = None if row is None else torch.arange(x.shape[1], device=x.device) <= row[:, None, None, None]
    q, k, v = project_row(block, x, row)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return add_mlp(block, add_attended(block, take_row(x, row), attended))
