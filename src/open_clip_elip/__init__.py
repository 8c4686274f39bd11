"""ELIP token reduction for OpenCLIP. Importing this package registers the models with `open_clip`."""
from importlib import import_module
from typing import TYPE_CHECKING

from . import on_import

if TYPE_CHECKING:
    from .clip import (
        TextFirstCLIP,
        TextFirstCustomTextCLIP,
        with_shortcuts,
        with_token_reduction,
        without_token_reduction,
    )
    from .reduction import Elip, ElipConfig, TokenReduction
    from .text import TextParts, cut_text
    from .tower import ImageTower

on_import.call("open_clip", lambda: import_module(f"{__name__}.registry"))

__version__ = "0.1.0"
__all__ = [
    "Elip", "ElipConfig", "ImageTower", "TextFirstCLIP", "TextFirstCustomTextCLIP", "TextParts", "TokenReduction",
    "cut_text", "with_shortcuts", "with_token_reduction", "without_token_reduction",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """What is in `__all__`, imported when it is asked for, and torch with it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = (import_module(f"{__name__}.{module}") for module in ("clip", "reduction", "text", "tower"))
    return next(getattr(module, name) for module in modules if hasattr(module, name))
