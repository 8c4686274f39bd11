"""Token reduction as pure tensor code: tokens, blocks and a guidance vector; nothing of CLIP.

Shapes in this package: B batch, N patch tokens now in the sequence, M patch tokens that entered the first layer,
K kept patches, D width. A sequence x is (B, 1+N, D) with `[CLS]` first; `[CLS]` is never counted in N, M or K.
"""
from .attention import check_blocks
from .base import METHODS, Layer, ReductionConfig, Removal, TokenReduction, register, resolve
from .elip import Elip, ElipConfig
from .evit import Evit
from .random_drop import RandomDrop
from .tome import Tome

__all__ = [
    "METHODS", "Elip", "ElipConfig", "Evit", "Layer", "RandomDrop", "ReductionConfig", "Removal", "TokenReduction",
    "Tome", "check_blocks", "register", "resolve",
]  # fmt: skip
