"""What ELIP keeps and where: the configuration and the schedule it unfolds into."""
from __future__ import annotations

import math
from dataclasses import dataclass

from .options import ReductionConfig, check_number, check_switch

# The paper's schedule for a 12-layer ViT (Sec. 3.2 and 4.2): 2(100%) -> 2(90%) -> 6(65%) -> 2(40%).
PAPER_DEPTHS = (2, 2, 6, 2)
PAPER_KEEP_RATIO = (1.0, 0.90, 0.65, 0.40)


@dataclass(frozen=True)
class Stage:
    """Consecutive layers that run on the same tokens.

    Attributes:
        first: index of the stage's first layer, 0-based.
        depth: number of layers.
        keep_ratio: patches to keep, as a share of the patches M that entered the *first* layer of the tower.
        keep_count: the same as a number of patches; exactly one of the two is set.
    """

    first: int
    depth: int
    keep_ratio: float | None = None
    keep_count: int | None = None

    def keep(self, num_patches: int) -> int:
        """K = int(r * M), at least 1, for M = `num_patches` patches at the tower's input."""
        if self.keep_count is not None:
            return self.keep_count
        return max(1, int(self.keep_ratio * num_patches))


@dataclass(frozen=True)
class ElipConfig(ReductionConfig):
    """Options of ELIP; the defaults are the paper's.

    Attributes:
        depths: layers in each stage. None scales the paper's 2-2-6-2 to the tower's depth (11 layers: 2-2-5-2).
        keep_ratio: per stage, the share of the initial patches to keep, non-increasing in (0, 1].
        keep_count: per stage, the number of patches to keep instead of a share, non-increasing, >= 1.
        lam: weight of the image's own `[CLS]` in Eq. 1. 1 = vision only, 0 = text only.
        merge: fuse the tokens that are not kept into one (Eq. 4); False = drop them (Fig. 3 left).
        text_scale: "match" rescales the guidance to the norm of the `[CLS]` it is blended with; "none" leaves it.
        scoring_depth: score with this layer of the stage, 1-based, instead of the last one (an approximation);
            stages shorter than this use their last layer.
    """

    alternatives = frozenset({"keep_ratio", "keep_count"})
    depths: tuple[int, ...] | None = None
    keep_ratio: tuple[float, ...] | None = None
    keep_count: tuple[int, ...] | None = None
    lam: float = 0.6
    merge: bool = True
    text_scale: str = "match"
    scoring_depth: int | None = None

    def __post_init__(self) -> None:
        if self.keep_ratio is not None and self.keep_count is not None:
            raise ValueError("Give either keep_ratio or keep_count, not both.")
        if self.keep_ratio is None and self.keep_count is None:
            object.__setattr__(self, "keep_ratio", PAPER_KEEP_RATIO)
        for name, kind in (("keep_ratio", float), ("keep_count", int), ("depths", int)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _numbers(name, getattr(self, name), kind))
        name, keep = ("keep_ratio", self.keep_ratio) if self.keep_count is None else ("keep_count", self.keep_count)
        if self.keep_count is None and not all(0 < r <= 1 for r in keep):
            raise ValueError(f"keep_ratio must lie in (0, 1]; got {list(keep)}.")
        if self.keep_count is not None and not all(c >= 1 for c in keep):
            raise ValueError(f"keep_count must be at least 1; got {list(keep)}.")
        if any(later > earlier for earlier, later in zip(keep, keep[1:], strict=False)):
            raise ValueError(f"{name} must not increase from stage to stage; got {list(keep)}.")
        if self.depths is not None and not all(d >= 1 for d in self.depths):
            raise ValueError(f"depths must be at least 1 layer each; got {list(self.depths)}.")
        stages = len(PAPER_DEPTHS if self.depths is None else self.depths)
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

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """Unfolds the schedule for a tower of `num_layers` layers.

        Raises:
            ValueError: the stages' depths do not add up to `num_layers`.
        """
        depths = _scale_depths(num_layers) if self.depths is None else self.depths
        if sum(depths) != num_layers:
            raise ValueError(
                f"The stages cover {sum(depths)} layers (depths {list(depths)}) but the image tower has {num_layers}."
            )
        ratios = self.keep_ratio or (None,) * len(depths)
        counts = self.keep_count or (None,) * len(depths)
        stages, first = [], 0
        for depth, ratio, count in zip(depths, ratios, counts, strict=True):
            if depth:
                stages.append(Stage(first, depth, ratio, count))
            first += depth
        return tuple(stages)


def _scale_depths(num_layers: int) -> tuple[int, ...]:
    """2-2-6-2 in proportion: stage borders are rounded, so a very shallow tower may get empty (0-layer) stages."""
    total = sum(PAPER_DEPTHS)
    borders = [round(num_layers * sum(PAPER_DEPTHS[: i + 1]) / total) for i in range(len(PAPER_DEPTHS))]
    return tuple(b - a for a, b in zip([0, *borders], borders, strict=False))


def _numbers(name: str, values, kind: type) -> tuple:
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError(f"{name} must be a list of numbers, one per stage; got {values!r}.")
    allowed = (int,) if kind is int else (int, float)
    if any(isinstance(v, bool) or not isinstance(v, allowed) for v in values):
        raise ValueError(f"{name} must hold {'whole ' if kind is int else ''}numbers only; got {list(values)!r}.")
    return tuple(kind(v) for v in values)
