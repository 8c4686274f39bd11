"""ELIP: at the start of each stage, the guided `[CLS]` decides which tokens go on.

Guo et al., "ELIP: Efficient Discriminative Language-Image Pre-training with Fewer Vision Tokens", Alg. 1.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .config import ElipConfig
from .merge import keep_and_merge
from .scoring import cls_attention

RunBlock = Callable[[nn.Module, Tensor], Tensor]


class Elip(nn.Module):
    """Runs a tower's blocks on fewer and fewer tokens. Has no parameters and no buffers.

    Args:
        config: what to keep and where.
        num_layers: depth of the tower.

    Raises:
        ValueError: the stages do not fit the depth.
    """

    def __init__(self, config: ElipConfig, num_layers: int):
        super().__init__()
        self.config = config
        self.stages = config.stages(num_layers)

    def forward(
        self,
        blocks: Sequence[nn.Module],
        x: Tensor,
        guidance: Tensor | None = None,
        *,
        run: RunBlock = nn.Module.__call__,
        return_kept: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor | None]]:
        """
        Args:
            blocks: the tower's layers; each maps (B, L, D) to (B, L, D) for any L.
            x: (B, 1+M, D), input of the first layer, `[CLS]` first.
            guidance: (B, D) text vector at the tower's width; detached here. None scores by vision alone (lam = 1).
            run: calls a block, with gradients in the main path and without in the scoring pass; default `block(x)`.
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
        self, layers: Sequence[nn.Module], x: Tensor, guidance: Tensor | None, run: RunBlock = nn.Module.__call__
    ) -> Tensor:
        """Scores (B, N) of the N patch tokens of `x` (B, 1+N, D) by the stage's own `layers` (Eq. 1 and 2)."""
        scored = layers[: self.config.scoring_depth] if self.config.scoring_depth else layers
        read = _cls_attention_of_sharded if hasattr(scored[-1], "unshard") else cls_attention
        y = self.fuse(x, guidance)
        # Turns autocast's cache of weights off, which is one for all devices. From it the main path would take weights
        # that were cast here, without a gradient.
        with torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu"), cache_enabled=False):
            for block in scored[:-1]:
                y = run(block, y)
            return read(scored[-1], y)

    def fuse(self, x: Tensor, guidance: Tensor | None) -> Tensor:
        """A copy of `x` whose `[CLS]` is lam * `[CLS]` + (1 - lam) * guidance (Eq. 1)."""
        if guidance is None or self.config.lam == 1:
            return x
        cls_BD = x[:, 0]
        t_BD = guidance.detach().to(x.dtype)
        if self.config.text_scale == "match":
            t_BD = t_BD * (_norm(cls_BD) / _norm(t_BD).clamp_min(1e-12)).to(x.dtype)
        fused_BD = self.config.lam * cls_BD + (1 - self.config.lam) * t_BD
        return torch.cat([fused_BD.unsqueeze(1), x[:, 1:]], dim=1)

    def token_counts(self, num_patches: int) -> list[int]:
        """Sequence length, `[CLS]` and merged token included, in each layer, for `num_patches` patches at the input."""
        counts, patches = [], num_patches
        for stage in self.stages:
            keep = stage.keep(num_patches)
            if patches > keep:
                patches = keep + int(self.config.merge)
            counts += [1 + patches] * stage.depth
        return counts

    def rrt(self, num_patches: int) -> float:
        """Ratio of removed tokens: 1 - token-layers with reduction / token-layers without (Sec. 4, Table 1)."""
        counts = self.token_counts(num_patches)
        return 1 - sum(counts) / (len(counts) * (1 + num_patches))

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.config.to_dict().items())


@torch.compiler.disable  # as are the hooks that do the same around the block's own forward
def _cls_attention_of_sharded(block: nn.Module, y: Tensor) -> Tensor:
    """`cls_attention` of a block that torch's `fully_shard` leaves its weights only during its own forward."""
    block.unshard()
    try:
        return cls_attention(block, y)
    finally:
        block.reshard()


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
