"""Weights to start from: pre-training's an image tower of DeiT, timm or CLIP, and BERT; a task's those of it."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from open_clip.model import resize_pos_embed
from torch import Tensor, nn

from .. import weights
from ..adapters import check_adapters, is_adapter, merged
from ..identity import ModelError
from .base import FusionModel

# Of some model or other.
_PARTS = ("visual.", "text.", "fusion.", "head.", "decoder.", "embeddings.", "lm_head.", "cross_modal")
Left = list[str]  # names of the model's weights that a start does not have


def start_image(model: nn.Module, source: str) -> Left:
    """Fills the image tower from weights of a file, or by name: of timm's (deit_base_patch16_224), or, for a METER, of
    CLIP's, with their tag (ViT-B-32-quickgelu:openai).

    Raises:
        ModelError: there are no such weights, or they are of another shape.
    """
    if weights.is_file(source):
        state = weights.tensors(weights.read(source), source)
    elif model.quick_gelu:
        name, _, tag = source.rpartition(":")
        if not name:
            raise _unavailable(source, ValueError("a CLIP model has weights by tag, as in ViT-B-32-quickgelu:openai"))
        state = weights.tensors(weights.read(weights.find(name, tag)), source)
    else:
        import timm

        try:
            state = timm.create_model(source, pretrained=True).state_dict()
        except Exception as error:  # from the network, or no such model
            raise _unavailable(source, error) from error
    state = model.from_image_tower(state)
    if not state:
        raise ModelError(f"{source} has no image tower of CLIP's, whose names begin with visual.: name another.")
    resize_pos_embed(state, model, antialias=False)
    return _fill(model, state, source, "visual.")


def start_text(model: nn.Module, source: str) -> Left:
    """Fills text encoder, fusion layers and language head from BERT (RoBERTa), by its name on Hugging Face or a folder.

    Raises:
        ModelError: there is no such BERT, or it is of another shape.
    """
    from transformers import AutoModelForMaskedLM

    try:
        bert = AutoModelForMaskedLM.from_pretrained(str(Path(source).expanduser()) if Path(source).exists() else source)
    except Exception as error:
        raise _unavailable(source, error) from error
    state = model.from_bert(bert.state_dict())
    return _fill(model, state, source, ("text.", "fusion.", "mlm_head.", "decoder."))


class Start(NamedTuple):
    """What became of each tensor of a file, by name, and what it holds beside the model's weights."""

    loaded: list[str]  # of the model
    resized: list[str]  # some of those, with their lengths
    new: list[str]  # of the model, not in the file
    idle: list[str]  # of the file: what this model has no use for
    unknown: list[str]  # of the file: what no model of the family has
    twin: dict[str, Tensor]  # the momentum twin's weights, by the model's names; {}: there is none
    queues: dict[str, Tensor]  # (image|text).(columns|pointer); {}: there are none


def start_task(model: FusionModel, content: Mapping[str, Any], source: str) -> Start:
    """Fills a task's model from a checkpoint of pre-training, or of the task itself.

    Args:
        content: what the file `source` holds: a checkpoint of this package's or of the authors' release.

    Raises:
        ModelError: the file is of another task or size, or of no such model.
    """
    found, own = model.own_names(weights.tensors(content, source)), model.state_dict()
    state = model.from_pretraining(found.model)
    unused = [name for name in state if name not in own]
    idle = [name for name in unused if name.startswith(model.IDLE)]
    check_adapters(set(state).difference(idle), own, source)
    if wrong := next((name for name in unused if name not in idle and name.startswith(_PARTS)), None):
        what = f"its {wrong} has no place here"
        raise ModelError(f"{source} does not fit this model: {what}; give one of pre-training, of the same size.")
    rest = dict(found.rest)
    pointer = next((rest.pop(name) for name in ("queue_ptr", "ptr_queue") if name in rest), None)
    queues = {f"{name}.columns": rest.pop(f"{name}_queue") for name in ("image", "text") if f"{name}_queue" in rest}
    if pointer is not None:
        queues |= {"image.pointer": pointer, "text.pointer": pointer}
    idle += [name for name in ("idx_queue",) if rest.pop(name, None) is not None]
    task = content.get("task")
    task = task if isinstance(task, Mapping) else {}

    state, twin = (
        {name: value for name, value in one.items() if name in own}
        for one in (state, model.from_pretraining(merged(task.get("twin", found.twin))))
    )
    key = "visual.positional_embedding"
    before, after = len(state.get(key, ())), len(own[key])
    resized = [f"{key} ({before} to {after})"] if before not in (0, after) else []
    types = "token_type_embeddings.weight"  # METER's, of texts and of one or two images
    counts = [len(one.get(types, ())) for one in (found.model, state)]
    resized += [f"{types} ({counts[0]} to {counts[1]})"] if counts[0] != counts[1] else []
    for one in (state, twin):
        if key in one and one[key].shape[1:] == own[key].shape[1:]:
            resize_pos_embed(one, model, antialias=False)
    new = _fill(model, state, source, "")
    if missing := [name for name in new if not name.startswith(model.NEW)]:
        what = f"it has no {missing[0]}" + (f", nor {len(missing) - 1} others" if missing[1:] else "")
        raise ModelError(f"{source} does not fit this model: {what}; give a checkpoint of pre-training.")
    unknown = [name for name in unused if name not in idle] + list(rest)
    return Start(list(state), resized, new, idle, unknown, twin, task.get("queues", queues))


def _fill(model: nn.Module, state: dict[str, Tensor], source: str, parts: str | tuple[str, ...]) -> Left:
    own = model.state_dict()
    for name, value in state.items():
        if name not in own or own[name].shape != value.shape:
            there = "no weight of that name" if name not in own else f"{tuple(own[name].shape)}"
            raise ModelError(f"{source} does not fit this model: its {name} is {tuple(value.shape)}, here is {there}.")
    model.load_state_dict(state, strict=False)
    return [name for name in own if name.startswith(parts) and name not in state and not is_adapter(name)]


def _unavailable(source: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:200]
    return ModelError(f"The weights {source} to start from cannot be had: {reason}; name others, or a file.")
