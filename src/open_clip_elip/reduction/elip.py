"""ELIP: at the start of each stage, the guided `[CLS]` decides which tokens go on.

Guo et al., "ELIP: Efficient Discriminative Language-Image Pre-training with Fewer Vision Tokens", Alg. 1.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .attention import check_attention
from .base import Layer, RunBlock, TokenReduction, register, run_plainly
from .config import ElipConfig
from .merge import keep_and_merge, norm
from .scoring import cls_attention


@register("elip")
class Elip(TokenReduction):
    """Runs a tower's blocks on fewer and fewer tokens."""

    Config, suffix, uses_text = ElipConfig, "-ELIP", True

    def __init__(self, config: ElipConfig, num_layers: int):
        super().__init__(config, num_layers)
        self.stages = config.stages(num_layers)

    def forward(
        self, blocks: Sequence[nn.Module], x: Tensor, guidance: Tensor | None = None, *,
        run: RunBlock = run_plainly, only_cls: bool = False, return_kept: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor | None]]:  # fmt: skip
        """As `TokenReduction.forward`. `run` calls a block, without gradients in the scoring pass.

        Args:
            guidance: detached here. None scores by vision alone (lam = 1).
            return_kept: also return which tokens each stage kept.

        Returns:
            (B, 1+K+1, D) after the last layer; with `return_kept` also, per stage, the kept positions (B, K) among the
            N patch tokens of the stage's input, or None where the stage kept all.
        """
        num_patches, kept_per_stage = x.shape[1] - 1, []
        for stage in self.stages:
            layers = [blocks[i] for i in range(stage.first, stage.first + stage.depth)]
            keep, kept = stage.keep(num_patches), None
            if x.shape[1] - 1 > keep:
                x, kept = keep_and_merge(x, self.score(layers, x, guidance, run), keep, self.config.merge)
            kept_per_stage.append(kept)
            for block in layers:
                x = run(block, x)
        return (x, kept_per_stage) if return_kept else x

    @torch.no_grad()
    def score(self, layers: Sequence[nn.Module], x: Tensor, guidance: Tensor | None, run: RunBlock) -> Tensor:
        """Scores (B, N) of the N patch tokens of `x` (B, 1+N, D) by the stage's own `layers` (Eq. 1 and 2)."""
        *before, last = layers[: self.config.scoring_depth]  # of the last, only the row of `[CLS]` is needed
        y = self.fuse(x, guidance)
        with no_weight_cache():
            for block in before:
                y = run(block, y)
            return read_row(last, y)

    def fuse(self, x: Tensor, guidance: Tensor | None) -> Tensor:
        """A copy of `x` whose `[CLS]` is lam * `[CLS]` + (1 - lam) * guidance (Eq. 1)."""
        if guidance is None or self.config.lam == 1:
            return x
        cls = x[:, 0]
        t_BD = guidance.detach().to(cls.dtype)
        if self.config.text_scale == "match":
            t_BD = t_BD * (norm(cls) / norm(t_BD).clamp_min(1e-12)).to(cls.dtype)
        fused = self.config.lam * cls + (1 - self.config.lam) * t_BD
        return torch.cat([fused.unsqueeze(1), x[:, 1:]], dim=1)

    def layers(self, num_patches: int) -> list[Layer]:
        layers, tokens = [], 1 + num_patches
        for stage in self.stages:
            keep = stage.keep(num_patches)
            if tokens - 1 > keep:
                tokens = 1 + keep + int(self.config.merge)
            layers += [Layer(tokens, tokens)] * stage.depth
        return layers


def no_weight_cache() -> torch.autocast:
    """For a pass without gradient: turns autocast's cache of weights off, which is one for all devices. From it the
    main path would take weights that were cast there, without a gradient."""
    return torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu"), cache_enabled=False)


def read_row(block: nn.Module, y: Tensor) -> Tensor:
    """`cls_attention`, of a sharded block too.

    Raises:
        ValueError: the block's attention was changed, so that what it attends to cannot be read from its weights.
    """
    if hasattr(block, "unshard"):
        return _cls_attention_of_sharded(block, y)
    check_attention(block, split=False)
    return cls_attention(block, y)


@torch.compiler.disable  # as are the hooks that do the same around the block's own forward
def _cls_attention_of_sharded(block: nn.Module, y: Tensor) -> Tensor:
    """`cls_attention` of a block that torch's `fully_shard` leaves its weights only during its own forward."""
    block.unshard()
    try:
        return cls_attention(block, y)
    finally:
        block.reshard()
