"""ELIP: at the start of each stage, the guided `[CLS]` decides which tokens go on.

Guo et al., "ELIP: Efficient Discriminative Language-Image Pre-training with Fewer Vision Tokens", Alg. 1.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import LayerWork, RunBlock, TokenReduction, norm, run_plainly
from .config import ElipConfig
from .merge import keep_and_merge
from .scoring import cls_attention


class Elip(TokenReduction):
    """Runs a tower's blocks on fewer and fewer tokens.

    Args:
        config: what to keep and where.
        num_layers: depth of the tower.

    Raises:
        ValueError: the stages do not fit the depth.
    """

    uses_text = True

    def __init__(self, config: ElipConfig, num_layers: int):
        super().__init__(config, num_layers)
        self.stages = config.stages(num_layers)

    def forward(
        self,
        blocks: Sequence[nn.Module],
        x: Tensor,
        guidance: Tensor | None = None,
        *,
        run: RunBlock = run_plainly,
        only_cls: bool = False,
        return_kept: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor | None]]:
        """
        Args:
            blocks: the tower's layers; each maps (B, L, D) to (B, L, D) for any L.
            x: (B, 1+M, D), input of the first layer, `[CLS]` first.
            guidance: (B, D) text vector at the tower's width; detached here. None scores by vision alone (lam = 1).
            run: calls a block, with gradients in the main path and without in the scoring pass; default `block(x)`.
            only_cls: nothing but `[CLS]` of the last layer is used.
            return_kept: also return which tokens each stage kept.

        Returns:
            (B, 1+K+1, D) after the last layer; with `return_kept` also, per stage, the kept positions (B, K) among the
            N patch tokens of the stage's input, or None where the stage kept all.
        """
        num_patches = x.shape[1] - 1
        kept_per_stage = []
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
    def score(
        self, layers: Sequence[nn.Module], x: Tensor, guidance: Tensor | None, run: RunBlock = run_plainly
    ) -> Tensor:
        """Scores (B, N) of the N patch tokens of `x` (B, 1+N, D) by the stage's own `layers` (Eq. 1 and 2)."""
        scored = self.scored_layers(layers)
        y = self.fuse(x, guidance)
        with no_weight_cache():
            for block in scored[:-1]:
                y = run(block, y)
            return read_row(scored[-1], y)

    def scored_layers(self, layers: Sequence[nn.Module]) -> Sequence[nn.Module]:
        """Those of a stage's layers that the scoring pass goes through; of the last one only the row of `[CLS]`."""
        return layers[: self.config.scoring_depth] if self.config.scoring_depth else layers

    def fuse(self, x: Tensor, guidance: Tensor | None) -> Tensor:
        """A copy of `x` whose `[CLS]` is lam * `[CLS]` + (1 - lam) * guidance (Eq. 1)."""
        if guidance is None or self.config.lam == 1:
            return x
        return torch.cat([self.fuse_cls(x[:, 0], guidance).unsqueeze(1), x[:, 1:]], dim=1)

    def fuse_cls(self, cls: Tensor, guidance: Tensor | None) -> Tensor:
        """Eq. 1, for `[CLS]` (B, D)."""
        if guidance is None or self.config.lam == 1:
            return cls
        t_BD = guidance.detach().to(cls.dtype)
        if self.config.text_scale == "match":
            t_BD = t_BD * (norm(cls) / norm(t_BD).clamp_min(1e-12)).to(cls.dtype)
        return self.config.lam * cls + (1 - self.config.lam) * t_BD

    def work(self, num_patches: int) -> list[LayerWork]:
        work, tokens = [], 1 + num_patches
        for stage in self.stages:
            before, keep = tokens, stage.keep(num_patches)
            reduces = tokens - 1 > keep
            if reduces:
                tokens = 1 + keep + int(self.config.merge)
            scored = len(self.scored_layers(range(stage.depth))) if reduces else 0
            for i in range(stage.depth):
                work.append(
                    LayerWork(
                        tokens,
                        tokens,
                        chosen_from=before if reduces and i == 0 else 0,
                        scored=before if i < scored - 1 else 0,
                        scored_row=before if i == scored - 1 else 0,
                    )
                )
        return work


def no_weight_cache() -> torch.autocast:
    """For a pass without gradient: turns autocast's cache of weights off, which is one for all devices. From it the
    main path would take weights that were cast there, without a gradient."""
    return torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu"), cache_enabled=False)


def read_row(block: nn.Module, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """`cls_attention`, of a sharded block too."""
    read = _cls_attention_of_sharded if hasattr(block, "unshard") else cls_attention
    return read(block, y, mask)


@torch.compiler.disable  # as are the hooks that do the same around the block's own forward
def _cls_attention_of_sharded(block: nn.Module, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """`cls_attention` of a block that torch's `fully_shard` leaves its weights only during its own forward."""
    block.unshard()
    try:
        return cls_attention(block, y, mask)
    finally:
        block.reshard()
