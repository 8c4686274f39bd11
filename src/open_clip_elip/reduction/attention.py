"""A pre-norm attention block in halves, so that tokens can be merged or dropped between attention and MLP.

The functions compute what OpenCLIP's block does, up to rounding, from its own modules: `ln_1`, `attn`
(`nn.MultiheadAttention`, packed weights), `ls_1`, `ln_2`, `mlp`, `ls_2`.
"""
from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def asked_once(question: Callable) -> Callable:
    """Of a graph that is compiled, the answer to this question about a module is a constant."""

    @torch.compiler.assume_constant_result  # which takes no modules before torch 2.9
    def by_id(number: int, *more):
        return question(ctypes.cast(number, ctypes.py_object).value, *more)

    return functools.wraps(question)(lambda module, *more: by_id(id(module), *more))


def in_effect(attn: nn.Module) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """The weights in effect, with gradient to what makes them up: packed (3D, D) and bias (3D,), then those of the
    output projection, (D, D) and (D,), a module that `attn` does not call either."""
    if hasattr(attn, "in_effect"):  # this package's own LoRA
        return attn.in_effect()
    if not is_lora(attn):  # of a parametrized module these are the effective ones
        return attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight, attn.out_proj.bias
    base, is_merged = attn.base_layer, attn.merged or attn.disable_adapters
    if not is_merged:  # as the wrapper's forward does
        attn.merge(adapter_names=[name for name in attn.active_adapters if name in attn.lora_A])
    out = base.out_proj.base_layer
    try:
        return base.in_proj_weight, base.in_proj_bias, out.weight, out.bias
    finally:
        if not is_merged:
            attn.unmerge()


def is_lora(attn: nn.Module) -> bool:
    """Whether it is peft's wrapper of `nn.MultiheadAttention`, whose own `in_proj_weight` is the one below adapters."""
    wrapper = ("peft.tuners.lora.layer", "MultiheadAttention")
    return any((kind.__module__, kind.__name__) == wrapper for kind in type(attn).__mro__)


def check_blocks(blocks: Sequence[nn.Module]) -> None:
    """Raises ValueError, in one sentence, when the methods cannot work with one of a tower's blocks."""
    for i, block in enumerate(blocks):
        if why := _unlike(block):
            raise ValueError(
                "Token reduction reads the packed query and key weights of nn.MultiheadAttention in default attention "
                f"blocks, but block {i} of this tower {why}."
            )


@asked_once
def check_attention(block: nn.Module, split: bool) -> None:
    """Raises ValueError, in one sentence, if a block no longer attends by the weights that are `in_effect`.

    `split`: it is run in halves, so that its attention is never called; else its weights are only read.
    """
    why = _unlike(block)
    called = [] if why else [block.attn, block.attn.base_layer] if is_lora(block.attn) else [block.attn]
    if any(name in vars(module) for module in (block, *called) for name in ("forward", "attention")):
        why = "runs a forward or attention that was put in its place"
    elif any(m._forward_pre_hooks or split and (m._forward_hooks or m._backward_hooks) for m in called):
        why = "has hooks on its attn"
    if why:
        how = "runs it in halves" if split else "scores tokens by its attention weights"
        raise ValueError(
            f"A block of the image tower was changed and {why}, but this method of token reduction {how}; undo the "
            "change, merge it into the weights, or train without token reduction."
        )


def _unlike(block: nn.Module) -> str | None:
    """How a block differs from a pre-norm block with `nn.MultiheadAttention`."""
    attn = getattr(block, "attn", None)
    inner = attn.base_layer if is_lora(attn) else attn
    if not isinstance(inner, nn.MultiheadAttention) or type(inner).forward is not nn.MultiheadAttention.forward:
        return f"is a {type(block).__name__} with {type(attn).__name__}"
    reasons = {
        "has no ln_1": not hasattr(block, "ln_1"),
        "is a cross-attention block": hasattr(block, "ln_1_kv"),
        "has separate query, key and value widths": inner.in_proj_weight is None,
        "appends extra keys": inner.bias_k is not None or inner.add_zero_attn,
        "is not batch-first": not inner.batch_first,
        "has attention dropout, so its scores would be random": inner.dropout,
    }
    return next((why for why, true in reasons.items() if true), None)


def project(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all tokens, (B, heads, L, head_dim) each, for `x` (B, L, D)."""
    return split_heads(F.linear(block.ln_1(x), *in_effect(block.attn)[:2]), 3, block.attn.num_heads)


def project_row(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `project`, with the query (B, heads, 1, head_dim) of the first token alone."""
    h = block.ln_1(x)
    q, kv = project_some(block, h[:, :1], h)
    return (*split_heads(q, 1, block.attn.num_heads), *split_heads(kv, 2, block.attn.num_heads))


def project_some(block: nn.Module, asking: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (..., D) of some normed tokens (..., D); keys and values (..., 2D) of others, in one."""
    weight, bias = in_effect(block.attn)[:2]
    width = block.attn.embed_dim
    w_q, w_kv = weight.split([width, 2 * width])
    b_q, b_kv = (None, None) if bias is None else bias.split([width, 2 * width])
    return F.linear(asking, w_q, b_q), F.linear(asked, w_kv, b_kv)


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, L, parts * D) to so many of (B, heads, L, head_dim)."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attention(q: Tensor, k: Tensor, v: Tensor, **masking) -> Tensor:
    """(B, L, D) for the L queries, heads side by side."""
    return F.scaled_dot_product_attention(q, k, v, **masking).transpose(1, 2).flatten(2)


def attend(block: nn.Module, x: Tensor, q: Tensor, k: Tensor, v: Tensor, **masking) -> Tensor:
    """The residual stream after the attention: `x` (B, L, D), whose queries `q` are, with it added."""
    return add_attention(block, x, attention(q, k, v, **masking))


def add_attention(block: nn.Module, x: Tensor, attended: Tensor) -> Tensor:
    """The residual stream after the attention, for any leading shape."""
    return x + block.ls_1(F.linear(attended, *in_effect(block.attn)[2:]))


def add_mlp(block: nn.Module, x: Tensor) -> Tensor:
    """The residual stream after the MLP, for any leading shape."""
    return x + block.ls_2(block.mlp(block.ln_2(x)))
