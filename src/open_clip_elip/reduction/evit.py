"""EViT: at a few layers, between attention and MLP, the tokens that `[CLS]` attends to least become one.

Liang et al., "Not All Patches Are What You Need: Expediting Vision Transformers via Token Reorganizations", ICLR 2022,
Sec. 3.1 and 3.2: attentive tokens are kept, the others are fused into x = sum_i a_i x_i (Eq. 4), where a_i is the
attention of `[CLS]` in that layer, averaged over the heads.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import add_attended, add_mlp, cls_row, project
from .base import Layer, RunBlock, TokenReduction, nearest, register, rrt, run_plainly
from .merge import best, gather_tokens, weighted_sum
from .options import ReductionConfig, check_number, check_switch

DEPTH, LAYERS = 12, (4, 7, 10)  # of the source, for a tower of 12 layers
RATES = 1_000_000  # tried for `target_rrt`


@dataclass(frozen=True)
class EvitConfig(ReductionConfig):
    """
    Attributes:
        keep_rate: share of the present patches (a fused token counts as one) that each reducing layer keeps.
        target_rrt: instead of `keep_rate`, the ratio of removed tokens to come as near to as possible.
        layers: the reducing layers, 1-based. None: the source's 4, 7, 10, in proportion to the tower's depth.
        fuse: add the fused token; False = drop the inattentive tokens.
    """

    alternatives = frozenset({"keep_rate", "target_rrt"})
    keep_rate: float | None = None
    target_rrt: float | None = None
    layers: tuple[int, ...] | None = None
    fuse: bool = True

    def __post_init__(self) -> None:
        if self._or_target("keep_rate", 0.7):
            check_number("keep_rate", self.keep_rate, 1e-6, 1, "a number in (0, 1]")
        if self.layers is not None:
            if not isinstance(self.layers, (list, tuple)) or not self.layers:
                raise ValueError(f"layers must be a list of layers, 1-based; got {self.layers!r}.")
            for layer in self.layers:
                check_number("layers", layer, 1, math.inf, "whole numbers, 1 or more", whole=True)
            if list(self.layers) != sorted(set(self.layers)):
                raise ValueError(f"layers must ascend; got {list(self.layers)}.")
            object.__setattr__(self, "layers", tuple(self.layers))
        check_switch("fuse", self.fuse)


@register("evit")
class Evit(TokenReduction):
    """Runs a tower's blocks with fewer tokens after each reducing layer.

    A layer that would fuse a single token is left as it is: that would change the token and save none.
    """

    Config, suffix = EvitConfig, "-EViT"

    def __init__(self, config: EvitConfig, num_layers: int):
        super().__init__(config, num_layers)
        layers = config.layers or tuple(dict.fromkeys(max(1, round(i * num_layers / DEPTH)) for i in LAYERS))
        if layers[-1] > num_layers:
            raise ValueError(f"layers {list(layers)} go beyond the {num_layers} layers of the image tower.")
        self.reducing = frozenset(layer - 1 for layer in layers)

    def forward(
        self, blocks: Sequence[nn.Module], x: Tensor, guidance: Tensor | None = None, *,
        run: RunBlock = run_plainly, only_cls: bool = False,
    ) -> Tensor:  # fmt: skip
        for block, layer in zip(blocks, self.layers(x.shape[1] - 1), strict=True):
            last = only_cls and block is blocks[-1]  # what [CLS] is there does not depend on who else leaves the layer
            if layer.mlp < layer.attention and not last:
                keep = layer.mlp - 1 - self.config.fuse
                x = run(block, x, function=functools.partial(_reduce, keep=keep, fuse=self.config.fuse))
            else:
                x = run(block, x)
        return x

    def layers(self, num_patches: int) -> list[Layer]:
        return self._layers(num_patches, self.keep_rate(num_patches))

    def keep_rate(self, num_patches: int) -> float:
        """The configured one, or the one that meets `target_rrt` for this number of patches."""
        if self.config.keep_rate is not None:
            return self.config.keep_rate

        def ratio(step: int) -> float:
            return rrt(self._layers(num_patches, 1 - step / RATES), num_patches)

        return 1 - nearest(self.config.target_rrt, ratio, RATES - 1) / RATES

    def _layers(self, num_patches: int, keep_rate: float) -> list[Layer]:
        tokens, layers = 1 + num_patches, []
        for index in range(self.num_layers):
            left = 1 + max(1, math.ceil(keep_rate * (tokens - 1) - 1e-9)) + self.config.fuse
            after = left if index in self.reducing and left < tokens else tokens
            layers.append(Layer(tokens, after))
            tokens = after
        return layers


def _reduce(block: nn.Module, x: Tensor, *, keep: int, fuse: bool) -> Tensor:
    """The block on `x` (B, 1+N, D), with `[CLS]`, `keep` patches in their order and the fused token behind them.

    Gradient flows through the fusing weights, as in the source, not through the choice.
    """
    q, k, v = project(block, x)
    x = add_attended(block, x, F.scaled_dot_product_attention(q, k, v))
    with torch.set_grad_enabled(fuse and torch.is_grad_enabled()):
        weights_BN = cls_row(q, k)
    kept_BK = best(weights_BN.detach(), keep)
    parts = [x[:, :1], gather_tokens(x[:, 1:], kept_BK)]
    if fuse:
        parts.append(weighted_sum(x[:, 1:], weights_BN.scatter(1, kept_BK, 0.0)))
    return add_mlp(block, torch.cat(parts, dim=1))
