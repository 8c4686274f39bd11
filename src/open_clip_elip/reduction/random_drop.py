"""Random dropping at the input: each image trains on a random part of its patches, none at all in evaluation.

Li et al., "Scaling Language-Image Pre-training via Masking" (FLIP), CVPR 2023, Sec. 3: half of the patches, and a last
stretch of training with all of them (the trainer's `--full-tokens-last`).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import Layer, RunBlock, TokenReduction, register, run_plainly
from .merge import best, gather_tokens
from .options import ReductionConfig, check_number


@dataclass(frozen=True)
class RandomDropConfig(ReductionConfig):
    """
    Attributes:
        keep_ratio: share of the patches to keep. The default is FLIP's 0.5.
        target_rrt: instead of `keep_ratio`, the ratio of removed tokens to come as near to as possible.
    """

    alternatives = frozenset({"keep_ratio", "target_rrt"})
    keep_ratio: float | None = None
    target_rrt: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.keep_ratio, (list, tuple)):  # as ELIP's option of this name, which has one entry a stage
            if len(self.keep_ratio) != 1:
                raise ValueError(f"keep_ratio is one number for random dropping; got {list(self.keep_ratio)}.")
            object.__setattr__(self, "keep_ratio", self.keep_ratio[0])
        if self._or_target("keep_ratio", 0.5):
            check_number("keep_ratio", self.keep_ratio, 1e-6, 1, "a number in (0, 1]")


@register("random")
class RandomDrop(TokenReduction):
    """Runs a tower's blocks on a random part of the patches, drawn from torch's generator of the device."""

    Config, suffix, works_alone = RandomDropConfig, "-Random", False

    def forward(
        self, blocks: Sequence[nn.Module], x: Tensor, guidance: Tensor | None = None, *,
        run: RunBlock = run_plainly, only_cls: bool = False,
    ) -> Tensor:  # fmt: skip
        num_patches = x.shape[1] - 1
        keep = self.keep(num_patches)
        if keep < num_patches:
            kept_BK = best(torch.rand(x.shape[0], num_patches, device=x.device), keep)
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
