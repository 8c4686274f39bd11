"""Options that say what a model is: its architecture, weights, token reduction and image preprocessing."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .parser import (
    COUNT,
    FRACTION_BELOW_1,
    NUMBER,
    POSITIVE,
    POSITIVE_COUNT,
    Kind,
    Section,
    forbid,
    key_values,
    one_of,
    option,
)  # fmt: skip


@dataclass
class ModelOptions(Section, title="model"):
    model: str | None = option(
        "RN50", "Name in OpenCLIP's registry, which holds the ELIP models too (ViT-S-16-ELIP, ...).", metavar="NAME")
    pretrained: str = option(
        "", "Weights to start from: a tag that OpenCLIP knows, or a file.", metavar="TAG|FILE", path=True)
    pretrained_image: bool = option(False, "Start the image tower from ImageNet weights, where timm has them.")
    cache_dir: str | None = option(None, "Where downloaded weights and tokenizers are kept.", metavar="DIR", path=True)
    force_context_length: int | None = option(None, "Text length in tokens, instead of the model's.", POSITIVE_COUNT)
    force_image_size: list[int] | None = option(
        None, "Image size in pixels (one number, or height and width), not the model's.", POSITIVE_COUNT, nargs="+")
    force_quick_gelu: bool = option(False, "Use the QuickGELU activation, as OpenAI's weights need.")
    force_patch_dropout: float | None = option(
        None, "Share of patches dropped at random in training, instead of the model's; 0 for a last stretch at full "
        "length.", FRACTION_BELOW_1)
    force_custom_text: bool = option(False, "Build the text tower as a module of its own (CustomTextCLIP).")

    def check(self) -> None:
        forbid_coca("--model", self.model)
        forbid(len(self.force_image_size or []) > 2, "--force-image-size takes one number, or two (height, width).")


def forbid_coca(flag: str, model: str | None) -> None:
    # A folder on the way to a `local-dir:` model may be called anything.
    wrong = model is not None and "coca" in model.rsplit("/", 1)[-1].lower()
    forbid(wrong, f"{flag} {model} is a CoCa model: this trainer trains contrastive models only, choose one.")


@dataclass
class LockingOptions(Section, title="locked towers"):
    lock_image: bool = option(False, "Do not train the image tower.")
    lock_image_unlocked_groups: int = option(0, "With --lock-image: train its last N groups of layers.", COUNT)
    lock_image_freeze_bn_stats: bool = option(False, "With --lock-image: keep BatchNorm statistics of locked layers.")
    lock_text: bool = option(False, "Do not train the text tower.")
    lock_text_unlocked_layers: int = option(0, "With --lock-text: train its last N groups of layers.", COUNT)
    lock_text_freeze_layer_norm: bool = option(False, "With --lock-text: lock the LayerNorms of locked layers too.")


def _method(words: list[str]) -> dict[str, Any]:
    """`tome r=8` as {"method": "tome", "r": 8}; lists for Python's tuples, so that `keep_ratio=1,.9` is one."""
    method = {} if "=" in words[0] else {"method": words[0]}
    settings = key_values(words[len(method) :])
    return method | {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


# Flags of earlier versions, and what they are called in a model's `token_reduction` config.
_MOVED = {
    "stage_depths": "depths", "keep_ratio": "keep_ratio", "keep_count": "keep_count", "lam": "lam", "merge": "merge",
    "text_scale": "text_scale", "scoring_depth": "scoring_depth", "spread": "spread", "keep_rate": "keep_rate",
    "reduce_layers": "layers", "merge_per_layer": "r", "prop_attn": "prop_attn", "target_rrt": "target_rrt",
}  # fmt: skip


@dataclass
class TokenReductionOptions(Section, title="token reduction"):
    """The method is under "method", beside its settings. What they may be, the method itself says."""

    token_reduction: dict[str, Any] | None = option(
        None, "Method and its settings, as in: elip lam=0.5 keep_ratio=1,.9,.65,.4; none keeps all tokens. Settings "
        "alone change the model's own method. docs/methods.md lists them.",
        Kind(str, "METHOD|KEY=VALUE", _method), nargs="+")
    gone = {old: f"is written --token-reduction [METHOD] {new}={{value}} now" for old, new in _MOVED.items()}


def reduction_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`token_reduction` as the options of a run say it, which may be those of an earlier version."""
    said = config.get("token_reduction")
    if isinstance(said, dict):
        return said
    settings = {new: config[old] for old, new in _MOVED.items() if config.get(old) is not None and said != "none"}
    return ({"method": said} if said else {}) | settings or None


@dataclass
class ImageOptions(Section, title="image preprocessing (what is not given is as in the model's config)"):
    image_mean: list[float] | None = option(None, "Mean to subtract, one or three numbers.", NUMBER, nargs="+")
    image_std: list[float] | None = option(None, "Deviation to divide by, one or three numbers.", POSITIVE, nargs="+")
    image_interpolation: str | None = option(None, "How images are resized.", one_of("bicubic", "bilinear", "random"))
    image_resize_mode: str | None = option(
        None, "In evaluation, what is brought to the model's image size: the shortest side (then cropped), the longest "
        "(then padded), or both (squashed).", one_of("shortest", "longest", "squash"))

    def check(self) -> None:
        for flag, value in (("--image-mean", self.image_mean), ("--image-std", self.image_std)):
            forbid(len(value or [0]) not in (1, 3), f"{flag} takes one number, or three (red, green, blue).")
