"""Weights in the forms that people have them: where they are, and what they hold."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor
from torch.distributed.tensor import DTensor

from .adapters import merged
from .identity import Identity, ModelError, creating, describe
from .registry import DESCRIPTIONS, weights_in_folder
from .weight_files import parts, read_file

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
# Folders of weights in forms that are not read, by a file in them, and what to do.
_FOLDERS = {
    ".metadata": "is torch's distributed checkpoint: `python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
    "FOLDER FILE` makes it one file",
    "zero_to_fp32.py": "is DeepSpeed's: the program zero_to_fp32.py in it makes it one file",
}


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


def tensors(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The state dict in a checkpoint of this trainer or of another: below `state_dict`, `model`, ... or by itself. LoRA
    is merged."""
    inner, found = content, {}
    while True:
        within = {key: value for key, value in inner.items() if isinstance(value, Mapping) and value}
        named = [key for key in WRAPPERS if key in within]
        holding = named or [key for key, value in within.items() if _holds_weights(value)]
        found = {key: value for key, value in inner.items() if isinstance(value, Tensor)} or found
        if not named and (found or len(holding) != 1):
            break
        inner = within[holding[0]]
    if found:
        return merged({name: _whole(value, name, source) for name, value in found.items()})
    several = f": {' and '.join(map(str, holding))} each have some; save one of them alone" if holding else ""
    only = some(list(map(str, content))) or "an empty dictionary"
    raise ModelError(f"{source} holds no weights, only {only}{several}.")


def _holds_weights(value: Mapping[str, Any]) -> bool:
    return any(isinstance(one, Tensor) or name in WRAPPERS for name, one in value.items())


def _whole(value: Tensor, name: str, source: str) -> Tensor:
    """A tensor as it is, not as FSDP has distributed it; a ModelError where that has left a part of it."""
    local = value.to_local() if isinstance(value, DTensor) else value
    if local.shape != value.shape or name.endswith("_flat_param"):
        raise ModelError(
            f"{source} holds what one of several processes has under FSDP; save what get_model_state_dict returns with "
            "StateDictOptions(full_state_dict=True), of torch.distributed.checkpoint.state_dict."
        )
    return local


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
