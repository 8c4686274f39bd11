"""Operations of a training step, counted by torch on the calls that the model really makes.

Counted are matrix products and convolutions, 2 operations a multiply-add, of the towers: the loss's are below one in a
thousand, the optimizer has none. Attention is counted as the products it is made of, whichever kernel runs it: torch's
counter knows no formula for the fused kernel of CPUs, and for those of GPUs one that includes their recomputation in
the backward pass. A causal mask saves nothing in this count.
"""
from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..text import TextParts


@dataclass(frozen=True)
class Flops:
    """Operations of a step: `scoring` is what runs without gradient in the forward pass, to choose the tokens, and is
    in no other; `text_forward` and `text_backward` are the text tower's part, where it was counted; `teacher` is a
    momentum twin's forward pass."""

    forward: int
    backward: int
    scoring: int
    text_forward: int = 0
    text_backward: int = 0
    teacher: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.scoring + self.teacher

    @property
    def text(self) -> int:
        return self.text_forward + self.text_backward

    @property
    def image(self) -> int:
        return self.forward + self.backward - self.text


def count(model: nn.Module, step: Callable[[], Any]) -> Flops:
    """Counts a step of any kind. On the device "meta" (`on_meta`) nothing is computed, but for what looks at numbers,
    which ends in a RuntimeError or NotImplementedError.

    Args:
        model: its gradients are None afterwards.
        step: the forward pass. What it returns (a tensor; or tensors in a dict, list or tuple) is propagated back from.
    """
    # What a step draws at random leaves the generators as they were.
    with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH), _Counter() as counter:
        leaves = tree_leaves(step())
        forward, scoring = counter.total, counter.without_gradient
        sums = [leaf.float().sum() for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if sums:  # else all that was called is locked
            torch.stack(sums).sum().backward()
    model.zero_grad(set_to_none=True)
    return Flops(forward - scoring, counter.total - forward, scoring)


def count_flops(model: nn.Module, image: Tensor, text: Tensor | TextParts) -> Flops:
    """Counts one step of a CLIP model in training mode on images (B, 3, H, W) and token ids (B, T), or cut ones."""
    whole, words = count(model, lambda: model(image, text)), count(model, lambda: model.encode_text(text))
    return replace(whole, text_forward=words.forward, text_backward=words.backward)


def on_meta(model: nn.Module) -> nn.Module:
    """A copy with shapes only, for `count`: without gradient checkpointing, so that nothing is counted twice."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for name in ("grad_checkpointing", "gradient_checkpointing"):  # OpenCLIP's and timm's, transformers'
            if getattr(module, name, False) is True:
                setattr(module, name, False)
    return twin


class _Counter(TorchDispatchMode):
    """Adds up operations by torch's formulas: all, and those made while gradients are turned off."""

    formulas = FlopCounterMode(display=False).flop_registry

    def __init__(self):
        super().__init__()
        self.total = self.without_gradient = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = _call(func, args, kwargs or {})
        if formula := self.formulas.get(func.overloadpacket):
            operations = formula(*args, **kwargs or {}, out_val=out)
            self.total += operations
            self.without_gradient += 0 if torch.is_grad_enabled() else operations
        return out


RESULTS: dict[Any, Any] = {}  # of operations on shapes, by what they depend on


def _call(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation; on shapes, what the same one has returned before, anew. Torch works most of them out in Python,
    which is most of the time of a count."""
    key = _dependence((func, torch.get_default_dtype(), args, tuple(kwargs.items())))
    if key is None or func.is_view or func._schema.is_mutable:
        return func(*args, **kwargs)
    if key not in RESULTS:
        result = func(*args, **kwargs)
        if _dependence(result) is None:
            return result
        RESULTS[key] = result
    return _anew(RESULTS[key])


def _dependence(value: Any) -> Any:
    """What the shapes of results depend on, where they depend on no numbers; else None."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype) if value.is_meta else None
    if isinstance(value, (list, tuple)):
        parts = tuple(map(_dependence, value))
        return None if None in parts else parts
    return type(value), value


def _anew(result: Any) -> Any:
    if isinstance(result, Tensor):
        return torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="meta")
    return type(result)(map(_anew, result)) if isinstance(result, (list, tuple)) else result
