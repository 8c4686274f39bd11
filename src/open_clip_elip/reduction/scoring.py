"""The attention row of `[CLS]` in one block, at the price of one row."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cls_attention(block: nn.Module, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention that the `[CLS]` query pays to every other token in `block`, mean over heads.

    The softmax runs over all 1+N tokens, as in the block itself, and the N others are read off. Of the block only
    `ln_1` and the query and key weights are used. The key projection is moved onto the single query,
    `q . (W_k h + b_k) = (W_k^T q) . h + const`, and the constant cancels in the softmax: no key is ever computed, and
    the cost falls from N*D*D to N*D*heads multiplications without changing the result.

    Args:
        block: a pre-norm attention block (see `check_blocks`).
        y: (B, 1+N, D), `[CLS]` first.
        mask: (B, 1+N), False for padding, whose attention is 0.

    Returns:
        (B, N) in float32 (float64 for float64 input); each row sums to less than 1.
    """
    attn = block.attn
    width, heads = attn.embed_dim, attn.num_heads
    head_dim = width // heads
    h_BND = block.ln_1(y)
    bias = attn.in_proj_bias
    q_BD = F.linear(h_BND[:, 0], attn.in_proj_weight[:width], None if bias is None else bias[:width])
    w_k_HdD = attn.in_proj_weight[width : 2 * width].unflatten(0, (heads, head_dim))
    q_BHd = q_BD.unflatten(-1, (heads, head_dim)) * head_dim**-0.5
    q_BHD = torch.einsum("bhd,hdk->bhk", q_BHd, w_k_HdD.to(q_BHd.dtype))
    logits_BHN = q_BHD @ h_BND.to(q_BHD.dtype).transpose(1, 2)
    if mask is not None:
        logits_BHN = logits_BHN.masked_fill(~mask[:, None], float("-inf"))
    accumulate = torch.promote_types(logits_BHN.dtype, torch.float32)
    return logits_BHN.softmax(dim=-1, dtype=accumulate).mean(dim=1)[:, 1:]


def check_blocks(blocks: Sequence[nn.Module]) -> None:
    """Raises ValueError, in one sentence, when `cls_attention` cannot read one of the blocks."""
    for i, block in enumerate(blocks):
        attn = getattr(block, "attn", None)
        if not isinstance(attn, nn.MultiheadAttention):
            raise ValueError(
                f"Token reduction reads the packed query and key weights of nn.MultiheadAttention, but block {i} is a "
                f"{type(block).__name__} with {type(attn).__name__}; use a model with default attention blocks."
            )
        why = None
        if not hasattr(block, "ln_1"):
            why = "has no ln_1"
        elif hasattr(block, "ln_1_kv"):
            why = "is a cross-attention block"
        elif attn.in_proj_weight is None:
            why = "has separate query, key and value widths"
        elif attn.bias_k is not None or attn.add_zero_attn:
            why = "appends extra keys"
        elif not attn.batch_first:
            why = "is not batch-first"
        elif attn.dropout:
            why = "has attention dropout, so its scores would be random"
        if why:
            raise ValueError(f"Token reduction cannot score with block {i} of this tower: it {why}.")
