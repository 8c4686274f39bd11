"""What a model is, in plain types, and the one way from a name to that description and from it to a model.

A description is complete: with it, a checkpoint can be read when the name means something else, or nothing, by then.
Only what Hugging Face's libraries load by a name of their own (text towers, tokenizers) is told by that name.
"""
from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import open_clip
import torch
from open_clip.factory import parse_model_name
from open_clip.model import CLIPVisionCfg
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from torch import nn

from .clip import SHORTCUT, with_shortcuts
from .reduction import METHODS, drop_alternatives
from .registry import model_folder, plain_name, registered


class ModelError(ValueError):
    """A model or weights that cannot be had; the message is one sentence that says what is wrong and what to do."""


@dataclass(frozen=True)
class Identity:
    """What a model is.

    Attributes:
        family: "clip".
        name: as a person gave it: ViT-B-16-ELIP, local-dir:FOLDER, hf-hub:REPOSITORY.
        config: OpenCLIP's model configuration with all changes in it, `token_reduction` with all its options included.
        preprocess: OpenCLIP's `preprocess_cfg`: size (height, width), mean, std, ...
    """

    family: str
    name: str
    config: dict[str, Any]
    preprocess: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Identity:
        """Raises ModelError for a family that this version does not know."""
        if found.get("family") != "clip":
            raise ModelError(f"This is a model of the family {found.get('family')!r}; here only 'clip' is known.")
        return cls(**copy.deepcopy(found))

    @property
    def token_reduction(self) -> dict[str, Any] | None:
        """{"method": ..., options}, or None."""
        return self.config.get("token_reduction")


# ---------------------------------------------------------------------- from a name


def describe(
    name: str,
    *,
    pretrained: str | None = None,
    token_reduction: dict[str, Any] | None = None,
    force_quick_gelu: bool = False,
    force_custom_text: bool = False,
    force_patch_dropout: float | None = None,
    force_image_size: int | list[int] | None = None,
    force_context_length: int | None = None,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
    image_interpolation: str | None = None,
    image_resize_mode: str | None = None,
    init_logit_scale: float | None = None,
    init_logit_bias: float | None = None,
    cache_dir: str | None = None,
) -> Identity:
    """
    Args:
        name: one of `open_clip.list_models()`, `local-dir:FOLDER` or `hf-hub:REPOSITORY`.
        pretrained: a tag of open_clip's brings the preprocessing that its weights were trained with.
        token_reduction: {"method": ..., options}; without a method, options that change the model's own. "none": none.
        others: as in `open_clip.create_model_and_transforms`.

    Raises:
        ModelError: no such model or method, or an option that does not fit.
    """
    preprocess = asdict(PreprocessCfg())
    if parse_model_name(name)[0] is None:
        registry_name = name.replace("/", "-")
        check_name(registry_name)
        config, tag = open_clip.get_model_config(registry_name), None
        if pretrained is not None and open_clip.is_pretrained_cfg(registry_name, pretrained):
            tag = open_clip.get_pretrained_cfg(registry_name, pretrained)
            preprocess = merge_preprocess_dict(preprocess, tag)
    else:
        with creating(name):
            found, tag = model_folder(name, cache_dir), None
            config, preprocess = found["model_cfg"], merge_preprocess_dict(preprocess, found.get("preprocess_cfg", {}))
        schema, place = parse_model_name(name)
        if schema == "local-dir" and config["text_cfg"].get("hf_tokenizer_name"):
            config["text_cfg"]["hf_tokenizer_name"] = place  # as open_clip has it

    vision, text = config["vision_cfg"], config["text_cfg"]
    for part, key, value in (
        (config, "quick_gelu", force_quick_gelu or None),
        (config, "custom_text", force_custom_text or None),
        (config, "init_logit_scale", init_logit_scale),
        (config, "init_logit_bias", init_logit_bias),
        (vision, "patch_dropout", force_patch_dropout),
        (vision, "image_size", force_image_size),
        (text, "context_length", force_context_length),
        (preprocess, "mean", image_mean),
        (preprocess, "std", image_std),
        (preprocess, "interpolation", image_interpolation),
        (preprocess, "resize_mode", image_resize_mode),
    ):
        if value is not None:
            part[key] = value
    size = vision.get("image_size", CLIPVisionCfg.image_size)
    if isinstance(size, (list, tuple)) and len(size) == 1:
        vision["image_size"] = size = size[0]
    preprocess["size"] = list(size) if isinstance(size, (list, tuple)) else [size, size]
    if tag is not None and tag.get("quick_gelu", False) != config.get("quick_gelu", False):
        advice = "add --force-quick-gelu" if tag.get("quick_gelu") else "take the model without -quickgelu in its name"
        logging.warning(f"The weights {pretrained} were trained with another activation than {name} has; {advice}.")

    own = config.pop("token_reduction", {})
    resolved = _resolve_reduction(name, own, own if token_reduction is None else token_reduction)
    if resolved is not None:
        config["token_reduction"] = resolved
    return Identity("clip", name, _plain(config), _plain(preprocess))


def check_name(name: str) -> None:
    """Raises ModelError unless open_clip knows a model by this name."""
    known = open_clip.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
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
    return [f"{key} {a} (not {b})" for key, a, b in pairs if a != b]


def _resolve_reduction(name: str, own: dict[str, Any], given: dict[str, Any]) -> dict[str, Any] | None:
    """The model's own token reduction with the given options on top, every option with its value; None: none."""
    options = {key: value for key, value in given.items() if key != "method"}
    method = given.get("method", own.get("method"))
    if method == "none" or (method is None and not options):  # a baseline: its other options no longer matter
        return None
    if method is None:
        raise ModelError(
            f"{name} has no token reduction for {', '.join(options)} to change; name a method too, as in "
            "--token-reduction elip or NAME:method=elip."
        )
    if method not in METHODS:
        raise ModelError(f"Unknown token reduction method {method!r}; known are none, {', '.join(METHODS)}.")
    base = {key: value for key, value in own.items() if key != "method"} if own.get("method") == method else {}
    kind = METHODS[method].Config
    lists = {f.name for f in fields(kind) if str(f.type).startswith("tuple")}
    options = {k: [v] if k in lists and isinstance(v, (int, float)) else v for k, v in options.items()}
    try:
        config = kind.from_dict({**drop_alternatives(base, options), **options})
    except (TypeError, ValueError) as error:
        raise ModelError(f"Token reduction of {name}: {error}") from error
    return {"method": method, **config.to_dict()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


# ---------------------------------------------------------------------- to a model


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

    Args:
        precision: one of OpenCLIP's names.
        pretrained_image, pretrained_text: timm's, or Hugging Face's, own weights for a tower of theirs.

    Raises:
        ModelError: a tower that cannot be made, or whose tokens cannot be reduced.
    """
    device, name = torch.device(device), _name(identity)
    with creating(identity.name), registered(name, identity.config), nullcontext() if device.type != "meta" else device:
        model = open_clip.create_model(
            name, precision=precision, device=device, load_weights=False, pretrained_image=pretrained_image,
            pretrained_text=pretrained_text, cache_dir=cache_dir, output_dict=True,
        )  # fmt: skip
        trunk = getattr(model.visual, "trunk", None)
        size = tuple(identity.preprocess["size"])
        if hasattr(trunk, "set_input_size") and trunk.patch_embed.img_size != size:
            model.visual.set_input_size(size)
        open_clip.model.set_model_preprocess_cfg(model, asdict(_preprocess(identity)))
        return with_shortcuts(model) if type(model) in SHORTCUT else model


def tokenizer(identity: Identity, cache_dir: str | None = None) -> Callable:
    """Captions to token ids (B, context length). Raises ModelError if it cannot be had."""
    name = _name(identity)
    with creating(f"{identity.name}'s tokenizer"), registered(name, identity.config):
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


def _name(identity: Identity) -> str:
    """Under which the model is made: open_clip takes SigLIP's tokenizer by the name of a model that names none."""
    return "described" if ":" in identity.name else identity.name.replace("/", "-")


def _preprocess(identity: Identity) -> PreprocessCfg:
    return PreprocessCfg(**{k: tuple(v) if isinstance(v, list) else v for k, v in identity.preprocess.items()})
