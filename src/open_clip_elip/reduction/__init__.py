"""Token reduction as pure tensor code: tokens, blocks and a guidance vector; nothing of CLIP.

Shapes in this package: B batch, N patch tokens now in the sequence, M patch tokens that entered the first layer,
K kept patches, D width. A sequence x is (B, 1+N, D) with `[CLS]` first; `[CLS]` is never counted in N, M or K.
"""
from .attention import check_blocks
from .base import METHODS, Layer, TokenReduction, drop_alternatives, register
from .config import ElipConfig, Stage
from .elip import Elip
from .evit import Evit, EvitConfig
from .merge import keep_and_merge
from .options import ReductionConfig
from .random_drop import RandomDrop, RandomDropConfig
from .scoring import cls_attention
from .tome import Tome, TomeConfig

__all__ = [
    "METHODS", "Elip", "ElipConfig", "Evit", "EvitConfig", "Layer", "RandomDrop", "RandomDropConfig",
    "ReductionConfig", "Stage", "TokenReduction", "Tome", "TomeConfig", "check_blocks", "cls_attention",
    "drop_alternatives", "keep_and_merge", "register",
]  # fmt: skip
