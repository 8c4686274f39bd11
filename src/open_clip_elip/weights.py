"""Weights in the forms that people have them, and the one way from them into a model.

Nothing is lost in silence: what was not used, was resized, or is left as it was in the model, is told by name.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.convert import convert_state_dict, load_big_vision_weights
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from open_clip.transformer import QuickGELU
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import hugging_face
from .adapters import is_adapter, merged
from .identity import Identity, ModelError, creating, describe
from .registry import DESCRIPTIONS, weights_in_folder
from .weight_files import BIG_VISION, parts, read_file

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_INSERTED = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # by torch's own wrappers
_IGNORED = {  # OpenAI's, those of averages, older transformers', and what scripting keeps
    "input_resolution", "context_length", "vocab_size", "n_averaged", "text.transformer.embeddings.position_ids",
    "attn_mask", "text.attn_mask",
}  # fmt: skip
# Folders of weights in forms that are not read, by a file in them, and what to do.
_FOLDERS = {
    ".metadata": "is torch's distributed checkpoint: `python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
    "FOLDER FILE` makes it one file",
    "zero_to_fp32.py": "is DeepSpeed's: the program zero_to_fp32.py in it makes it one file",
}
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
        told = "; ".join(f"{what}: {_some(names)}" for what, names in parts if names)
        return ([f"Of the weights in {self.source}, {told}."] if told else []) + self.notes


def find(name: str, pretrained: str | None, cache_dir: str | None = None) -> str | None:
    """The file or URL of the weights that a person means, by a file, a URL, or a tag of open_clip's, whose file is
    downloaded; None: weights at random. `local-dir:` and `hf-hub:` bring weights along, which a file replaces.
    A ModelError: it is nothing of this, or cannot be downloaded."""
    if is_file(pretrained):
        return pretrained
    if not pretrained:
        with creating(name):
            return weights_in_folder(name, cache_dir) if ":" in name else None
    tag = open_clip.get_pretrained_cfg(name.replace("/", "-"), pretrained)
    if not tag:
        way_out = f"leave it out, for {name} brings weights of its own" if ":" in name else "name a file"
        what = f"--pretrained {pretrained} is neither a file nor a name of weights for {name}"
        raise ModelError(f"{what}; correct it, or {way_out}.")
    try:
        return open_clip.download_pretrained(tag, cache_dir=cache_dir)
    except Exception as error:  # of any kind, from the network or a full disk
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"The weights {pretrained} of {name} cannot be downloaded: {reason}") from error


def is_file(pretrained: str | None) -> bool:
    """Whether weights are named by a file, by a folder that tells what it holds, or by a URL."""
    if not pretrained or "://" in pretrained:
        return bool(pretrained)
    path = Path(pretrained)
    return path.is_file() or any((path / name).is_file() for name in (*DESCRIPTIONS, *_FOLDERS))


def read(source: str | Path) -> dict[str, Any]:
    """What a file, or what a URL of any kind that fsspec knows stands for, holds: a checkpoint or a state dict; that of
    the weights in a TorchScript archive. No code of the file is run. A folder of OpenCLIP's, or with a CLIPModel of
    transformers', is as a checkpoint of this trainer, which tells its model. ModelError: it is no checkpoint."""
    source = str(source)
    if "://" in source:
        return read_file(source)
    if Path(source).is_dir():
        return _read_folder(Path(source))
    first, *others = map(read_file, parts(Path(source)))
    return first | {name: value for other in others for name, value in other.items()}


def _read_folder(folder: Path) -> dict[str, Any]:
    for name, what in _FOLDERS.items():
        if (folder / name).is_file():
            raise ModelError(f"{folder} {what}; give that.")
    name = f"local-dir:{folder}"
    with creating(name):
        identity, file = describe(name), weights_in_folder(name)
    if file is None:
        raise ModelError(f"{folder} has no weights, as model.safetensors or the like; name a file of them.")
    return {"state_dict": tensors(read(file), file), "model": identity.to_dict()}


def told_identity(content: Mapping[str, Any]) -> Identity | None:
    """The model that a file of this trainer's, or a folder, tells, but for LoRA, which `tensors` merges."""
    told = content.get("model")
    if not isinstance(told, Mapping) or "family" not in told:
        return None
    identity = Identity.from_dict(dict(told))
    return identity.with_adapter(None) if identity.config.get("adapter", {}).get("kind") == "lora" else identity


def check_finite(model: nn.Module, source: str) -> None:
    """Raises ModelError."""
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            what = f"The weights of {source} are not finite (the first is {name})"
            raise ModelError(f"{what}; take those of another step.")


def load(
    model: nn.Module,
    content: Mapping[str, Any],
    *,
    name: str = "this model",
    source: str = "the checkpoint",
    image_tower: bool = False,
    strict: bool = True,
) -> Report:
    """Fills a model from what `read` returned, with names translated and position embeddings resized to the model's.

    Args:
        name, source: of the model and of the file, for what is said.
        image_tower: take a file that holds an image tower alone too, as fine-tuning leaves it, without its head. Where
            it has lost the projection into the space of text, the model's is new.
        strict: a ModelError unless both have the same tensors in the same shapes; else, what fits is loaded.
    """
    if BIG_VISION in content:
        return _load_big_vision(model, content[BIG_VISION], name)
    state = tensors(content, source)
    own, openai, kept = model.state_dict(), "input_resolution" in state, []
    described = "model" in content or name.startswith("local-dir:")
    activation_untold = not described and any("pre_layrnorm" in key for key in state)  # of transformers
    fused = hasattr(model, "own_names")  # a model of fusion/
    if fused:
        found = model.own_names(state)
        state, kept = found.model, [*found.twin, *found.rest]
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
    before = {key: value.shape for key, value in state.items()}
    try:
        resize_pos_embed(state, model, antialias=not fused)
        resize_text_pos_embed(state, model)
        _resize_trunk(state, getattr(model.visual, "trunk", None))
    except (AssertionError, AttributeError, RuntimeError):
        pass  # another shape altogether: told below
    resized = [key for key, value in state.items() if value.shape != before[key]]

    wrong = [key for key, value in state.items() if key in own and value.shape != own[key].shape]
    new, unused = [key for key in own if key not in state], [key for key in state if key not in own]
    missing = new = [key for key in new if not is_adapter(key)]
    unknown = [key for key in unused if key != "logit_bias"]
    if tower_only:
        missing = [key for key in new if key.startswith("visual.") and not _PROJECTION.match(key)]
        unknown = [key for key in unused if key.startswith("visual.")]
    problems = [f"{key} is {_shape(state[key])} there and {_shape(own[key])} in the model" for key in wrong]
    problems += [f"{key} is missing" for key in missing] + [f"{key} is unknown to the model" for key in unknown]
    if strict and problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise ModelError(f"{source} does not fit {name}: {problems[0]}{more}; check --model and --pretrained.")
    fitting = {key: value for key, value in state.items() if key in own and key not in wrong}
    if not fitting:
        raise ModelError(f"{source} has nothing that fits {name}: the first of its names is {next(iter(state), None)}.")
    model.load_state_dict(fitting, strict=False)
    report = Report(source, list(fitting), resized, unused + wrong, new + wrong, [])
    if openai and not any(isinstance(module, QuickGELU) for module in model.modules()):
        report.notes.append(f"{source} is OpenAI's, whose models are trained with QuickGELU: add --force-quick-gelu.")
    if activation_untold:
        report.notes.append(f"The activation of {source} stands in the config.json beside it: name the folder instead.")
    averages = [key for key, value in content.items() if "ema" in str(key).split("_") and isinstance(value, Mapping)]
    averages = [str(key) for key in averages if key != "ema"]  # ours have a flag
    if averages and any(key in content for key in _WRAPPERS):
        report.notes.append(f"{source} also holds averages ({_some(averages)}), which are not used; save them alone.")
    if kept:
        report.notes.append(f"{source} also holds a momentum twin and queues, which training uses ({len(kept)}).")
    return report


def tensors(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The state dict in a checkpoint of this trainer or of another: below `state_dict`, `model`, ... or by itself. LoRA
    is merged."""
    inner, found = content, {}
    while True:
        within = {key: value for key, value in inner.items() if isinstance(value, Mapping) and value}
        named = [key for key in _WRAPPERS if key in within]
        holding = named or [key for key, value in within.items() if _holds_weights(value)]
        found = {key: value for key, value in inner.items() if isinstance(value, Tensor)} or found
        if not named and (found or len(holding) != 1):
            break
        inner = within[holding[0]]
    if found:
        return merged({name: _whole(value, name, source) for name, value in found.items()})
    several = f": {' and '.join(map(str, holding))} each have some; save one of them alone" if holding else ""
    only = _some(list(map(str, content))) or "an empty dictionary"
    raise ModelError(f"{source} holds no weights, only {only}{several}.")


def _holds_weights(value: Mapping[str, Any]) -> bool:
    return any(isinstance(one, Tensor) or name in _WRAPPERS for name, one in value.items())


def _whole(value: Tensor, name: str, source: str) -> Tensor:
    """A tensor as it is, not as FSDP has distributed it; a ModelError where that has left a part of it."""
    local = value.to_local() if isinstance(value, DTensor) else value
    if local.shape != value.shape or name.endswith("_flat_param"):
        raise ModelError(
            f"{source} holds what one of several processes has under FSDP; save what get_model_state_dict returns with "
            "StateDictOptions(full_state_dict=True), of torch.distributed.checkpoint.state_dict."
        )
    return local


def check_adapters(names: Iterable[str], own: Mapping[str, Tensor], source: str) -> None:
    """ModelError for adapters in a file's weights where a model, whose own weights these are, has none."""
    if any(".adapter_" in name and name not in own for name in names):
        raise ModelError(f"{source} has bottleneck adapters, which cannot be merged: add --adapter bottleneck.")


def _own_names(state: dict[str, Tensor], model: nn.Module, source: str) -> dict[str, Tensor]:
    """Another program's names as OpenCLIP's, of the kind of model that it is for."""
    state = {_INSERTED.sub("", key): value for key, value in state.items()}
    whole = [key.removesuffix("logit_scale") for key in state if key.endswith("logit_scale")]  # before all names
    if len(whole) > 1:
        beginnings = " and ".join(prefix or "nothing" for prefix in whole)
        raise ModelError(f"{source} holds several models, before whose names stands {beginnings}; save one alone.")
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


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a scalar"
