"""Adaptive ELIP: how many tokens an image keeps follows from how its attention is spread; the batch keeps to a budget.

The paper fixes the number for all images. Here each stage ranks the tokens of an image by score, as ELIP does, and asks
of each token how much of the image's attention those above it hold already. The tokens of the whole batch with the
lowest answers stay, B * K of them: an image whose attention sits on few tokens keeps few, one whose attention is
spread keeps many, and the mean is K. How many one image keeps so depends on the others of its batch: on the batch size,
the number of processes and `--accum-freq`, for each micro-batch of each process keeps to the budget by itself.

The images then differ in length. What takes a matrix product runs on the B * (K+2) tokens one behind the other, packed,
without any padding; only between the tokens of an image, in the attention itself, are they padded to the longest that
an image may have.
"""
from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import add_mlp, query_and_rest, split_heads
from .base import LayerWork, RunBlock, check_number, run_plainly
from .config import ElipConfig
from .elip import Elip, no_weight_cache, read_row
from .merge import weighted_sum


@dataclass(frozen=True)
class AdaptiveConfig(ElipConfig):
    """ELIP's options, of which `keep_ratio` and `keep_count` are now the mean over a batch, and

    Attributes:
        spread: an image keeps from (1 - spread) to (1 + spread) times the mean.

    Raises:
        ValueError: an option is out of its range, or no merging.
    """

    spread: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("spread", self.spread, 0, 1, "a number from 0 to 1")
        if not self.merge:
            raise ValueError("merge must be true for the adaptive method: the merged token is part of its budget.")


class Layout(NamedTuple):
    """Where the T packed tokens of B images are, were they padded to `length` each. The first B are the `[CLS]`.

    Attributes:
        slot: (T,) place of each token, image * length + position.
        source: (B, length) which token is there; padding points to token 0.
        mask: (B, length) False for padding.
    """

    slot: Tensor
    source: Tensor
    mask: Tensor

    @classmethod
    def of(cls, slot: Tensor, batch: int, length: int) -> Layout:
        source = torch.zeros(batch * length, dtype=torch.long, device=slot.device)
        source = source.scatter(0, slot, torch.arange(len(slot), device=slot.device))
        mask = torch.zeros(batch * length, dtype=torch.bool, device=slot.device).scatter(0, slot, True)
        return cls(slot, source.view(batch, length), mask.view(batch, length))

    def pad(self, rows: Tensor) -> Tensor:
        """(T, D) to (B, length, D)."""
        return rows.index_select(0, self.source.flatten()).view(*self.source.shape, -1)


class AdaptiveElip(Elip):
    """Runs a tower's blocks on tokens whose number differs from image to image.

    Raises:
        ValueError: the stages do not fit the depth.
    """

    works_alone = False
    needs_cls = True

    def forward(
        self,
        blocks: Sequence[nn.Module],
        x: Tensor,
        guidance: Tensor | None = None,
        *,
        run: RunBlock = run_plainly,
        only_cls: bool = True,
    ) -> Tensor:
        """As `TokenReduction.forward`; returns `[CLS]` alone, (B, 1, D)."""
        batch, num_patches = len(x), x.shape[1] - 1
        rows, layout, tokens = x, None, 1 + num_patches  # not packed before the first reduction
        for stage, (keep, low, high) in zip(self.stages, self.limits(num_patches), strict=True):
            layers = [blocks[i] for i in range(stage.first, stage.first + stage.depth)]
            if tokens - 1 > keep:
                if layout is None:
                    scores, padded, mask = self.score(layers, rows, guidance, run), rows, None
                else:
                    scores = self.score_packed(layers, rows, layout, guidance, run)
                    padded, mask = layout.pad(rows), layout.mask[:, 1:]
                rows, layout = pack(padded, scores, mask, choose(scores, mask, keep, low, high), keep, high + 2)
                tokens = 1 + keep + 1
            for block in layers:
                if layout is None:
                    rows = run(block, rows)
                else:
                    function = _run_cls if only_cls and block is blocks[-1] else _run_packed
                    rows = run(block, rows, function=functools.partial(function, layout=layout))
        return rows[:, :1] if layout is None else rows[:batch].unsqueeze(1)

    @torch.no_grad()
    def score_packed(
        self, layers: Sequence[nn.Module], rows: Tensor, layout: Layout, guidance: Tensor | None, run: RunBlock
    ) -> Tensor:
        """As `score`, for packed tokens (T, D): (B, length - 1), 0 for padding."""
        scored, batch = self.scored_layers(layers), len(layout.mask)
        y = torch.cat([self.fuse_cls(rows[:batch], guidance), rows[batch:]])
        with no_weight_cache():
            for block in scored[:-1]:
                y = run(block, y, function=functools.partial(_run_packed, layout=layout))
            return read_row(scored[-1], layout.pad(y), layout.mask)

    def limits(self, num_patches: int) -> list[tuple[int, int, int]]:
        """Of each stage, the mean number of patches that an image keeps, the fewest and the most.

        No image keeps fewer than the mean of the next smaller stage, so that stage can always meet its budget.
        """
        keeps = [stage.keep(num_patches) for stage in self.stages]
        limits = []
        for i, keep in enumerate(keeps):
            spread = int(self.config.spread * keep)
            next_smaller = next((k for k in keeps[i:] if k < keep), 1)
            limits.append((keep, max(keep - spread, next_smaller), min(keep + spread, num_patches - 1)))
        return limits

    def work(self, num_patches: int) -> list[LayerWork]:
        work, tokens, padded = [], 1 + num_patches, None
        for stage, (keep, _, high) in zip(self.stages, self.limits(num_patches), strict=True):
            before, padded_before, scored = tokens, padded, 0
            if tokens - 1 > keep:
                tokens, padded = 1 + keep + 1, high + 2
                scored = len(self.scored_layers(range(stage.depth)))
            for i in range(stage.depth):
                work.append(
                    LayerWork(
                        tokens,
                        tokens,
                        padded=padded,
                        chosen_from=(padded_before or before) if scored and i == 0 else 0,
                        scored=before if i < scored - 1 else 0,
                        scored_row=(padded_before or before) if i == scored - 1 else 0,
                        scored_padded=padded_before,
                    )
                )
        return work


@torch.no_grad()
def choose(scores: Tensor, mask: Tensor | None, keep: int, low: int, high: int) -> Tensor:
    """Which tokens of the batch stay: (B, N) True for B * `keep` of them, from `low` to `high` in each image.

    In each image at least one token is left for the merged token.

    Args:
        scores: (B, N), not negative.
        mask: (B, N) False for padding.
    """
    batch, length = scores.shape
    if mask is not None:
        scores = scores.masked_fill(~mask, -1.0)
    ranked, order = scores.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(length, device=scores.device)
    there = length if mask is None else mask.sum(dim=1, keepdim=True)
    mass = (ranked.clamp_min(0) + torch.finfo(scores.dtype).tiny).masked_fill(rank >= there, 0.0)
    mass = mass / mass.sum(dim=1, keepdim=True)
    # All but what those above hold: added up from the smallest, as 1 minus that would be 0 behind a sharp attention.
    rest = mass.flip(1).cumsum(dim=1).flip(1)
    rest = rest.masked_fill(rank < low, 2.0)
    rest = rest.masked_fill((rank >= high) | (rank >= there - 1), -1.0)
    stays = rest.flatten().topk(batch * keep, sorted=False).indices
    chosen = torch.zeros(batch * length, dtype=torch.bool, device=scores.device).scatter(0, stays, True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, chosen.view(batch, length))


def pack(
    x: Tensor, scores: Tensor, mask: Tensor | None, chosen: Tensor, keep: int, length: int
) -> tuple[Tensor, Layout]:
    """`[CLS]`, the chosen patches in their order, and the others merged by their scores (Eq. 4), of each image.

    Args:
        x: (B, 1+N, D), `[CLS]` first.
        scores, chosen: (B, N).
        mask: (B, N) False for padding.
        keep: chosen in an image on average; the batch has B * keep.
        length: of the padded batch.

    Returns:
        (B * (keep + 2), D), and where they are.
    """
    batch, num_patches = scores.shape
    cls, patches = x[:, 0], x[:, 1:]
    # Of a fixed number, so that nothing waits for the device and compiled graphs have one shape.
    flat = chosen.flatten().to(torch.uint8).argsort(descending=True, stable=True)[: batch * keep]
    image, counts = flat // num_patches, chosen.sum(dim=1)
    position = torch.arange(batch * keep, device=x.device) - (counts.cumsum(0) - counts)[image]
    start = torch.arange(batch, device=x.device) * length
    slot = torch.cat([start, start[image] + 1 + position, start + 1 + counts])

    weights = (scores + torch.finfo(scores.dtype).tiny).masked_fill(chosen if mask is None else chosen | ~mask, 0.0)
    merged = weighted_sum(patches, weights / weights.sum(dim=1, keepdim=True))
    kept = patches.reshape(-1, patches.shape[-1]).index_select(0, flat)
    return torch.cat([cls, kept, merged[:, 0]]), Layout.of(slot, batch, length)


def _run_packed(block: nn.Module, rows: Tensor, *, layout: Layout) -> Tensor:
    """The block on packed tokens, (T, D) to (T, D)."""
    attn = block.attn
    qkv = layout.pad(F.linear(block.ln_1(rows), attn.in_proj_weight, attn.in_proj_bias))
    q, k, v = split_heads(qkv, 3, attn.num_heads)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask[:, None, None])
    attended = attended.transpose(1, 2).reshape(-1, attn.embed_dim).index_select(0, layout.slot)
    return add_mlp(block, rows + block.ls_1(attn.out_proj(attended)))


def _run_cls(block: nn.Module, rows: Tensor, *, layout: Layout) -> Tensor:
    """`[CLS]` after the block, (B, D)."""
    attn, batch = block.attn, len(layout.mask)
    h = block.ln_1(rows)
    (w_q, b_q), (w_kv, b_kv) = query_and_rest(attn)
    (q,) = split_heads(F.linear(h[:batch, None], w_q, b_q), 1, attn.num_heads)
    k, v = split_heads(layout.pad(F.linear(h, w_kv, b_kv)), 2, attn.num_heads)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask[:, None, None])
    return add_mlp(block, rows[:batch] + block.ls_1(attn.out_proj(attended.flatten(1))))
