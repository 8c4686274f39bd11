"""A pre-norm attention block in halves, so that tokens can be merged or dropped between attention and MLP.

The functions compute what OpenCLIP's block does, up to rounding, from its own modules: `ln_1`, `attn`
(`nn.MultiheadAttention`, packed weights), `ls_1`, `ln_2`, `mlp`, `ls_2`.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, L, parts * D) to so many of (B, heads, L, head_dim)."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def query_and_rest(attn: nn.MultiheadAttention) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """Weight and bias of the queries, and those of keys and values."""
    width = attn.embed_dim
    w_q, w_kv = attn.in_proj_weight.split([width, 2 * width])
    b_q, b_kv = (None, None) if attn.in_proj_bias is None else attn.in_proj_bias.split([width, 2 * width])
    return (w_q, b_q), (w_kv, b_kv)


def project(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all tokens, (B, heads, L, head_dim) each, for `x` (B, L, D)."""
    attn = block.attn
    return split_heads(F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias), 3, attn.num_heads)


def project_row(block: nn.Module, x: Tensor, row: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As `project`, with the query of a single token only, (B, heads, 1, head_dim).

    Args:
        x: (B, L, D).
        row: (B,) which token of each sample; None: the first (`[CLS]`).
    """
    heads, h = block.attn.num_heads, block.ln_1(x)
    (w_q, b_q), (w_kv, b_kv) = query_and_rest(block.attn)
    (q,) = split_heads(F.linear(take_row(h, row), w_q, b_q), 1, heads)
    return (q, *split_heads(F.linear(h, w_kv, b_kv), 2, heads))


def take_row(x: Tensor, row: Tensor | None = None) -> Tensor:
    """(B, 1, D) of `x` (B, L, D): the token `row` (B,) of each sample, or the first."""
    return x[:, :1] if row is None else x.gather(1, row[:, None, None].expand(-1, 1, x.shape[-1]))


def add_attended(block: nn.Module, x: Tensor, attended: Tensor) -> Tensor:
    """The residual stream (B, L, D) after the attention; attended: (B, heads, L, head_dim)."""
    return x + block.ls_1(block.attn.out_proj(attended.transpose(1, 2).flatten(2)))


def add_mlp(block: nn.Module, x: Tensor) -> Tensor:
    """The residual stream after the MLP, for any leading shape."""
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def cls_row(q: Tensor, k: Tensor) -> Tensor:
    """Attention of the `[CLS]` query to every other token, mean over heads: (B, N), at least float32, with gradient.

    Args:
        q, k: (B, heads, 1+N, head_dim), of which only the first query is used.
    """
    logits = (q[:, :, :1] * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    accumulate = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(dim=-1, dtype=accumulate).mean(dim=1)[:, 0, 1:]
