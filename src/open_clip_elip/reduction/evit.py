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
from .base import (
    LayerWork,
    ReductionConfig,
    RunBlock,
    TokenReduction,
    check_number,
    check_switch,
    gather_tokens,
    nearest,
    rrt,
    run_plainly,
)
from .merge import best, weighted_sum

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

    Raises:
        ValueError: an option is out of its range.
    """

    keep_rate: float | None = None
    target_rrt: float | None = None
    layers: tuple[int, ...] | None = None
    fuse: bool = True

    def __post_init__(self) -> None:
        if self.keep_rate is not None and self.target_rrt is not None:
            raise ValueError("Give either keep_rate or target_rrt, not both.")
        if self.keep_rate is None and self.target_rrt is None:
            object.__setattr__(self, "keep_rate", 0.7)
        if self.keep_rate is not None:
            check_number("keep_rate", self.keep_rate, 1e-6, 1, "a number in (0, 1]")
        else:
            check_number("target_rrt", self.target_rrt, 0, 0.95, "a number from 0 to 0.95")
        if self.layers is not None:
            if not isinstance(self.layers, (list, tuple)) or not self.layers:
                raise ValueError(f"layers must be a list of layers, 1-based; got {self.layers!r}.")
            for layer in self.layers:
                check_number("layers", layer, 1, math.inf, "whole numbers, 1 or more", whole=True)
            if list(self.layers) != sorted(set(self.layers)):
                raise ValueError(f"layers must ascend; got {list(self.layers)}.")
            object.__setattr__(self, "layers", tuple(self.layers))
        check_switch("fuse", self.fuse)


class Evit(TokenReduction):
    """Runs a tower's blocks with fewer tokens after each reducing layer.

    A layer that would fuse a single token is left as it is: that would change the token and save none.

    Raises:
        ValueError: a reducing layer that the tower does not have.
    """

    def __init__(self, config: EvitConfig, num_layers: int):
        super().__init__(config, num_layers)
        layers = config.layers or tuple(dict.fromkeys(max(1, round(i * num_layers / DEPTH)) for i in LAYERS))
        if layers[-1] > num_layers:
            raise ValueError(f"layers {list(layers)} go beyond the {num_layers} layers of the image tower.")
        self.layers = frozenset(layer - 1 for layer in layers)

    def forward(
        self,
        blocks: Sequence[nn.Module],
        x: Tensor,
        guidance: Tensor | None = None,
        *,
        run: RunBlock = run_plainly,
        only_cls: bool = False,
    ) -> Tensor:
        for block, layer in zip(blocks, self.work(x.shape[1] - 1), strict=True):
            last = only_cls and block is blocks[-1]  # what [CLS] is there does not depend on who else leaves the layer
            if layer.chosen_from and not last:
                x = run(block, x, function=functools.partial(_reduce, keep=self._keep(layer), fuse=self.config.fuse))
            else:
                x = run(block, x)
        return x

    def work(self, num_patches: int) -> list[LayerWork]:
        return self._work(num_patches, self.keep_rate(num_patches))

    def keep_rate(self, num_patches: int) -> float:
        """The configured one, or the one that meets `target_rrt` for this number of patches."""
        if self.config.keep_rate is not None:
            return self.config.keep_rate

        def ratio(step: int) -> float:
            return rrt(self._work(num_patches, 1 - step / RATES), num_patches)

        return 1 - nearest(self.config.target_rrt, ratio, RATES - 1) / RATES

    def _work(self, num_patches: int, keep_rate: float) -> list[LayerWork]:
        tokens, work = 1 + num_patches, []
        for index in range(self.num_layers):
            left = 1 + max(1, math.ceil(keep_rate * (tokens - 1) - 1e-9)) + self.config.fuse
            if index in self.layers and left < tokens:
                row = {"cls_row" if self.config.fuse else "cls_row_scored": tokens}
                work.append(LayerWork(tokens, left, chosen_from=tokens, **row))
                tokens = left
            else:
                work.append(LayerWork(tokens, tokens))
        return work

    def _keep(self, layer: LayerWork) -> int:
        return layer.mlp - 1 - self.config.fuse


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
