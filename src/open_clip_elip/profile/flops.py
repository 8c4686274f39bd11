"""Operations of a training step, counted by torch on the calls that the model really makes.

Counted are matrix products and convolutions, 2 operations a multiply-add, of the towers: the loss's are below one in a
thousand, the optimizer has none. Attention is counted as the products it is made of, whichever kernel runs it: torch's
counter knows no formula for the fused kernel of CPUs, and for those of GPUs one that includes their recomputation in
the backward pass. A causal mask saves nothing in this count.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..text import TextParts


@dataclass(frozen=True)
class Flops:
    """Operations of a step.

    Attributes:
        forward, backward: of both towers, the scoring pass left out.
        scoring: what runs without gradient in the forward pass, to choose the tokens.
        text_forward, text_backward: the text tower's part of `forward` and `backward`.
    """

    forward: int
    backward: int
    scoring: int
    text_forward: int
    text_backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.scoring

    @property
    def text(self) -> int:
        return self.text_forward + self.text_backward

    @property
    def image(self) -> int:
        """The image tower's, scoring left out."""
        return self.forward + self.backward - self.text


def count_flops(model: nn.Module, image: Tensor, text: Tensor | TextParts) -> Flops:
    """Counts one step on this batch (B pairs); parameters get gradients. On the device "meta" nothing is computed.

    Args:
        model: in training mode, with `output_dict`.
        image: (B, 3, H, W).
        text: token ids (B, T), or cut ones.
    """
    forward, backward, scoring = _count(model, lambda: model(image, text))
    text_forward, text_backward, _ = _count(model, lambda: {"text_features": model.encode_text(text)})
    return Flops(forward - scoring, backward, scoring, text_forward, text_backward)


def _count(model: nn.Module, run) -> tuple[int, int, int]:
    """Operations of forward, of backward from all features, and those of forward that ran without gradient."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with _WithoutGradient(counter) as scoring:
            out = run()
        forward = counter.get_total_flops()
        features = [value.float().sum() for value in out.values() if value.is_floating_point() and value.requires_grad]
        torch.stack(features).sum().backward()
    model.zero_grad(set_to_none=True)
    return forward, counter.get_total_flops() - forward, scoring.flops


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
