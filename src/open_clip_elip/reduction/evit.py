"""EViT: at a few layers, between attention and MLP, the tokens that `[CLS]` attends to least become one.

Liang et al., "Not All Patches Are What You Need: Expediting Vision Transformers via Token Reorganizations", ICLR 2022,
Sec. 3.1 and 3.2: attentive tokens are kept, the others are fused into x = sum_i a_i x_i (Eq. 4), where a_i is the
attention of `[CLS]` in that layer, averaged over the heads.
"""
from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import add_mlp, attend, project
from .base import (
    Layer,
    ReductionConfig,
    Removal,
    TokenReduction,
    check_number,
    check_switch,
    meet,
    register,
    run_plainly,
)  # fmt: skip
from .merge import best, destinations, gather_tokens, weighted_sum

DEPTH, LAYERS = 12, (4, 7, 10)  # of the source, for a tower of 12 layers
RATES = 1_000_000  # tried for `target_rrt`


@dataclass(frozen=True)
class EvitConfig(ReductionConfig):
    alternatives = ("keep_rate", "target_rrt")
    keep_rate: float | None = None  # share of present patches (a fused token counts as one) that a reducing layer keeps
    target_rrt: float | None = None  # instead of it, the ratio of removed tokens to come as near to as possible
    layers: tuple[int, ...] | None = None  # that reduce, 1-based; None: the source's, in proportion to the depth
    fuse: bool = True  # add the fused token; False = drop the inattentive tokens

    def __post_init__(self) -> None:
        if self._choose(0.7) == "keep_rate":
            check_number("keep_rate", self.keep_rate, 1e-6, 1, "a number in (0, 1]")
        if self.layers is not None:
            self._set_numbers("layers", 1, "layers, 1-based")
            if any(later <= earlier for earlier, later in itertools.pairwise(self.layers)):
                raise ValueError(f"layers must ascend; got {list(self.layers)}.")
        check_switch("fuse", self.fuse)


@register("evit")
class Evit(TokenReduction):
    """Runs a tower's blocks with fewer tokens after each reducing layer, but for one that would fuse a single token:
    that would change the token and save none."""

    Config, suffix = EvitConfig, "-EViT"

    def __init__(self, config: EvitConfig, num_layers: int):
        super().__init__(config, num_layers)
        layers = config.layers or tuple(dict.fromkeys(max(1, round(i * num_layers / DEPTH)) for i in LAYERS))
        if layers[-1] > num_layers:
            raise ValueError(f"layers {list(layers)} go beyond the {num_layers} layers of the image tower.")
        self.reducing = frozenset(layer - 1 for layer in layers)

    def forward(self, blocks, x, guidance=None, *, run=run_plainly, only_cls=False):
        for index, (block, layer) in enumerate(zip(blocks, self.layers(x.shape[1] - 1), strict=True)):
            last = only_cls and block is blocks[-1]  # what [CLS] is there does not depend on who else leaves the layer
            if layer.mlp < layer.attention and not last:
                keep = layer.mlp - 1 - self.config.fuse
                seen = {"index": index, "watch": self.watch}
                x = run(block, x, function=functools.partial(_reduce, keep=keep, fuse=self.config.fuse, **seen))
            else:
                x = run(block, x)
        return x

    def layers(self, num_patches: int) -> list[Layer]:
        if self.config.keep_rate is not None:
            return self._layers(num_patches, self.config.keep_rate)
        steps = RATES - 1
        return meet(self.config.target_rrt, lambda i: self._layers(num_patches, 1 - i / RATES), steps, num_patches)

    def _layers(self, num_patches: int, keep_rate: float) -> list[Layer]:
        tokens, layers = 1 + num_patches, []
        for index in range(self.num_layers):
            left = 1 + max(1, math.ceil(keep_rate * (tokens - 1) - 1e-9)) + self.config.fuse
            after = left if index in self.reducing and left < tokens else tokens
            layers.append(Layer(tokens, after))
            tokens = after
        return layers


def _reduce(block: nn.Module, x: Tensor, *, keep: int, fuse: bool, index: int, watch: Callable | None) -> Tensor:
    """The block on `x` (B, 1+N, D), with `[CLS]`, `keep` patches in their order and the fused token behind them.
    Gradient flows through the fusing weights, as in the source, not through the choice. `index`: of the block, for
    `TokenReduction.watch`."""
    q, k, v = project(block, x)
    x = attend(block, x, q, k, v)
    with torch.set_grad_enabled(fuse and torch.is_grad_enabled()):
        logits = (q[:, :, :1] * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, 1, 1+N), of `[CLS]`
        accumulate = torch.promote_types(logits.dtype, torch.float32)
        weights_BN = logits.softmax(dim=-1, dtype=accumulate).mean(dim=1)[:, 0, 1:]
    kept_BK = best(weights_BN.detach(), keep)
    if watch is not None:
        watch(Removal(index, x, destinations(kept_BK, x.shape[1] - 1, fuse), weights_BN))
    parts = [x[:, :1], gather_tokens(x[:, 1:], kept_BK)]
    if fuse:
        parts.append(weighted_sum(x[:, 1:], weights_BN.scatter(1, kept_BK, 0.0)))
    return add_mlp(block, torch.cat(parts, dim=1))
