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
    with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with _WithoutGradient(counter) as scoring:
            leaves = tree_leaves(step())
        forward = counter.get_total_flops()
        sums = [leaf.float().sum() for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if sums:  # else all that was called is locked
            torch.stack(sums).sum().backward()
    model.zero_grad(set_to_none=True)
    return Flops(forward - scoring.flops, counter.get_total_flops() - forward, scoring.flops)


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


class _WithoutGradient(TorchDispatchMode):
    """Adds up what `counter`, entered before, counts while gradients are turned off."""

    def __init__(self, counter: FlopCounterMode):
        super().__init__()
        self.counter, self.flops = counter, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = self.counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        if not torch.is_grad_enabled():
            self.flops += self.counter.get_total_flops() - before
        return out
