"""Token reduction as pure tensor code: tokens, blocks and a guidance vector; nothing of CLIP.

Shapes in this package: B batch, N patch tokens now in the sequence, M patch tokens that entered the first layer,
K kept patches, D width. A sequence x is (B, 1+N, D) with `[CLS]` first; `[CLS]` is never counted in N, M or K.
"""
from .adaptive import AdaptiveConfig, AdaptiveElip
from .base import LayerWork, ReductionConfig, TokenReduction
from .config import ElipConfig, Stage
from .elip import Elip
from .evit import Evit, EvitConfig
from .merge import keep_and_merge
from .random_drop import RandomDrop, RandomDropConfig
from .scoring import check_blocks, cls_attention
from .tome import Tome, TomeConfig

#: method name -> (configuration class, module class); `registry` and the trainer offer what is listed here
METHODS = {
    "elip": (ElipConfig, Elip),
    "adaptive": (AdaptiveConfig, AdaptiveElip),
    "evit": (EvitConfig, Evit),
    "tome": (TomeConfig, Tome),
    "random": (RandomDropConfig, RandomDrop),
}

# Options that say the same thing in several ways.
_ALTERNATIVES = ({"keep_ratio", "keep_count", "target_rrt"}, {"keep_rate", "target_rrt"}, {"r", "target_rrt"})


def drop_alternatives(options: dict, changes: dict) -> dict:
    """`options` without those that one of `changes` says in another way."""
    replaced = {other for group in _ALTERNATIVES for one in group & changes.keys() for other in group}
    return {name: value for name, value in options.items() if name not in replaced}


__all__ = [
    "METHODS",
    "AdaptiveConfig",
    "AdaptiveElip",
    "Elip",
    "ElipConfig",
    "Evit",
    "EvitConfig",
    "LayerWork",
    "RandomDrop",
    "RandomDropConfig",
    "ReductionConfig",
    "Stage",
    "TokenReduction",
    "Tome",
    "TomeConfig",
    "check_blocks",
    "cls_attention",
    "drop_alternatives",
    "keep_and_merge",
]
