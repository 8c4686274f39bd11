"""What a model is, in plain types, and the one way from a name to that description and from it to a model.

A description is complete: with it, a checkpoint can be read when the name means something else, or nothing, by then.
Only what Hugging Face's libraries load by a name of their own (text towers, tokenizers) is told by that name.
"""
from __future__ import annotations

import copy
import difflib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import open_clip
import torch
from open_clip.factory import parse_model_name
from open_clip.model import CLIPVisionCfg
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from torch import nn

from .adapters import KINDS, adapt
from .clip import TEXT_FIRST, with_shortcuts
from .errors import ModelError
from .reduction import resolve
from .reduction.text import TextReduction
from .registry import model_folder, plain_name, registered

FAMILIES = ("clip", "albef", "blip", "meter")


@dataclass(frozen=True)
class Identity:
    """What a model is."""

    family: str  # "clip", or one of fusion/
    name: str  # as a person gave it: ViT-B-16-ELIP, local-dir:FOLDER, hf-hub:REPOSITORY
    config: dict[str, Any]  # OpenCLIP's, with all changes in it, all options of token and text reduction, and `adapter`
    preprocess: dict[str, Any]  # OpenCLIP's `preprocess_cfg`: size (height, width), mean, std, ...

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Identity:
        """Raises ModelError for a family that this version does not know."""
        if found.get("family") not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise ModelError(f"This is a model of the family {found.get('family')!r}; here only {known} are known.")
        return cls(**copy.deepcopy(found))

    @property
    def token_reduction(self) -> dict[str, Any] | None:
        """{"method": ..., options}, or None."""
        return self.config.get("token_reduction")

    def with_adapter(self, kind: str | None, rank: int | None = None) -> Identity:
        """With adapters of a kind and its rank (None: the usual one), see `adapters`; without a kind, with none."""
        config = {key: value for key, value in self.config.items() if key != "adapter"}
        if kind is not None:
            config["adapter"] = {"kind": kind, "rank": rank or KINDS[kind]}
        return replace(self, config=config)


# Changes to a model, by their names in `open_clip.create_model_and_transforms`: part of the configuration, and key.
CHANGES = {
    "force_quick_gelu": ("model", "quick_gelu"), "force_custom_text": ("model", "custom_text"),
    "init_logit_scale": ("model", "init_logit_scale"), "init_logit_bias": ("model", "init_logit_bias"),
    "force_patch_dropout": ("vision", "patch_dropout"), "force_image_size": ("vision", "image_size"),
    "force_context_length": ("text", "context_length"), "image_mean": ("preprocess", "mean"),
    "image_std": ("preprocess", "std"), "image_interpolation": ("preprocess", "interpolation"),
    "image_resize_mode": ("preprocess", "resize_mode"), "text_tokenizer": ("text", "hf_tokenizer_name"),
}  # fmt: skip


def describe(
    name: str,
    *,
    pretrained: str | None = None,
    token_reduction: dict[str, Any] | None = None,
    text_reduction: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    **changes: Any,
) -> Identity:
    """The model of a name; a ModelError if there is none, or if an option does not fit.

    Args:
        name: one of `open_clip.list_models()`, `local-dir:FOLDER` or `hf-hub:REPOSITORY`.
        pretrained: a tag of open_clip's brings the preprocessing that its weights were trained with.
        token_reduction: {"method": ..., options}; without a method, options that change the model's own. "none": none.
        text_reduction: {"rule": ..., "keep": ...}, see `reduction.text.TextReduction`; None: the model's own.
        changes: see `CHANGES`; None or False: no change.
    """
    with creating(name):
        schema, place = parse_model_name(name)
    if schema is None:
        registry_name = name.replace("/", "-")
        check_name(registry_name)
        config = open_clip.get_model_config(registry_name)
        tag = special = open_clip.get_pretrained_cfg(registry_name, pretrained or "")
    else:
        with creating(name):
            found = model_folder(name, cache_dir)
            config, special, tag = found["model_cfg"], found.get("preprocess_cfg", {}), {}
        if schema == "local-dir" and config["text_cfg"].get("hf_tokenizer_name"):
            config["text_cfg"]["hf_tokenizer_name"] = place  # as open_clip has it

    preprocess = asdict(PreprocessCfg())
    for of in (config.pop("preprocess_cfg", {}), special):  # the architecture's, and that of its weights
        preprocess = merge_preprocess_dict(preprocess, of)
    _change(config, preprocess, changes)
    if tag and tag.get("quick_gelu", False) != config.get("quick_gelu", False):
        advice = "add --force-quick-gelu" if tag.get("quick_gelu") else "take the model without -quickgelu in its name"
        logging.warning(f"The weights {pretrained} were trained with another activation than {name} has; {advice}.")

    own = config.pop("token_reduction", {})
    resolved = _resolve_reduction(name, own, token_reduction or own)
    if resolved is not None:
        config["token_reduction"] = resolved
    if found := text_reduction or config.get("text_reduction"):
        try:
            config["text_reduction"] = asdict(TextReduction(**found))
        except (TypeError, ValueError) as error:
            raise ModelError(f"Text reduction of {name}: {error}") from error
    config, preprocess = json.loads(json.dumps([config, preprocess]))  # lists for tuples
    return Identity(config.get("family", "clip"), name, config, preprocess)


def family_of(name: str) -> str:
    """The family of a model by its name; "clip" too if there is none of that name, which `describe` tells."""
    with suppress(Exception):  # of many kinds
        known = model_folder(name)["model_cfg"] if ":" in name else open_clip.get_model_config(name.replace("/", "-"))
        return known.get("family", "clip")
    return "clip"


def changed(identity: Identity, **changes: Any) -> Identity:
    """With other values of what `CHANGES` lists; None: as before."""
    config, preprocess = copy.deepcopy([identity.config, identity.preprocess])
    _change(config, preprocess, changes)
    return replace(identity, config=config, preprocess=preprocess)


def reduced(identity: Identity, token_reduction: dict[str, Any]) -> Identity:
    """With another token reduction, or other options of its own; see `describe`."""
    config = {key: value for key, value in identity.config.items() if key != "token_reduction"}
    resolved = _resolve_reduction(identity.name, identity.token_reduction or {}, token_reduction)
    return replace(identity, config=config | ({} if resolved is None else {"token_reduction": resolved}))


def _change(config: dict[str, Any], preprocess: dict[str, Any], changes: dict[str, Any]) -> None:
    """Also makes the preprocessing's size that of the image tower."""
    vision = config["vision_cfg"]
    parts = {"model": config, "vision": vision, "text": config["text_cfg"], "preprocess": preprocess}
    for change, value in changes.items():
        part, key = CHANGES[change]
        if value is not None and value is not False:
            parts[part][key] = value
    size = vision.get("image_size", CLIPVisionCfg.image_size)
    if isinstance(size, (list, tuple)) and len(size) == 1:
        vision["image_size"] = size = size[0]
    preprocess["size"] = size if isinstance(size, (list, tuple)) else [size, size]
    if min(preprocess["size"]) < (vision.get("patch_size") or 1):  # a ResNet has none
        raise ModelError(f"Pictures of {size} pixels are smaller than one patch: raise --force-image-size.")


def check_name(name: str) -> None:
    """Raises ModelError unless open_clip knows a model by this name."""
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "open_clip.list_models() lists what there is."
        raise ModelError(f"There is no model named {name!r}; {hint}")


def sibling(identity: Identity, name: str) -> Identity | None:
    """`identity` with the token reduction of the model `name`; None if that is no model of the same shape."""
    if name == identity.name:
        return identity
    if ":" in name or plain_name(name.replace("/", "-")) != plain_name(identity.name.replace("/", "-")):
        return None
    other = describe(name)
    config = {key: value for key, value in identity.config.items() if key != "token_reduction"}
    if other.token_reduction is not None:
        config["token_reduction"] = other.token_reduction
    return replace(identity, name=name, config=config)


def differences(one: Identity, other: Identity) -> list[str]:
    """What makes the same weights mean something else: settings of `one` that `other` has not, as text."""
    keys = [key for key in one.preprocess if key != "size"]  # weights are resized, which is told
    pairs = [(key, one.preprocess[key], other.preprocess.get(key)) for key in keys]
    pairs += [("quick_gelu", *(bool(of.config.get("quick_gelu")) for of in (one, other)))]
    words = [of.config["text_cfg"].get("words") for of in (one, other)]
    pairs += [("the vocabulary", *words)] * (None not in words)
    return [f"{key} {a} (not {b})" for key, a, b in pairs if a != b]


def _resolve_reduction(name: str, own: dict[str, Any], given: dict[str, Any]) -> dict[str, Any] | None:
    """The model's own token reduction with the given options on top, every option with its value; None: none."""
    if given.get("method", own.get("method")) == "none" or not given:  # a baseline: other options no longer matter
        return None
    if "method" not in own | given:
        raise ModelError(
            f"{name} has no token reduction for {', '.join(given)} to change; name a method too, as in "
            "--token-reduction elip or NAME:method=elip."
        )
    try:
        method, config = resolve(given, own)
    except (TypeError, ValueError) as error:
        raise ModelError(f"Token reduction of {name}: {error}") from error
    return {"method": method, **config.to_dict()}


def create(
    identity: Identity,
    *,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
    pretrained_image: bool = False,
    pretrained_text: bool = True,
    cache_dir: str | None = None,
) -> nn.Module:
    """The model with weights at random and this package's exact shortcuts; on "meta" it has shapes but no numbers.

    `precision` is one of OpenCLIP's names; `pretrained_image` and `pretrained_text` ask for timm's, or Hugging Face's,
    own weights for a tower of theirs. A ModelError: a tower that cannot be made, or whose tokens cannot be reduced.
    """
    device = torch.device(device)
    with _known(identity) as name, nullcontext() if device.type != "meta" else device:
        model = open_clip.create_model(
            name, precision=precision, device=device, load_weights=False, pretrained_image=pretrained_image,
            pretrained_text=pretrained_text, cache_dir=cache_dir, output_dict=True,
        )  # fmt: skip
        trunk = getattr(model.visual, "trunk", None)
        size = tuple(identity.preprocess["size"])
        if hasattr(trunk, "set_input_size") and trunk.patch_embed.img_size != size:
            model.visual.set_input_size(size)
        open_clip.model.set_model_preprocess_cfg(model, asdict(_preprocess(identity)))
        model = with_shortcuts(model) if type(model) in TEXT_FIRST else model
        if "adapter" in identity.config:
            adapt(model, **identity.config["adapter"])
        return model


def tokenizer(identity: Identity, cache_dir: str | None = None) -> Callable:
    """Captions to token ids (B, context length). Raises ModelError if it cannot be had."""
    with _known(identity, "'s tokenizer") as name:
        if identity.family != "clip":
            from .fusion.tokenizer import WordPieces, blip_caption

            text = identity.config["text_cfg"]
            room, more = text["bert"]["vocab_size"], {}
            if identity.family == "meter":
                more = {"clean": str, "ends": True}
            elif identity.family == "blip":
                more = {"clean": blip_caption, "ends": True, "own": {room - 2: "[DEC]", room - 1: "[ENC]"}}
            positions, tokens = text["bert"].get("max_position_embeddings", 512), text["context_length"]
            if tokens > positions:
                raise ValueError(f"Texts of {tokens} tokens are longer than the model's {positions} positions.")
            found = WordPieces(text["hf_tokenizer_name"], tokens, **more)
            if len(found.pieces) > room:
                raise ValueError(f"The vocabulary has {len(found.pieces)} tokens, more than the {room} of the model.")
            if text.get("words", found.digest) != found.digest:
                what = f"{text['hf_tokenizer_name']} has other words than the vocabulary that the model was trained on"
                raise ValueError(f"{what}: give that in --text-tokenizer.")
            return found
        return open_clip.get_tokenizer(name, cache_dir=cache_dir)


def transform(identity: Identity, *, train: bool = False, aug_cfg: dict[str, Any] | None = None) -> Callable:
    """Pictures to tensors, in evaluation or in training (then with the augmentation `aug_cfg`)."""
    with creating(f"{identity.name}'s image transform"):
        return image_transform_v2(_preprocess(identity), is_train=train, aug_cfg=aug_cfg)


@contextmanager
def creating(what: str) -> Iterator[None]:
    """Turns what open_clip raises while it builds something into one sentence, and keeps its chatter out of the log."""
    root = logging.getLogger()
    level = root.level
    if level > logging.DEBUG:
        root.setLevel(logging.ERROR)
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # from AssertionError to OSError, according to what is wrong
        first = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"The model {what} cannot be created: {first}") from error
    finally:
        root.setLevel(level)


@contextmanager
def _known(identity: Identity, what: str = "") -> Iterator[str]:
    """The name by which open_clip knows the model within it: its own, by which SigLIP's tokenizer is taken."""
    name = "described" if ":" in identity.name else identity.name.replace("/", "-")
    with creating(identity.name + what), registered(name, identity.with_adapter(None).config):
        yield name


def _preprocess(identity: Identity) -> PreprocessCfg:
    return PreprocessCfg(**{k: tuple(v) if isinstance(v, list) else v for k, v in identity.preprocess.items()})
