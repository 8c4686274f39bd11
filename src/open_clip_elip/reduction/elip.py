"""ELIP: at the start of each stage, the guided `[CLS]` decides which tokens go on.

Guo et al., "ELIP: Efficient Discriminative Language-Image Pre-training with Fewer Vision Tokens", Alg. 1.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import check_attention, in_effect
from .base import Layer, ReductionConfig, Removal, TokenReduction, check_number, check_switch, register, run_plainly
from .merge import destinations, keep_and_merge, norm

# The paper's schedule for a 12-layer ViT (Sec. 3.2 and 4.2): 2(100%) -> 2(90%) -> 6(65%) -> 2(40%).
PAPER_DEPTHS = (2, 2, 6, 2)
PAPER_KEEP_RATIO = (1.0, 0.90, 0.65, 0.40)


class Stage(NamedTuple):
    """Consecutive layers, from the 0-based `first` on, that run on the same tokens."""

    first: int
    depth: int
    amount: float | int  # a share of the patches M that entered the *first* layer of the tower, or a number of them

    def keep(self, num_patches: int) -> int:
        """K = int(r * M), at least 1, for M = `num_patches` patches at the tower's input."""
        return self.amount if isinstance(self.amount, int) else max(1, int(self.amount * num_patches))


@dataclass(frozen=True)
class ElipConfig(ReductionConfig):
    """Options of ELIP; the defaults are the paper's."""

    alternatives = ("keep_ratio", "keep_count")
    depths: tuple[int, ...] | None = None  # layers in each stage; None: the paper's, in proportion to the tower's depth
    keep_ratio: tuple[float, ...] | None = None  # per stage, the share of the initial patches, non-increasing in (0, 1]
    keep_count: tuple[int, ...] | None = None  # per stage, a number of patches instead of a share, non-increasing, >= 1
    lam: float = 0.6  # weight of the image's own [CLS] in Eq. 1: 1 = vision only, 0 = text only
    merge: bool = True  # fuse the tokens that are not kept into one (Eq. 4); False = drop them (Fig. 3 left)
    text_scale: str = "match"  # rescale the guidance to the norm of the [CLS] it is blended with; "none" leaves it
    # Score with this layer of the stage, 1-based, or its last if it is shorter; None: with the last (exact).
    scoring_depth: int | None = None

    def __post_init__(self) -> None:
        name = self._choose(PAPER_KEEP_RATIO)
        if name == "keep_ratio":
            self._set_numbers(name, math.ulp(0), "numbers in (0, 1], one per stage", high=1, kind=float)
        else:
            self._set_numbers(name, 1, "whole numbers of at least 1, one per stage")
        if self.depths is not None:
            self._set_numbers("depths", 1, "numbers of layers, at least 1 each")
        keep, stages = getattr(self, name), len(self.depths or PAPER_DEPTHS)
        if any(later > earlier for earlier, later in itertools.pairwise(keep)):
            raise ValueError(f"{name} must not increase from stage to stage; got {list(keep)}.")
        if len(keep) != stages:
            raise ValueError(
                f"{name} has {len(keep)} entries for {stages} stages"
                + (f" (depths {list(self.depths)})." if self.depths else "; for another number of stages, set depths.")
            )
        check_number("lam", self.lam, 0, 1, "a number in [0, 1] (1 = vision only, 0 = text only)")
        check_switch("merge", self.merge)
        if self.text_scale not in ("match", "none"):
            raise ValueError(f"text_scale must be 'match' or 'none'; got {self.text_scale!r}.")
        if self.scoring_depth is not None:
            check_number("scoring_depth", self.scoring_depth, 1, math.inf, "a layer of a stage, 1 or more", whole=True)

    def stages(self, num_layers: int) -> list[Stage]:
        """The schedule for a tower of `num_layers` layers; a ValueError if the depths do not add up to them."""
        depths = self.depths
        if depths is None:  # in proportion: a very shallow tower gets fewer stages
            ends = [round(num_layers * end / sum(PAPER_DEPTHS)) for end in itertools.accumulate(PAPER_DEPTHS)]
            depths = [end - start for start, end in itertools.pairwise([0, *ends])]
        if sum(depths) != num_layers:
            raise ValueError(
                f"The stages cover {sum(depths)} layers (depths {list(depths)}) but the image tower has {num_layers}."
            )
        firsts = itertools.accumulate(depths, initial=0)
        stages = zip(firsts, depths, self.keep_count or self.keep_ratio, strict=False)
        return [Stage(*stage) for stage in stages if stage[1]]


@register("elip")
class Elip(TokenReduction):
    """Runs a tower's blocks on fewer and fewer tokens."""

    Config, suffix, uses_text = ElipConfig, "-ELIP", True

    def __init__(self, config: ElipConfig, num_layers: int):
        super().__init__(config, num_layers)
        self.stages = config.stages(num_layers)

    def forward(self, blocks, x, guidance=None, *, run=run_plainly, only_cls=False, which=None):
        """As `TokenReduction.forward`, (B, 1+K+1, D); `run` calls a block without gradients in the scoring pass, and no
        guidance scores by vision alone (lam = 1)."""
        num_patches = x.shape[1] - 1
        for stage in self.stages:
            layers = [blocks[i] for i in range(stage.first, stage.first + stage.depth)]
            keep = stage.keep(num_patches)
            if x.shape[1] - 1 > keep:
                x, which = x if which is None else x[which], None  # up to here text has had no part
                x = self._shorten(x, self.score(layers, x, guidance, run), keep, stage.first)
            for block in layers:
                x = run(block, x)
        return x if which is None else x[which]

    def _shorten(self, x: Tensor, scores: Tensor, keep: int, layer: int) -> Tensor:
        shorter, kept_BK = keep_and_merge(x, scores, keep, self.config.merge)
        if self.watch is not None:
            self.watch(Removal(layer, x, destinations(kept_BK, scores.shape[1], self.config.merge), scores))
        return shorter

    @torch.no_grad()
    def score(self, layers: Sequence[nn.Module], x: Tensor, guidance: Tensor | None, run: Callable) -> Tensor:
        """Scores (B, N) of the N patch tokens of `x` (B, 1+N, D) by the stage's own `layers` (Eq. 1 and 2)."""
        *before, last = layers[: self.config.scoring_depth]  # of the last, only the row of `[CLS]` is needed
        y = self.fuse(x, guidance)
        # Autocast's cache, one for all devices, is off: the main path would take weights from it without a gradient.
        with torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu"), cache_enabled=False):
            for block in before:
                y = run(block, y)
            if hasattr(last, "unshard"):
                return _cls_attention_of_sharded(last, y)
            check_attention(last, False)
            return cls_attention(last, y)

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


def cls_attention(block: nn.Module, y: Tensor) -> Tensor:
    """Attention that the `[CLS]` query pays to every other token in `block`, mean over heads (Eq. 2).

    The softmax runs over all 1+N tokens, as in the block itself, and the N others are read off. Of the block only
    `ln_1` and the query and key weights are used. The key projection is moved onto the single query,
    `q . (W_k h + b_k) = (W_k^T q) . h + const`, and the constant cancels in the softmax: no key is ever computed, and
    the cost falls from N*D*D to N*D*heads multiplications without changing the result.

    For `y` (B, 1+N, D), `[CLS]` first: (B, N) in float32 (float64 for float64 input); a row sums to less than 1.
    """
    width, heads = block.attn.embed_dim, block.attn.num_heads
    head_dim = width // heads
    h_BND = block.ln_1(y)
    weight, bias = in_effect(block.attn)[:2]
    q_BD = F.linear(h_BND[:, 0], weight[:width], None if bias is None else bias[:width])
    w_k_HdD = weight[width : 2 * width].unflatten(0, (heads, head_dim))
    q_BHd = q_BD.unflatten(-1, (heads, head_dim)) * head_dim**-0.5
    q_BHD = torch.einsum("bhd,hdk->bhk", q_BHd, w_k_HdD.to(q_BHd.dtype))
    logits_BHN = q_BHD @ h_BND.to(q_BHD.dtype).transpose(1, 2)
    accumulate = torch.promote_types(logits_BHN.dtype, torch.float32)
    return logits_BHN.softmax(dim=-1, dtype=accumulate).mean(dim=1)[:, 1:]


@torch.compiler.disable  # as are the hooks that do the same around the block's own forward
def _cls_attention_of_sharded(block: nn.Module, y: Tensor) -> Tensor:
    """`cls_attention` of a block that torch's `fully_shard` leaves its weights only during its own forward."""
    block.unshard()
    try:
        return cls_attention(block, y)
    finally:
        block.reshard()
