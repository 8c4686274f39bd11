"""Random dropping at the input: each image trains on a random part of its patches, none at all in evaluation.

Li et al., "Scaling Language-Image Pre-training via Masking" (FLIP), CVPR 2023, Sec. 3: half of the patches, and a last
stretch of training with all of them (the trainer's `--full-tokens-last`).
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import Layer, ReductionConfig, Removal, TokenReduction, check_number, register, run_plainly
from .merge import best, destinations, gather_tokens


@dataclass(frozen=True)
class RandomDropConfig(ReductionConfig):
    alternatives = ("keep_ratio", "target_rrt")
    keep_ratio: float | None = None  # share of the patches to keep; the default is FLIP's 0.5
    target_rrt: float | None = None  # instead of it, the ratio of removed tokens to come as near to as possible

    def __post_init__(self) -> None:
        if self._choose(0.5) == "keep_ratio":
            check_number("keep_ratio", self.keep_ratio, 1e-6, 1, "a number in (0, 1]")


@register("random")
class RandomDrop(TokenReduction):
    """Runs a tower's blocks on a random part of the patches, drawn from torch's generator of the device."""

    Config, suffix, works_alone = RandomDropConfig, "-Random", False

    def forward(self, blocks, x, guidance=None, *, run=run_plainly, only_cls=False):
        num_patches = x.shape[1] - 1
        keep = self.keep(num_patches)
        if keep < num_patches:
            kept_BK = best(torch.rand(x.shape[0], num_patches, device=x.device), keep)
            if self.watch is not None:
                self.watch(Removal(0, x, destinations(kept_BK, num_patches, merge=False)))
            x = torch.cat([x[:, :1], gather_tokens(x[:, 1:], kept_BK)], dim=1)
        for block in blocks:
            x = run(block, x)
        return x

    def keep(self, num_patches: int) -> int:
        """K of M = `num_patches`."""
        if self.config.keep_ratio is not None:
            return max(1, int(self.config.keep_ratio * num_patches))
        return max(1, min(num_patches, round((1 - self.config.target_rrt) * (1 + num_patches) - 1)))

    def layers(self, num_patches: int) -> list[Layer]:
        tokens = 1 + self.keep(num_patches)
        return [Layer(tokens, tokens)] * self.num_layers
