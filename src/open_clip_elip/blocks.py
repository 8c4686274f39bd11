"""OpenCLIP's residual attention blocks without waste: no transposed copies, and one row where one is all that counts.

The functions compute what the block's own `forward` does, up to rounding, from the block's own modules and weights.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn


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
    attn = block.attn
    qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, L, head_dim)
    return _rest(block, x, F.scaled_dot_product_attention(q, k, v, is_causal=causal))


def run_block_at(block: nn.Module, x: Tensor, row: Tensor | None = None) -> Tensor:
    """One row of the block's output, (B, 1, D), at the price of two of its six matrices for the other rows.

    Args:
        block: the last one of a tower of which a single row is pooled.
        x: (B, L, D).
        row: (B,) which row of each sample; it attends to itself and the rows before it. None: the first row (`[CLS]`),
            which attends to all.
    """
    attn = block.attn
    width = attn.embed_dim
    h = block.ln_1(x)
    w_q, w_kv = attn.in_proj_weight.split([width, 2 * width])
    b_q, b_kv = (None, None) if attn.in_proj_bias is None else attn.in_proj_bias.split([width, 2 * width])
    if row is None:
        here, h_row, mask = x[:, :1], h[:, :1], None
    else:
        index = row[:, None, None].expand(-1, 1, width)
        here, h_row = x.gather(1, index), h.gather(1, index)
        mask = torch.arange(x.shape[1], device=x.device) <= row[:, None, None, None]
    q = F.linear(h_row, w_q, b_q).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    k, v = F.linear(h, w_kv, b_kv).unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return _rest(block, here, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def _rest(block: nn.Module, x: Tensor, attended: Tensor) -> Tensor:
    """What follows the attention; x: (B, L, D), attended: (B, heads, L, head_dim)."""
    x = x + block.ls_1(block.attn.out_proj(attended.transpose(1, 2).flatten(2)))
    return x + block.ls_2(block.mlp(block.ln_2(x)))
