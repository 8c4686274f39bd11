"""OpenCLIP's blocks without waste: no transposed copies, and one row where one is all that counts.

Up to rounding it is what a block's own `forward` does with its own modules and weights; so this stands in for it only
where `is_untouched` says that nobody has changed a block, or hung anything on it.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable

import timm.layers
import torch
from open_clip import transformer as openclip
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .adapters import Bottleneck
from .reduction.attention import add_mlp, asked_once, attend, check_attention, is_lora, project, project_row


class DropPath(timm.layers.DropPath):
    """Stochastic depth, in the place of a layer scale. Without gradient, as where tokens are scored, all layers run."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.is_grad_enabled() else x


_NORMS, _SCALES = (openclip.LayerNorm, openclip.LayerNormFp32), (nn.Identity, openclip.LayerScale, DropPath, Bottleneck)
_ACTIVATIONS, _LINEAR = (nn.GELU, openclip.QuickGELU), (nn.Linear, NonDynamicallyQuantizableLinear)
_TOWERS = (openclip.VisionTransformer, openclip.Transformer, openclip.TextTransformer, HFTextEncoder)
# What OpenCLIP builds its towers of: a class, its children, and the classes that these may have. None: not looked into.
_PARTS = {
    openclip.ResidualAttentionBlock: {
        "ln_1": _NORMS, "attn": (nn.MultiheadAttention,), "ls_1": _SCALES,
        "ln_2": _NORMS, "mlp": (nn.Sequential,), "ls_2": _SCALES,
    },
    nn.MultiheadAttention: {"out_proj": _LINEAR[1:]},
    Bottleneck: {"base_layer": _SCALES, "adapter_down": _LINEAR[:1], "adapter_up": _LINEAR[:1]},
    nn.Sequential: {"c_fc": _LINEAR[:1], "gelu": _ACTIVATIONS, "c_proj": _LINEAR[:1]},
    **dict.fromkeys((*_NORMS, *_SCALES[:3], *_ACTIVATIONS, *_LINEAR, nn.Embedding), {}),
    **dict.fromkeys(_TOWERS),
}  # fmt: skip
_GLOBAL = (
    all_modules._global_forward_hooks, all_modules._global_forward_pre_hooks, all_modules._global_backward_hooks,
    all_modules._global_backward_pre_hooks,
)  # fmt: skip
_ATTRIBUTES = {kind: frozenset(dir(kind)) for kind in _PARTS}
_NAMES = ("forward", "attention", "_embeds", "_pool", "_global_pool")
_METHODS = {(kind, name): getattr(kind, name) for kind in _PARTS for name in _NAMES if hasattr(kind, name)}


@asked_once
def is_untouched(module: nn.Module) -> bool:
    """Whether a module is as OpenCLIP builds it, so that a shortcut may stand in for its forward; asked at every step.

    It is not with a hook of any kind on it, a method replaced on it or its class, a parametrization, or a child that is
    touched or another's: wrapped, replaced, quantised, sharded. Of a tower or a stack of blocks, children do not count;
    adapters of this package's are in effect everywhere, and change nothing about that.
    """
    if any(getattr(kind, name) is not function for (kind, name), function in _METHODS.items()):
        return False
    return _is_untouched(module) and not any(map(_is_foreign, itertools.chain(*(hooks.values() for hooks in _GLOBAL))))


def _is_foreign(hook: Callable) -> bool:
    """Whether a hook on all modules may change something: torch's own, of its counter of operations, do not."""
    return not getattr(hook, "__module__", "").startswith("torch.")


def _is_untouched(module: nn.Module) -> bool:
    kind = type(module)
    if hasattr(kind, "in_effect"):
        return not any(has_hooks(inner) or "forward" in vars(inner) for inner in module.modules())
    if kind not in _PARTS or has_hooks(module) or not _ATTRIBUTES[kind].isdisjoint(vars(module)):
        return False
    parts, children = _PARTS[kind], module._modules
    if parts is None or parts.keys() != children.keys():
        return parts is None
    if kind is nn.MultiheadAttention:
        packed = module._parameters.get("in_proj_weight") is not None and module.bias_k is None
        if not packed or module.add_zero_attn or not module.batch_first or module.dropout:
            return False
    return all(_is_one_of(parts[name], child) and _is_untouched(child) for name, child in children.items())


def _is_one_of(kinds: tuple[type, ...], child: nn.Module) -> bool:
    return type(child) in kinds or nn.MultiheadAttention in kinds and hasattr(child, "in_effect")


@asked_once
def is_adapted(block: nn.Module) -> bool:
    """Whether peft's adapters are on a block's attention, and nothing hangs on that or on the block: then `run_block`
    rounds as it does for the merged model, with the norms and the MLP that are there."""
    if type(block) is not openclip.ResidualAttentionBlock or not is_lora(block.attn):
        return False
    called = (block, block.attn, block.attn.base_layer)
    return not any(has_hooks(module) or not {"forward", "attention"}.isdisjoint(vars(module)) for module in called)


def has_hooks(module: nn.Module) -> bool:
    """Whether any hook runs when the module is called, or when gradients pass it."""
    m = module
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def is_sharded(block: nn.Module) -> bool:
    """Whether torch's `fully_shard` splits the block's weights, and nothing inside of it is touched."""
    return hasattr(block, "unshard") and all(map(_is_untouched, block.children()))


def run_in_place(module: nn.Module, x: Tensor, *more: Tensor, function: Callable):
    """`function(module, x, *more)` in the place of the module's forward: what hangs on it runs around the first value
    that it returns. A ValueError if the forward is not OpenCLIP's, so that nothing can stand in for it."""
    return function(module, x, *more) if is_untouched(module) else _within_hooks(module, x, *more, function=function)


@torch.compiler.disable  # as are the hooks of sharded blocks themselves
def _within_hooks(module: nn.Module, x: Tensor, *more: Tensor, function: Callable):
    kind = next((kind for kind in (openclip.ResidualAttentionBlock, *_TOWERS) if isinstance(module, kind)), None)
    if kind is None or "forward" in vars(module) or type(module).forward is not _METHODS[kind, "forward"]:
        raise ValueError(
            f"The forward of the image tower's {type(module).__name__} was replaced, but token reduction works inside "
            "of it; undo the change, or train without token reduction."
        )
    if kind is openclip.ResidualAttentionBlock and not hasattr(module, "unshard"):
        check_attention(module, True)
    rest = ()

    def forward(x: Tensor, **_) -> Tensor:
        nonlocal rest
        out = function(module, x, *more)
        out, *rest = out if isinstance(out, tuple) else (out,)
        return out

    module.forward = forward  # hooks of `fully_shard` bring the weights, for one
    try:
        out = module(x)
    finally:
        del module.forward
    return (out, *rest) if rest else out


def run_block(block: nn.Module, x: Tensor) -> Tensor:
    """The block's output (B, L, D) for `x` (B, L, D)."""
    return add_mlp(block, attend(block, x, *project(block, x)))


def run_block_at_cls(block: nn.Module, x: Tensor) -> Tensor:
    """The first row of the output for `x` (B, L, D), (B, 1, D), at the price of two of six matrices for the others."""
    return add_mlp(block, attend(block, x[:, :1], *project_row(block, x)))


def is_traced() -> bool:
    """Whether a graph is recorded that is to fit other inputs too, or `torch.func` maps over samples, whose lengths it
    does not tell: then all runs as OpenCLIP runs it."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or torch.jit.is_scripting():
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None
