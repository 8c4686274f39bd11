"""Options that say what a model is: its architecture, weights, token reduction and image preprocessing."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .kinds import COUNT, FRACTION_BELOW_1, NAME, NUMBER, POSITIVE, POSITIVE_COUNT, SHARE, Kind, key_value, one_of
from .parser import Section, forbid, option


@dataclass
class ModelOptions(Section, title="model"):
    model: str | None = option("RN50", "Name in OpenCLIP's registry, ELIP models too (ViT-S-16-ELIP).", NAME)
    pretrained: str = option("", "Weights: a tag that OpenCLIP knows, or a file.", metavar="TAG|FILE", path=True)
    pretrained_image: bool = option(False, "Start the image tower from timm's ImageNet weights.", needs="!pretrained")
    cache_dir: str | None = option(None, "Where downloaded weights and tokenizers are kept.", metavar="DIR", path=True)
    force_context_length: int | None = option(
        None, "Text length in tokens, not the model's.", Kind(int, "a whole number from 3 on", "N", lambda v: v > 2))
    force_image_size: list[int] | None = option(
        None, "Image size in pixels (one number, or height and width), not the model's.", POSITIVE_COUNT, nargs=(1, 2))
    force_quick_gelu: bool = option(False, "Use the QuickGELU activation, as OpenAI's weights need.")
    force_patch_dropout: float | None = option(
        None, "Share of patches dropped at random in training, instead of the model's.", FRACTION_BELOW_1)
    force_custom_text: bool = option(False, "Build the text tower as a module of its own (CustomTextCLIP).")
    text_tokenizer: str | None = option(
        None, "Vocabulary instead of the model's, of models with one of Hugging Face's: its name there, or a folder.",
        metavar="NAME|DIR")

    @property
    def family(self) -> str:
        """The model's; imports torch, for only OpenCLIP can tell it of every name, so no `check` asks for it."""
        from open_clip_elip.identity import family_of

        return family_of(self.model) if self.model else "clip"

    @property
    def meter_models(self) -> bool:
        return self.family == "meter"

    @property
    def momentum_twin(self) -> bool:
        """Whether the model, of those that fuse, learns from one, and from queues of its features."""
        return not self.meter_models

    def check(self) -> None:
        forbid_coca("--model", self.model)


def forbid_coca(flag: str, model: str | None) -> None:
    # A folder on the way to a `local-dir:` model may be called anything.
    wrong = model is not None and "coca" in model.rsplit("/", 1)[-1].lower()
    forbid(wrong, f"{flag} {model} is a CoCa model: this trainer trains contrastive models only, choose one.")


@dataclass
class AdapterOptions(Section, title="adapters"):
    adapter: str | None = option(
        None, "Train adapters in both towers and the fusion layers, and heads, but nothing else: lora, on attention's "
        "weights, or bottleneck, behind each attention and MLP. docs/peft.md has more.", one_of("lora", "bottleneck"))
    adapter_rank: int | None = option(
        None, "Their rank. Without it: 8 of lora, 64 of bottleneck.", POSITIVE_COUNT, needs="adapter")

    def check(self) -> None:
        forbid(self.adapter and self.fsdp, "--adapter leaves little to split: leave out --fsdp.")


@dataclass
class LockingOptions(Section, title="locked towers", needs="trains !fusion_models"):
    lock_image: bool = option(False, "Do not train the image tower.")
    lock_image_unlocked_groups: int = option(0, "Train the last N groups of a locked tower.", COUNT, needs="lock_image")
    lock_image_freeze_bn_stats: bool = option(False, "Keep BatchNorm statistics of locked layers.", needs="lock_image")
    lock_text: bool = option(False, "Do not train the text tower.")
    lock_text_unlocked_layers: int = option(0, "Train the last N groups of a locked tower.", COUNT, needs="lock_text")
    lock_text_freeze_layer_norm: bool = option(False, "Lock the LayerNorms of locked layers too.", needs="lock_text")


def _setting(word: str) -> tuple[str, Any]:
    key, value = key_value(word) if "=" in word else ("method", word)
    return key, str(value) if key == "method" else value


def _settings(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("takes one method, and settings as key=value, each once")
    return dict(pairs)


# Settings of token reduction by the flags that earlier versions had for them.
_MOVED = {"stage_depths": "depths", "reduce_layers": "layers", "merge_per_layer": "r"} | {name: name for name in (
    "keep_ratio", "keep_count", "lam", "merge", "text_scale", "scoring_depth", "spread", "keep_rate", "prop_attn",
    "target_rrt",
)}  # fmt: skip


@dataclass
class TokenReductionOptions(Section, title="token reduction"):
    token_reduction: dict[str, Any] | None = option(
        None, "Method and its settings, as in: elip lam=0.5 keep_ratio=1,.9,.65,.4; none keeps all tokens. Settings "
        "alone change the model's own method. docs/methods.md lists them.",
        Kind(_setting, "given as key=value", "METHOD|KEY=VALUE", gather=_settings), nargs="+")
    gone = {old: f"is written --token-reduction [METHOD] {new}={{value}} now" for old, new in _MOVED.items()}


@dataclass
class TextReductionOptions(Section, title="token reduction", needs="trains"):
    text_reduction: str | None = option(
        None, "Remove tokens of texts too, in the second half of the layers: at random, the last ones first, or those "
        "that the image attends to least (fusion models alone).", one_of("random", "post", "learned"))
    text_keep: float = option(0.6, "Share of a text's tokens that stay.", SHARE, needs="text_reduction trains")


def reduction_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`token_reduction` as the options of a run say it, which may be those of an earlier version."""
    said = config.get("token_reduction")
    if isinstance(said, dict):
        return said
    settings = {new: config[old] for old, new in _MOVED.items() if config.get(old) is not None and said != "none"}
    return ({"method": said} if said else {}) | settings or None


@dataclass
class ImageOptions(Section, title="image preprocessing (what is not given is as in the model's config)"):
    image_mean: list[float] | None = option(None, "Mean to subtract, one or three numbers.", NUMBER, nargs=(1, 3))
    image_std: list[float] | None = option(None, "Deviation to divide by, one or three.", POSITIVE, nargs=(1, 3))
    image_interpolation: str | None = option(
        None, "How images are resized; in training only with --aug-cfg use_timm=True, else it is bicubic.",
        one_of("bicubic", "bilinear", "random"))
    image_resize_mode: str | None = option(
        None, "In evaluation, what is brought to the model's size: the shortest side (then cropped), the longest (then "
        "padded), or both (squashed).", one_of("shortest", "longest", "squash"))
