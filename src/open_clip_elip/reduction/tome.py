"""ToMe: in every layer, between attention and MLP, the r most similar pairs of tokens become one each.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, Sec. 3: bipartite soft matching on the keys (averaged
over the heads, cosine similarity), averages weighted by the number of patches that a token stands for, and
proportional attention, softmax(q k / sqrt(d) + log size).
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import add_mlp, attend, project, project_row
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
from .merge import gather_tokens, norm


@dataclass(frozen=True)
class TomeConfig(ReductionConfig):
    alternatives = ("r", "target_rrt")
    # Tokens that each layer merges away, one number, or one for each layer, up to half of its patches. The default is
    # 13, as in the source for 224 px and patches of 16.
    r: int | tuple[int, ...] | None = None
    target_rrt: float | None = None  # instead of it, the ratio of removed tokens to come near to, evenly
    prop_attn: bool = True  # proportional attention; the source trains without it, Guo et al. compare with it

    def __post_init__(self) -> None:
        if self._choose(13) == "r":
            if isinstance(self.r, (list, tuple)):
                self._set_numbers("r", 0, "whole numbers of at least 0")
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

    def forward(self, blocks, x, guidance=None, *, run=run_plainly, only_cls=False):
        size = None  # (B, L): patches that each token stands for; None while all are 1
        for index, (block, layer) in enumerate(zip(blocks, self.layers(x.shape[1] - 1), strict=True)):
            last = only_cls and block is blocks[-1]  # what [CLS] is there does not depend on what else is merged
            if layer.mlp < layer.attention and not last:
                function = functools.partial(
                    _merge, r=layer.attention - layer.mlp, prop_attn=self.config.prop_attn,
                    index=index, watch=self.watch,
                )  # fmt: skip
                x, size = run(block, x, *(() if size is None else (size,)), function=function)
            elif size is not None and self.config.prop_attn:
                x = run(block, x, size, function=functools.partial(_attend_by_size, only_cls=last))
            else:
                x = run(block, x)
        return x

    def layers(self, num_patches: int) -> list[Layer]:
        if self.config.r is not None:
            even = not isinstance(self.config.r, tuple)
            return self._layers(num_patches, (self.config.r,) * self.num_layers if even else self.config.r)

        def spread(total: int) -> list[Layer]:
            borders = [total * i // self.num_layers for i in range(self.num_layers + 1)]
            return self._layers(num_patches, [borders[i + 1] - borders[i] for i in range(self.num_layers)])

        most = self.num_layers * ((num_patches + 1) // 2)  # each layer merges all it can
        return meet(self.config.target_rrt, spread, most, num_patches)

    def _layers(self, num_patches: int, r: Sequence[int]) -> list[Layer]:
        tokens, layers = 1 + num_patches, []
        for count in r:
            after = tokens - min(count, (tokens - 1) // 2)
            layers.append(Layer(tokens, after))
            tokens = after
        return layers


def _merge(
    block: nn.Module, x: Tensor, size: Tensor | None = None, *, r: int, prop_attn: bool, index: int,
    watch: Callable | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The block on `x` (B, L, D) with tokens merged: (B, L-r, D), and their sizes (B, L-r). `index`: of the block, for
    `TokenReduction.watch`."""
    q, k, v = project(block, x)
    x = attend(block, x, q, k, v, attn_mask=_log_size(size, q) if prop_attn else None)
    match = soft_match(k.detach().mean(dim=1), r)
    if watch is not None:
        watch(Removal(index, x, destinations(x.shape[1], *match)[:, 1:] - 1))
    if size is None:
        size = torch.ones(x.shape[:2], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    merged_size = merge(size.unsqueeze(-1), *match)
    x = merge(x * size.unsqueeze(-1).to(x.dtype), *match) / merged_size.to(x.dtype)
    return add_mlp(block, x), merged_size.squeeze(-1)


def _attend_by_size(block: nn.Module, x: Tensor, size: Tensor, *, only_cls: bool = False) -> Tensor:
    """The block without merging, (B, L, D), or `[CLS]` after it, (B, 1, D)."""
    q, k, v = project_row(block, x) if only_cls else project(block, x)
    return add_mlp(block, attend(block, x[:, :1] if only_cls else x, q, k, v, attn_mask=_log_size(size, q)))


def _log_size(size: Tensor | None, q: Tensor) -> Tensor | None:
    """What proportional attention adds to the logits, (B, 1, 1, L)."""
    return None if size is None else size.log().to(q.dtype)[:, None, None]


@torch.no_grad()
def soft_match(keys: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens merge, by `keys` (B, L, d): tokens alternate between two sets, A and B; each of A finds the most
    similar of B, and the r most similar pairs, at most (L - 1) // 2, merge into the one of B. `[CLS]` of A stays.

    Returns positions in A that stay, (B, |A|-r), ascending, that go, (B, r), and where in B those go, (B, r).
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


def destinations(count: int, stay: Tensor, go: Tensor, into: Tensor) -> Tensor:
    """(B, L): where each of `count` = L tokens is in what `merge` makes of them."""
    rest = stay.shape[1]
    found = stay.new_empty(len(stay), count)
    a, b = found[:, ::2], found[:, 1::2]
    a.scatter_(1, stay, torch.arange(rest, device=stay.device).expand_as(stay)).scatter_(1, go, rest + into)
    b.copy_(torch.arange(rest, rest + b.shape[1], device=stay.device))
    return found
