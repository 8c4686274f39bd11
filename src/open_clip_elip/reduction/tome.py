"""ToMe: in every layer, between attention and MLP, the r most similar pairs of tokens become one each.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, Sec. 3: bipartite soft matching on the keys (averaged
over the heads, cosine similarity), averages weighted by the number of patches that a token stands for, and
proportional attention, softmax(q k / sqrt(d) + log size).
"""
from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import add_attended, add_mlp, project, project_row
from .base import Layer, RunBlock, TokenReduction, nearest, register, rrt, run_plainly
from .merge import gather_tokens, norm
from .options import ReductionConfig, check_number, check_switch


@dataclass(frozen=True)
class TomeConfig(ReductionConfig):
    """
    Attributes:
        r: tokens that each layer merges away, one number, or one for each layer; what is more than a layer can merge
            (half of its patches) is cut. The default is 13, as in the source for 224 px and patches of 16.
        target_rrt: instead of `r`, the ratio of removed tokens to come as near to as possible, evenly over the layers.
        prop_attn: proportional attention. The source trains without it; Guo et al. compare with it.
    """

    alternatives = frozenset({"r", "target_rrt"})
    r: int | tuple[int, ...] | None = None
    target_rrt: float | None = None
    prop_attn: bool = True

    def __post_init__(self) -> None:
        if self._or_target("r", 13):
            if isinstance(self.r, (list, tuple)):
                for count in self.r:
                    check_number("r", count, 0, math.inf, "whole numbers of at least 0", whole=True)
                object.__setattr__(self, "r", tuple(self.r))
            else:
                check_number("r", self.r, 0, math.inf, "a whole number of at least 0, or a list of them", whole=True)
        check_switch("prop_attn", self.prop_attn)


@register("tome")
class Tome(TokenReduction):
    """Runs a tower's blocks with r tokens fewer after each."""

    Config, suffix = TomeConfig, "-ToMe"

    def __init__(self, config: TomeConfig, num_layers: int):
        super().__init__(config, num_layers)
        if isinstance(config.r, tuple) and len(config.r) != num_layers:
            raise ValueError(f"r has {len(config.r)} entries for the {num_layers} layers of the image tower.")

    def forward(
        self, blocks: Sequence[nn.Module], x: Tensor, guidance: Tensor | None = None, *,
        run: RunBlock = run_plainly, only_cls: bool = False,
    ) -> Tensor:  # fmt: skip
        size = None  # (B, L): patches that each token stands for; None while all are 1
        for block, layer in zip(blocks, self.layers(x.shape[1] - 1), strict=True):
            last = only_cls and block is blocks[-1]  # what [CLS] is there does not depend on what else is merged
            if layer.mlp < layer.attention and not last:
                function = functools.partial(_merge, r=layer.attention - layer.mlp, prop_attn=self.config.prop_attn)
                x, size = run(block, x, *(() if size is None else (size,)), function=function)
            elif size is not None and self.config.prop_attn:
                x = run(block, x, size, function=functools.partial(_attend_by_size, only_cls=last))
            else:
                x = run(block, x)
        return x

    def layers(self, num_patches: int) -> list[Layer]:
        return self._layers(num_patches, self.schedule(num_patches))

    def schedule(self, num_patches: int) -> tuple[int, ...]:
        """r of each layer: as configured, or even to within one, so that it meets `target_rrt`."""
        if self.config.r is not None:
            return self.config.r if isinstance(self.config.r, tuple) else (self.config.r,) * self.num_layers

        def spread(total: int) -> tuple[int, ...]:
            borders = [total * i // self.num_layers for i in range(self.num_layers + 1)]
            return tuple(b - a for a, b in zip(borders, borders[1:], strict=False))

        def ratio(total: int) -> float:
            return rrt(self._layers(num_patches, spread(total)), num_patches)

        most = self.num_layers * ((num_patches + 1) // 2)  # each layer merges all it can
        return spread(nearest(self.config.target_rrt, ratio, most))

    def _layers(self, num_patches: int, r: tuple[int, ...]) -> list[Layer]:
        tokens, layers = 1 + num_patches, []
        for count in r:
            after = tokens - min(count, (tokens - 1) // 2)
            layers.append(Layer(tokens, after))
            tokens = after
        return layers


def _merge(block: nn.Module, x: Tensor, size: Tensor | None = None, *, r: int, prop_attn: bool) -> tuple[Tensor, ...]:
    """The block on `x` (B, L, D) with tokens merged: (B, L-r, D), and their sizes (B, L-r)."""
    q, k, v = project(block, x)
    bias = _log_size(size, q) if prop_attn else None
    x = add_attended(block, x, F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
    match = soft_match(k.detach().mean(dim=1), r)
    if size is None:
        size = torch.ones(x.shape[:2], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    merged_size = merge(size.unsqueeze(-1), *match)
    x = merge(x * size.unsqueeze(-1).to(x.dtype), *match) / merged_size.to(x.dtype)
    return add_mlp(block, x), merged_size.squeeze(-1)


def _attend_by_size(block: nn.Module, x: Tensor, size: Tensor, *, only_cls: bool = False) -> Tensor:
    """The block without merging, (B, L, D), or `[CLS]` after it, (B, 1, D)."""
    q, k, v = project_row(block, x) if only_cls else project(block, x)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=_log_size(size, q))
    return add_mlp(block, add_attended(block, x[:, :1] if only_cls else x, attended))


def _log_size(size: Tensor | None, q: Tensor) -> Tensor | None:
    """What proportional attention adds to the logits, (B, 1, 1, L)."""
    return None if size is None else size.log().to(q.dtype)[:, None, None]


@torch.no_grad()
def soft_match(keys: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens merge: tokens alternate between two sets, A and B; each of A finds the most similar of B, and the r
    most similar pairs merge into the one of B. `[CLS]`, the first of A, stays.

    Args:
        keys: (B, L, d).
        r: at most half of the L - 1 others.

    Returns:
        positions in A that stay, (B, |A|-r), ascending; positions in A that go, (B, r); where in B those go, (B, r).
    """
    keys = keys / norm(keys).clamp_min(1e-12).to(keys.dtype)
    similarity = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    similarity[:, 0] = -math.inf
    best, partner = similarity.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    go = order[:, :r]
    return order[:, r:].sort(dim=-1).values, go, partner.gather(1, go)


def merge(x: Tensor, stay: Tensor, go: Tensor, into: Tensor) -> Tensor:
    """(B, L, D) to (B, L-r, D): sums of what `soft_match` brings together; A's rest first, with `[CLS]`, then B."""
    a, b = x[:, ::2], x[:, 1::2]
    b = b.scatter_add(1, into.unsqueeze(-1).expand(-1, -1, x.shape[-1]), gather_tokens(a, go))
    return torch.cat([gather_tokens(a, stay), b], dim=1)
