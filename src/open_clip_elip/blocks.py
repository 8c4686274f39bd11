"""OpenCLIP's blocks without waste: no transposed copies, and one row where one is all that counts.

The functions compute what the block's own `forward` does, up to rounding, from the block's own modules and weights. So
they stand in for it only where `is_untouched` says that nobody has changed a block, or hung anything on it.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from open_clip import transformer as openclip
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .reduction.attention import add_attended, add_mlp, check_attention, project, project_row, take_row

_NORMS, _SCALES = (openclip.LayerNorm, openclip.LayerNormFp32), (nn.Identity, openclip.LayerScale)
_ACTIVATIONS, _LINEAR = (nn.GELU, openclip.QuickGELU), (nn.Linear, NonDynamicallyQuantizableLinear)
_TOWERS = (openclip.VisionTransformer, openclip.Transformer, openclip.TextTransformer)
# What OpenCLIP builds its towers of: a class, its children, and the classes that these may have. None: not looked into.
_PARTS = {
    openclip.ResidualAttentionBlock: {
        "ln_1": _NORMS, "attn": (nn.MultiheadAttention,), "ls_1": _SCALES,
        "ln_2": _NORMS, "mlp": (nn.Sequential,), "ls_2": _SCALES,
    },
    nn.MultiheadAttention: {"out_proj": _LINEAR[1:]},
    nn.Sequential: {"c_fc": _LINEAR[:1], "gelu": _ACTIVATIONS, "c_proj": _LINEAR[:1]},
    **dict.fromkeys((*_NORMS, *_SCALES, *_ACTIVATIONS, *_LINEAR, nn.Embedding), {}),
    **dict.fromkeys(_TOWERS),
}  # fmt: skip
_ATTRIBUTES = {kind: frozenset(dir(kind)) for kind in _PARTS}
_NAMES = ("forward", "attention", "_embeds", "_pool", "_global_pool")
_METHODS = {(kind, name): getattr(kind, name) for kind in _PARTS for name in _NAMES if hasattr(kind, name)}


@torch.compiler.assume_constant_result  # what it says while a model is compiled holds for the graph
def is_untouched(module: nn.Module) -> bool:
    """Whether a module is as OpenCLIP builds it, so that a shortcut may stand in for its forward.

    It is not with a hook of any kind on it, a method replaced on it or its class, a parametrization, or a child that is
    touched or another's: wrapped, replaced, quantised, sharded. Of a tower or a stack of blocks, the children are not
    asked for. A matter of microseconds, so it is asked at every step.
    """
    return _is_untouched(module) and all(getattr(kind, name) is f for (kind, name), f in _METHODS.items())


def _is_untouched(module: nn.Module) -> bool:
    kind = type(module)
    if kind not in _PARTS or has_hooks(module) or not _ATTRIBUTES[kind].isdisjoint(vars(module)):
        return False
    if kind is nn.MultiheadAttention and not _is_standard(module):
        return False
    parts, children = _PARTS[kind], module._modules
    if parts is None or parts.keys() != children.keys():
        return parts is None
    return all(type(child) in parts[name] and _is_untouched(child) for name, child in children.items())


def _is_standard(attn: nn.MultiheadAttention) -> bool:
    packed = attn._parameters.get("in_proj_weight") is not None and attn.bias_k is None
    return packed and not attn.add_zero_attn and attn.batch_first and not attn.dropout


def has_hooks(module: nn.Module) -> bool:
    """Whether any hook runs when the module is called, or when gradients pass it."""
    m = module
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def is_sharded(block: nn.Module) -> bool:
    """Whether torch's `fully_shard` splits the block's weights, and nothing inside of it is touched."""
    return hasattr(block, "unshard") and all(map(_is_untouched, block.children()))


def run_in_place(module: nn.Module, x: Tensor, function: Callable):
    """`function(module, x)` in the place of the module's forward: what hangs on the module runs around it.

    What the function returns beside its first value is nobody else's.

    Raises:
        ValueError: the module's forward is not OpenCLIP's, so nothing can stand in for it.
    """
    return function(module, x) if is_untouched(module) else _within_hooks(module, x, function)


@torch.compiler.disable  # as are the hooks of sharded blocks themselves
def _within_hooks(module: nn.Module, x: Tensor, function: Callable):
    kind = next((kind for kind in (openclip.ResidualAttentionBlock, *_TOWERS) if isinstance(module, kind)), None)
    if kind is None or "forward" in vars(module) or type(module).forward is not _METHODS[kind, "forward"]:
        raise ValueError(
            f"The forward of the image tower's {type(module).__name__} was replaced, but token reduction works inside "
            "of it; undo the change, or train without token reduction."
        )
    if kind is openclip.ResidualAttentionBlock and not hasattr(module, "unshard"):
        check_attention(module, split=True)
    rest = ()

    def forward(x: Tensor, **_) -> Tensor:
        nonlocal rest
        out = function(module, x)
        out, *rest = out if isinstance(out, tuple) else (out,)
        return out

    module.forward = forward  # hooks of `fully_shard` bring the weights, for one
    try:
        out = module(x)
    finally:
        del module.forward
    return (out, *rest) if rest else out


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


def is_traced() -> bool:
    """Whether a graph is recorded that is to fit other inputs too: then all runs as OpenCLIP runs it."""
    return torch.jit.is_tracing() or torch.jit.is_scripting() or torch.compiler.is_exporting()
