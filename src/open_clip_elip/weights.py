"""Files of weights, in the forms that people have them, and the one way from them into a model.

Nothing is lost in silence: what was not used, was resized, or is left as it was in the model, is told by name.
"""
from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path, PosixPath
from typing import Any, NamedTuple

import fsspec
import numpy
import open_clip
import safetensors.torch as safetensors
import torch
from open_clip.convert import convert_state_dict, load_big_vision_weights
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from open_clip.transformer import QuickGELU
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from .adapters import is_adapter, merged
from .identity import ModelError, creating
from .lightning import read_state_dict
from .registry import weights_in_folder

_LIGHTNING = re.compile(r"GLOBAL (pytorch_)?lightning")
_NUMPY = "big_vision"  # what stands for the content of its files, which open_clip reads by itself
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_INSERTED = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # by torch's own wrappers
_IGNORED = {  # OpenAI's, those of averages, older transformers', and what scripting keeps
    "input_resolution", "context_length", "vocab_size", "n_averaged", "text.transformer.embeddings.position_ids",
    "attn_mask", "text.attn_mask",
}  # fmt: skip
# What is no file of weights, by its first bytes.
_OTHERS = {
    b"<": "it is a web page",
    b"version https://git-lfs": "it is a pointer of Git LFS, whose file `git lfs pull` fetches",
    b"\x1f\x8b": "it is compressed: unpack it", b"PK": "it is cut off, or an archive of other files: unpack that",
}  # fmt: skip
_PLAIN = (  # what trainers keep beside the weights
    argparse.Namespace, PosixPath, numpy.dtype, *(type(numpy.dtype(kind)) for kind in ("f4", "f8", "i8")),
    *((numpy.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
)  # fmt: skip
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
    """Whether weights are named by a file or URL."""
    return bool(pretrained) and (Path(pretrained).is_file() or "://" in pretrained)


def read(source: str | Path) -> dict[str, Any]:
    """What a file, or what a URL of any kind that fsspec knows stands for, holds: a checkpoint or a state dict; that of
    the weights in a TorchScript archive. No code of the file is run. ModelError: it is no checkpoint."""
    source = str(source)
    try:
        with fsspec.open(source, "rb") if "://" in source else nullcontext(source) as file:
            content = _parse(file, source)
            if not isinstance(content, dict):
                raise TypeError(f"it holds a {type(content).__name__}, not a dictionary")
    except FileNotFoundError:
        raise ModelError(f"There is no checkpoint at {source}; check the path.") from None
    except Exception as error:  # a damaged file raises anything from EOFError to UnpicklingError
        text = str(error) or type(error).__name__
        if held := re.search(r"GLOBAL (\S+) was not an allowed", text):
            raise ModelError(
                f"{source} holds a Python object ({held[1]}), which is not read, for it could run code; save its "
                "weights alone, with torch.save(model.state_dict(), FILE)."
            ) from error
        reason = text.splitlines()[0][:160]
        if isinstance(error, pickle.UnpicklingError | LookupError):
            reason = "it is neither torch's nor in safetensors' format"
        raise ModelError(f"{source} cannot be read as a checkpoint ({reason}); take another.") from error
    return content


def _parse(file: Any, source: str) -> Any:
    """Of an open file, or of the path, which is mapped into memory."""
    is_path = isinstance(file, str)
    if source.endswith((".npz", ".npy")):
        return {_NUMPY: source}
    with open(file, "rb") if is_path else nullcontext(file) as opened:
        head = opened.read(64)
        is_zip = head.startswith(b"PK") and zipfile.is_zipfile(opened)
        names = zipfile.ZipFile(opened).namelist() if is_zip else []
        opened.seek(0)
    is_torch, is_script = (any(name.endswith(end) for name in names) for end in ("/data.pkl", "/constants.pkl"))
    other = next((what for start, what in _OTHERS.items() if head.startswith(start) and not is_torch), None)
    if other or not head:
        raise ValueError(other or "it is empty")
    if head[8:9] == b"{":  # whatever it is called
        return safetensors.load_file(file) if is_path else safetensors.load(file.read())
    if is_script:  # as OpenAI's are
        return torch.jit.load(file, map_location="cpu").state_dict()
    try:
        with torch.serialization.safe_globals([*_PLAIN]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_path and is_zip)
    except pickle.UnpicklingError as error:
        if not _LIGHTNING.search(str(error)):
            raise
        if not is_path:
            file.seek(0)
        return read_state_dict(file)


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
    if _NUMPY in content:
        return _load_big_vision(model, content[_NUMPY], name)
    state = tensors(content, source)
    own, openai, kept = model.state_dict(), "input_resolution" in state, []
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
        holding = named or [key for key, value in within.items() if any(isinstance(x, Tensor) for x in value.values())]
        found = {key: value for key, value in inner.items() if isinstance(value, Tensor)} or found
        if not named and (found or len(holding) != 1):
            break
        inner = within[holding[0]]
    if found:
        return merged(found)
    several = f": {' and '.join(map(str, holding))} each have some; save one of them alone" if holding else ""
    raise ModelError(f"{source} holds no weights, only {_some(list(map(str, content)))}{several}.")


def check_adapters(state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    """ModelError for adapters in a file's weights where a model, whose own weights these are, has none."""
    if any(".adapter_" in name and name not in own for name in state):
        raise ModelError(f"{source} has bottleneck adapters, which cannot be merged: add --adapter bottleneck.")


def _own_names(state: dict[str, Tensor], model: nn.Module, source: str) -> dict[str, Tensor]:
    """Another program's names as OpenCLIP's, of the kind of model that it is for."""
    state = {_INSERTED.sub("", key): value for key, value in state.items()}
    whole = [key.removesuffix("logit_scale") for key in state if key.endswith("logit_scale")]  # before all names
    for prefix in (*whole[:1], "module.", "model.", "module."):  # DDP, Lightning, DDP within it
        if sum(key.startswith(prefix) for key in state) > len(state) / 2:
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if key not in _IGNORED}
    tower = next((key.removesuffix("class_embedding") for key in state if key.endswith("class_embedding")), "visual.")
    if not whole and tower != "visual." and f"{tower}conv1.weight" in state:  # a ViT by itself, whatever it is called
        state = {re.sub(f"^{re.escape(tower)}", "visual.", key): value for key, value in state.items()}
    if any(key.startswith("vision_model.") for key in state):
        raise ModelError(
            f"{source} is a model of transformers, whose layers have other parts; take the same weights from open_clip "
            "(a tag, or hf-hub:REPOSITORY with an open_clip_config.json)."
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
