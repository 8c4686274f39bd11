"""Files of weights, in the forms that people have them, and the one way from them into a model.

Nothing is lost in silence: what was not used, was resized, or is left as it was in the model, is told by name.
"""
from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict, load_big_vision_weights
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from .identity import ModelError
from .registry import weights_in_folder

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_INSERTED = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # by torch's own wrappers
_IGNORED = {"input_resolution", "context_length", "vocab_size", "n_averaged", "text.transformer.embeddings.position_ids"}
# The projection of an image tower into the space that it shares with text: a fine-tuned classifier may have dropped it.
_PROJECTION = re.compile(r"visual\.(proj$|head\.(proj|mlp)\.)")


@dataclass
class Report:
    """What became of each tensor.

    Attributes:
        source: where the weights are from, as text.
        loaded: names in the model that were filled.
        resized: those of them that had another length there.
        unused: names in the file that the model has no place for.
        new: names in the model that the file says nothing about; they are as they were.
        notes: sentences on what the person should know besides.
    """

    source: str
    loaded: list[str]
    resized: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def sentences(self) -> list[str]:
        """What is worth a warning; [] if the file is the model's."""
        parts = (("resized", self.resized), ("not used", self.unused), ("not in the file, so left as new", self.new))
        told = [f"{what}: {_some(names)}" for what, names in parts if names]
        return ([f"Of the weights in {self.source}, " + "; ".join(told) + "."] if told else []) + self.notes


def find(name: str, pretrained: str | None, cache_dir: str | None = None) -> str | None:
    """The file or URL of the weights that a person means; None: weights at random.

    Args:
        name: of the model. `local-dir:` and `hf-hub:` bring weights along, which a file in `pretrained` replaces.
        pretrained: a file, a URL, or for a model of open_clip's a tag, whose file is downloaded.

    Raises:
        ModelError: `pretrained` is nothing of this, or cannot be downloaded.
    """
    if pretrained and (Path(pretrained).is_file() or "://" in pretrained):
        return pretrained
    if ":" in name:
        if pretrained:
            raise ModelError(
                f"--pretrained {pretrained} is not a file, and {name} brings weights of its own; correct the path, or "
                "leave out --pretrained."
            )
        return weights_in_folder(name, cache_dir)
    if not pretrained:
        return None
    name = name.replace("/", "-")
    if not open_clip.is_pretrained_cfg(name, pretrained):
        raise ModelError(
            f"--pretrained {pretrained} is neither a file nor a name of weights for {name}"
            + ("; a folder has no weights by itself, name a file in it." if Path(pretrained).is_dir() else ".")
        )
    try:
        return open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, pretrained), cache_dir=cache_dir)
    except Exception as error:  # of any kind, from the network or a full disk
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"The weights {pretrained} of {name} cannot be downloaded: {reason}") from error


def read(source: str | Path) -> dict[str, Any]:
    """What a file, or what a URL of any kind that fsspec knows stands for, holds: a checkpoint or a state dict.

    No code of the file is run. Of OpenAI's TorchScript archives the weights are returned.

    Raises:
        ModelError: there is no such file, or it is no checkpoint.
    """
    source = str(source)
    try:
        if "://" in source:
            import fsspec

            with fsspec.open(source, "rb") as file:
                content = _parse(file, source)
        else:
            content = _parse(source, source)
    except FileNotFoundError:
        raise ModelError(f"There is no checkpoint at {source}; check the path.") from None
    except ModelError:
        raise
    except Exception as error:  # a damaged file raises anything from EOFError to UnpicklingError
        text = str(error)
        held = re.search(r"GLOBAL (\S+) was not an allowed", text) or re.search(r"Unsupported (?:class|global):? (\S+)", text)
        if held:
            raise ModelError(
                f"{source} holds a Python object ({held[1]}), which is not read, for it could run code; save its "
                "weights alone, with torch.save(model.state_dict(), FILE)."
            ) from error
        reason = text.splitlines()[0] if text else type(error).__name__
        raise ModelError(f"{source} cannot be read as a checkpoint ({reason[:160]}); take another one.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{source} is not a checkpoint: it holds a {type(content).__name__}, not a dictionary.")
    return content


def _parse(file: Any, source: str) -> Any:
    if source.endswith(".safetensors"):
        import safetensors.torch as safetensors

        return safetensors.load_file(file) if isinstance(file, str) else safetensors.load(file.read())
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
        if scripted:  # TorchScript, as OpenAI's models are
            if not isinstance(file, str):
                file.seek(0)
            return torch.jit.load(file, map_location="cpu").state_dict()
    if not isinstance(file, str):
        file.seek(0)
    with torch.serialization.safe_globals([argparse.Namespace]):  # which many trainers keep beside the weights
        return torch.load(file, map_location="cpu", weights_only=True, mmap=isinstance(file, str))


def load(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    *,
    name: str = "this model",
    label: str | None = None,
    image_tower: bool = False,
    strict: bool = True,
) -> Report:
    """Fills a model from a file, or from what `read` returned for it.

    Prefixes and wrappers of other programs are taken off, transformers' and OpenAI's names are translated, and position
    embeddings are resized to the model's.

    Args:
        name: of the model, for what is said.
        label: of the source, for what is said.
        image_tower: take a file that holds an image tower alone too, as fine-tuning leaves it, without its head. Where
            it has lost the projection into the space of text, the model's is new.
        strict: every tensor of the model is in the file and every tensor of the file in the model, in the right shape;
            else, what fits is loaded.

    Raises:
        ModelError: the file cannot be read, or does not fit; the sentence names the first difference.
    """
    label = label or ("the checkpoint" if isinstance(source, Mapping) else str(source))
    if not isinstance(source, Mapping) and Path(source).suffix in (".npz", ".npy"):
        return _load_big_vision(model, str(source), name)
    state = tensors(read(source) if not isinstance(source, Mapping) else source, label)
    own, notes = model.state_dict(), []
    openai = "input_resolution" in state
    state = _own_names(state, model)
    tower_only = all(key.startswith(("visual.", "head.")) for key in state) and not all(k.startswith("visual.") for k in own)
    if tower_only and not image_tower:
        raise ModelError(
            f"{label} holds an image tower without a text tower"
            + (", fine-tuned for classification" if "head.weight" in state else "")
            + f", and {name} needs both here; training.linear_probe and training.finetune take it."
        )
    before = {key: value.shape for key, value in state.items()}
    try:
        resize_pos_embed(state, model)
        resize_text_pos_embed(state, model)
        _resize_trunk(state, model)
    except (AssertionError, AttributeError, RuntimeError):
        pass  # another shape altogether: told below
    resized = [key for key, value in state.items() if value.shape != before[key]]

    wrong = [key for key, value in state.items() if key in own and value.shape != own[key].shape]
    problems = [f"{key} is {_shape(state[key])} there and {_shape(own[key])} in the model" for key in wrong]
    new = [key for key in own if key not in state]
    unused = [key for key in state if key not in own]
    if tower_only:
        problems += [f"{k} is missing" for k in new if k.startswith("visual.") and not _PROJECTION.match(k)]
        problems += [f"{k} is unknown to the model" for k in unused if k.startswith("visual.")]
    else:
        problems += [f"{key} is missing" for key in new]
        problems += [f"{key} is unknown to the model" for key in unused if key != "logit_bias"]
    if strict and problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise ModelError(f"{label} does not fit {name}: {problems[0]}{more}; check --model and --pretrained.")
    fitting = {key: value for key, value in state.items() if key in own and key not in wrong}
    if not fitting:
        raise ModelError(f"{label} has nothing that fits {name}: the first of its names is {next(iter(state), None)}.")
    model.load_state_dict(fitting, strict=False)
    if openai and not any(isinstance(module, QuickGELU) for module in model.modules()):
        notes.append(f"{label} is OpenAI's, whose models are trained with QuickGELU: add --force-quick-gelu.")
    return Report(label, list(fitting), resized, unused + wrong, new + wrong, notes)


def tensors(content: Mapping[str, Any], label: str = "the checkpoint") -> dict[str, Tensor]:
    """The state dict in a checkpoint of this trainer or of another: below `state_dict`, `model`, ... or by itself."""
    inner = content
    while isinstance(inner, Mapping) and not any(isinstance(value, Tensor) for value in inner.values()):
        inner = next((inner[key] for key in _WRAPPERS if isinstance(inner.get(key), Mapping)), None)
    if not isinstance(inner, Mapping):
        raise ModelError(f"{label} holds no weights, only {_some(list(map(str, content)))}.")
    return {key: value for key, value in inner.items() if isinstance(value, Tensor)}


def _own_names(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Another program's names as OpenCLIP's, of the kind of model that it is for."""
    state = {_INSERTED.sub("", key): value for key, value in state.items()}
    for prefix in ("module.", "model.", "module."):  # DDP, Lightning, DDP within it
        if sum(key.startswith(prefix) for key in state) > len(state) / 2:
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if key not in _IGNORED}
    if "conv1.weight" in state and "class_embedding" in state:  # a ViT by itself
        state = {f"visual.{key}": value for key, value in state.items()}
    if any(key.startswith("vision_model.") for key in state):
        state = _from_transformers(state)
    state = convert_state_dict(model, state)
    plain_text = hasattr(model, "positional_embedding")
    if "positional_embedding" in state and not plain_text:
        state = convert_to_custom_text_state_dict(state)
    elif "text.positional_embedding" in state and plain_text:
        state = {key.removeprefix("text."): value for key, value in state.items()}
    for key in ("logit_scale", "logit_bias"):
        own = getattr(model, key, None)
        if key in state and own is not None and state[key].numel() == own.numel():
            state[key] = state[key].reshape(own.shape)
    if getattr(model, "logit_bias", None) is not None and "logit_scale" in state:  # not trained with it: none
        state.setdefault("logit_bias", torch.zeros_like(model.logit_bias, device="cpu"))
    return state


_TRANSFORMERS = (
    (r"^(vision|text)_model\.encoder\.layers\.", r"\1.transformer.resblocks."),
    (r"^(vision|text)_model\.(embeddings\.)?", r"\1."),
    (r"^vision\.class_embedding", "visual.class_embedding"),
    (r"^vision\.patch_embedding\.", "visual.conv1."),
    (r"position_embedding\.weight$", "positional_embedding"),
    (r"^vision\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision\.post_layernorm\.", "visual.ln_post."),
    (r"^text\.final_layer_norm\.", "ln_final."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_projection\.weight$", "text_projection"),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^vision\.", "visual."),
    (r"^text\.", ""),
)


def _from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' CLIPModel: queries, keys and values apart, projections transposed."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith("position_ids") or re.search(r"\.[kv]_proj\.", key):
            continue
        if ".q_proj." in key:
            value = torch.cat([state[key.replace(".q_proj.", f".{one}_proj.")] for one in "qkv"])
            key = key.replace(".q_proj.", ".in_proj_")
        if key in ("visual_projection.weight", "text_projection.weight"):
            value = value.T
        for pattern, replacement in _TRANSFORMERS:
            key = re.sub(pattern, replacement, key)
        found[key] = value
    return found


def _resize_trunk(state: dict[str, Tensor], model: nn.Module) -> None:
    """Position embeddings of timm's ViT, as its own `set_input_size` does it."""
    key, own = "visual.trunk.pos_embed", getattr(getattr(model.visual, "trunk", None), "pos_embed", None)
    if own is None or key not in state or state[key].shape == own.shape:
        return
    from timm.layers import resample_abs_pos_embed

    trunk = model.visual.trunk
    prefix = 0 if getattr(trunk, "no_embed_class", False) else trunk.num_prefix_tokens
    size = list(trunk.patch_embed.grid_size)
    state[key] = resample_abs_pos_embed(state[key], new_size=size, num_prefix_tokens=prefix)


def _load_big_vision(model: nn.Module, path: str, name: str) -> Report:
    try:
        load_big_vision_weights(model, path)
    except Exception as error:  # KeyError, AssertionError, AttributeError: it is written for SigLIP's models alone
        raise ModelError(f"{path} cannot be read as big_vision's weights for {name} ({type(error).__name__}).") from error
    return Report(path, list(model.state_dict()))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a scalar"
