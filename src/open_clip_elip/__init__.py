"""ELIP token reduction for OpenCLIP. Importing this package registers the models with `open_clip`."""
from .clip import TextFirstCLIP, TextFirstCustomTextCLIP, with_shortcuts, with_token_reduction, without_token_reduction
from .reduction import Elip, ElipConfig, TokenReduction
from .registry import register
from .text import TextParts, cut_text
from .tower import ImageTower

register()

__version__ = "0.1.0"
__all__ = [
    "Elip", "ElipConfig", "ImageTower", "TextFirstCLIP", "TextFirstCustomTextCLIP", "TextParts", "TokenReduction",
    "cut_text", "with_shortcuts", "with_token_reduction", "without_token_reduction",
]  # fmt: skip
