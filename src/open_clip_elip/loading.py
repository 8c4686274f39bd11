"""Weights under whatever names into a model. Nothing is lost in silence: all that was not used, was resized, or is left
as it was in the model, is told by name."""
from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from open_clip.convert import convert_state_dict, load_big_vision_weights
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from open_clip.transformer import QuickGELU
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from . import hugging_face
from .adapters import check_adapters, is_adapter
from .errors import ModelError
from .weight_files import BIG_VISION
from .weights import WRAPPERS, some, tensors

_INSERTED = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # by torch's own wrappers
_IGNORED = {  # OpenAI's, those of averages, older transformers', and what scripting keeps
    "input_resolution", "context_length", "vocab_size", "n_averaged", "text.transformer.embeddings.position_ids",
    "attn_mask", "text.attn_mask",
}  # fmt: skip
# The projection of an image tower into the space that it shares with text: a fine-tuned classifier may have dropped it.
_PROJECTION = re.compile(r"visual\.(proj$|head\.(proj|mlp)\.)")


class Report(NamedTuple):
    """What became of each tensor, by name, and sentences on what the person should know besides."""

    source: str
    loaded: list[str]
    resized: list[str] = []  # some of those loaded
    unused: list[str] = []  # of the file
    new: list[str] = []  # of the model, as before
    notes: list[str] = []

    def sentences(self) -> list[str]:
        """What is worth a warning; [] if the file is the model's."""
        parts = (("resized", self.resized), ("not used", self.unused), ("not in the file, so left as new", self.new))
        told = "; ".join(f"{what}: {some(names)}" for what, names in parts if names)
        return ([f"Of the weights in {self.source}, {told}."] if told else []) + self.notes


def load(
    model: nn.Module,
    content: Mapping[str, Any],
    *,
    name: str = "this model",
    source: str = "the checkpoint",
    image_tower: bool = False,
) -> Report:
    """Fills a model from what `weights.read` returned, with names translated and position embeddings resized to the
    model's. A ModelError unless both have the same tensors in the same shapes.

    Args:
        name, source: of the model and of the file, for what is said.
        image_tower: take a file that holds an image tower alone too, as fine-tuning leaves it, without its head. Where
            it has lost the projection into the space of text, the model's is new.
    """
    if BIG_VISION in content:
        return _load_big_vision(model, content[BIG_VISION], name)
    state = tensors(content, source)
    own, notes = model.state_dict(), _notes(content, state, model, name, source)
    fused = hasattr(model, "own_names")  # a model of fusion/
    if fused:
        found = model.own_names(state)
        state = found.model
        if kept := len(found.twin) + len(found.rest):
            notes.append(f"{source} also holds a momentum twin and queues, which training uses ({kept}).")
    else:
        state = _own_names(state, model, source)
    tower_only = all(key.startswith(("visual.", "head.")) for key in state)
    if tower_only and not image_tower:
        raise ModelError(
            f"{source} holds an image tower without a text tower"
            + (", fine-tuned for classification" if "head.weight" in state else "")
            + f", and {name} needs both here; training.linear_probe takes it, and training.finetune with --head random."
        )
    check_adapters(state, own, source)
    resized = _resize(state, model, antialias=not fused)
    new = [key for key in own if key not in state and not is_adapter(key)]
    unused = [key for key in state if key not in own]
    missing, unknown = new, [key for key in unused if key != "logit_bias"]
    if tower_only:
        missing = [key for key in new if key.startswith("visual.") and not _PROJECTION.match(key)]
        unknown = [key for key in unused if key.startswith("visual.")]
    if wrong := misfits(state, own, missing, unknown):
        raise ModelError(f"{source} does not fit {name}: {wrong}; check --model and --pretrained.")
    loaded = {key: value for key, value in state.items() if key in own}
    model.load_state_dict(loaded, strict=False)
    return Report(source, list(loaded), resized, unused, new, notes)


def misfits(state: Mapping[str, Any], own: Mapping[str, Tensor], missing: list[str], unknown: list[str]) -> str:
    """What keeps a state dict from fitting a model's `own`: the first, and how many more; "" if nothing does."""
    shapes = [(key, _shape(value), _shape(own[key])) for key, value in state.items() if key in own]
    found = [f"{key} is {there} there and {here} in the model" for key, there, here in shapes if there != here]
    found += [f"{key} is missing" for key in missing] + [f"{key} is unknown to the model" for key in unknown]
    return "".join(found[:1]) + (f" (and {len(found) - 1} more differences)" if len(found) > 1 else "")


def check_finite(model: nn.Module, source: str) -> None:
    """Raises ModelError."""
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            what = f"The weights of {source} are not finite (the first is {name})"
            raise ModelError(f"{what}; take those of another step.")


def _notes(
    content: Mapping[str, Any], state: Mapping[str, Tensor], model: nn.Module, name: str, source: str
) -> list[str]:
    """What the names in a file tell beside the weights that are taken from it."""
    notes = []
    if "input_resolution" in state and not any(isinstance(module, QuickGELU) for module in model.modules()):
        notes.append(f"{source} is OpenAI's, whose models are trained with QuickGELU: add --force-quick-gelu.")
    described = "model" in content or name.startswith("local-dir:")
    if not described and any("pre_layrnorm" in key for key in state):  # of transformers
        notes.append(f"The activation of {source} stands in the config.json beside it: name the folder instead.")
    averages = [key for key, value in content.items() if "ema" in str(key).split("_") and isinstance(value, Mapping)]
    averages = [str(key) for key in averages if key != "ema"]  # ours have a flag
    if averages and any(key in content for key in WRAPPERS):
        notes.append(f"{source} also holds averages ({some(averages)}), which are not used; save them alone.")
    return notes


def _own_names(state: dict[str, Tensor], model: nn.Module, source: str) -> dict[str, Tensor]:
    """Another program's names as OpenCLIP's, of the kind of model that it is for."""
    state = {_INSERTED.sub("", key): value for key, value in state.items()}
    whole = [key.removesuffix("logit_scale") for key in state if key.endswith("logit_scale")]  # before all names
    if len(whole) > 1:
        scales = " and ".join(f"{prefix}logit_scale" for prefix in whole)
        raise ModelError(f"{source} holds several models ({scales}); save one of them alone.")
    for prefix in (*whole[:1], "module.", "model.", "module."):  # DDP, Lightning, DDP within it
        if sum(key.startswith(prefix) for key in state) > len(state) / 2:
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if key not in _IGNORED}
    tower = next((key.removesuffix("class_embedding") for key in state if key.endswith("class_embedding")), "visual.")
    if not whole and tower != "visual." and f"{tower}conv1.weight" in state:  # a ViT by itself, whatever it is called
        state = {re.sub(f"^{re.escape(tower)}", "visual.", key): value for key, value in state.items()}
    if hugging_face.is_clip(state):
        state = hugging_face.from_transformers(state)
    elif any(key.startswith("vision_model.") for key in state):
        raise ModelError(
            f"{source} is a model of transformers, and not its CLIPModel: its layers have other parts; take the same "
            "weights from open_clip (a tag, or hf-hub:REPOSITORY with an open_clip_config.json)."
        )
    elif any(key.endswith("blocks.0.attn.qkv.weight") and "visual." not in key for key in state):
        what = f"{source} is an image tower of timm's, without a text tower"
        raise ModelError(f"{what}; only ALBEF and BLIP start from timm's ViTs, with --start-image FILE.")
    state = convert_state_dict(model, state)
    if not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state) if "positional_embedding" in state else state
    elif "text.positional_embedding" in state:
        state = {key.removeprefix("text."): value for key, value in state.items()}
    for key in ("logit_scale", "logit_bias"):
        own = getattr(model, key, None)
        if key in state and own is not None and state[key].numel() == own.numel():
            state[key] = state[key].reshape(own.shape)
    if getattr(model, "logit_bias", None) is not None and "logit_scale" in state:  # not trained with it: none
        state.setdefault("logit_bias", torch.zeros_like(model.logit_bias, device="cpu"))
    return state


def _resize(state: dict[str, Tensor], model: nn.Module, antialias: bool) -> list[str]:
    """Position embeddings to the model's; the names of those that were resized."""
    before = {key: value.shape for key, value in state.items()}
    try:
        resize_pos_embed(state, model, antialias=antialias)
        resize_text_pos_embed(state, model)
        _resize_trunk(state, getattr(model.visual, "trunk", None))
    except (AssertionError, AttributeError, RuntimeError):
        pass  # another shape altogether, which `load` tells
    return [key for key, value in state.items() if value.shape != before[key]]


def _resize_trunk(state: dict[str, Tensor], trunk: nn.Module | None) -> None:
    """Position embeddings of timm's ViT, as its own `set_input_size` does it."""
    key, own = "visual.trunk.pos_embed", getattr(trunk, "pos_embed", None)
    if own is not None and key in state and state[key].shape != own.shape:
        prefix = 0 if getattr(trunk, "no_embed_class", False) else trunk.num_prefix_tokens
        size = list(trunk.patch_embed.grid_size)
        state[key] = resample_abs_pos_embed(state[key], new_size=size, num_prefix_tokens=prefix)


def _load_big_vision(model: nn.Module, path: str, name: str) -> Report:
    try:
        load_big_vision_weights(model, path)
    except Exception as error:  # KeyError, AssertionError, AttributeError: it is written for SigLIP's models alone
        kind = type(error).__name__
        raise ModelError(f"{path} cannot be read as big_vision's weights for {name} ({kind}).") from error
    return Report(path, list(model.state_dict()))


def _shape(value: Any) -> str:
    return "x".join(map(str, value.shape)) or "a scalar" if isinstance(value, Tensor) else type(value).__name__
