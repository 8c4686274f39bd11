"""The attention row of `[CLS]` in one block, at the price of one row."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import in_proj


def cls_attention(block: nn.Module, y: Tensor) -> Tensor:
    """Attention that the `[CLS]` query pays to every other token in `block`, mean over heads.

    The softmax runs over all 1+N tokens, as in the block itself, and the N others are read off. Of the block only
    `ln_1` and the query and key weights are used. The key projection is moved onto the single query,
    `q . (W_k h + b_k) = (W_k^T q) . h + const`, and the constant cancels in the softmax: no key is ever computed, and
    the cost falls from N*D*D to N*D*heads multiplications without changing the result.

    Args:
        block: a pre-norm attention block (see `attention.check_blocks`).
        y: (B, 1+N, D), `[CLS]` first.

    Returns:
        (B, N) in float32 (float64 for float64 input); each row sums to less than 1.
    """
    width, heads = block.attn.embed_dim, block.attn.num_heads
    head_dim = width // heads
    h_BND = block.ln_1(y)
    weight, bias = in_proj(block.attn)
    q_BD = F.linear(h_BND[:, 0], weight[:width], None if bias is None else bias[:width])
    w_k_HdD = weight[width : 2 * width].unflatten(0, (heads, head_dim))
    q_BHd = q_BD.unflatten(-1, (heads, head_dim)) * head_dim**-0.5
    q_BHD = torch.einsum("bhd,hdk->bhk", q_BHd, w_k_HdD.to(q_BHd.dtype))
    logits_BHN = q_BHD @ h_BND.to(q_BHD.dtype).transpose(1, 2)
    accumulate = torch.promote_types(logits_BHN.dtype, torch.float32)
    return logits_BHN.softmax(dim=-1, dtype=accumulate).mean(dim=1)[:, 1:]
