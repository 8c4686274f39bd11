"""Token reduction as pure tensor code: tokens, blocks and a guidance vector; nothing of CLIP.

Shapes in this package: B batch, N patch tokens now in the sequence, M patch tokens that entered the first layer,
K kept patches, D width. A sequence x is (B, 1+N, D) with `[CLS]` first; `[CLS]` is never counted in N, M or K.
"""
from .config import ElipConfig, Stage
from .elip import Elip
from .merge import keep_and_merge
from .scoring import check_blocks, cls_attention

#: method name -> (configuration class, module class); `registry` and the trainer offer what is listed here
METHODS = {"elip": (ElipConfig, Elip)}

__all__ = ["METHODS", "Elip", "ElipConfig", "Stage", "check_blocks", "cls_attention", "keep_and_merge"]
