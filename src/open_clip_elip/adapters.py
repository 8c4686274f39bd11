"""Adapters: a model whose layers stay as they are, and learn by a few weights beside them.

LoRA (Hu et al., ICLR 2022) is added to attention's weights, and merged where a file of it is read. A bottleneck
(Houlsby et al., ICML 2019) follows each sublayer, inside of the residual branch. Beside them heads, projections and the
temperature are trained. A state dict has the plain model's keys, and the adapters'.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ModelError

KINDS = {"lora": 8, "bottleneck": 64}  # and the usual rank
BASE = "base_layer"  # peft's name for what an adapter is put around
_ADAPTER = re.compile(r"\.(lora_[AB]|adapter_(down|up))\.")
_FROZEN = re.compile(
    r"(resblocks|layers?|fusion|decoder)\.\d+\.|(^|\.)(embeddings|conv1|ln_pre|ln_post|ln_final|token_embedding)\."
    r"|(class|positional)_embedding$"
)
_NEW = re.compile(r"crossattention|cross_modal_")


class Bottleneck(nn.Module):
    """In the place of `after`, which comes behind a sublayer's last projection (layer scale, dropout): x + U gelu(D x)
    goes through it. U begins at zero."""

    def __init__(self, after: nn.Module, width: int, rank: int, like: Tensor):
        super().__init__()
        self.base_layer, made = after, {"device": like.device, "dtype": like.dtype}
        self.adapter_down, self.adapter_up = nn.Linear(width, rank, **made), nn.Linear(rank, width, **made)
        nn.init.zeros_(self.adapter_up.weight)
        nn.init.zeros_(self.adapter_up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x + self.adapter_up(F.gelu(self.adapter_down(x))))


def adapt(model: nn.Module, kind: str, rank: int) -> None:
    """Puts adapters into both towers and the fusion layers, in place, and freezes what they adapt.

    Raises ValueError: a tower has no layers of OpenCLIP's or BERT's kind, or peft is not installed.
    """
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    places = [(parent, *child) for parent in model.modules() for child in parent.named_children()]
    if kind == "lora":
        from .lora import inject  # which imports peft

        inject(model, rank)
    else:
        for module in list(model.modules()):
            _put_bottlenecks(module, rank)
    around = {id(getattr(module, BASE)): module for module in model.modules() if hasattr(module, BASE)}
    for parent, name, child in places:  # what several layers share
        if id(child) in around and around[id(child)] is not parent:
            setattr(parent, name, around[id(child)])
    for module in around.values():
        module.register_state_dict_post_hook(_to_plain)
        module.register_load_state_dict_pre_hook(_from_plain)
    adapted = {name.startswith("visual.") for name, _ in model.named_parameters() if is_adapter(name)}
    if len(adapted) < 2:
        tower = "text" if adapted == {True} else "image"
        raise ValueError(f"Adapters are for OpenCLIP's own transformers and BERT's, not for this {tower} tower.")
    for name, p in model.named_parameters():
        p.requires_grad_(is_adapter(name) or (id(p) in trained and not _FROZEN.search(name)))


def train_new(model: nn.Module) -> None:
    """Trains whole what no image tower or BERT has weights for: cross-attention, and METER's streams."""
    for name, p in model.named_parameters():
        if _NEW.search(name):
            p.requires_grad_()


def is_adapter(name: str) -> bool:
    return _ADAPTER.search(name) is not None


def merged(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with its LoRA in the weights: W + B A."""
    found = dict(state)
    for name in state:
        place, is_down, rest = name.partition(".lora_A.")
        weight = next((key for key in (f"{place}.in_proj_weight", f"{place}.weight") if key in state), None)
        if is_down and weight is not None:
            up = found.pop(f"{place}.lora_B.{rest}")
            found[weight] = state[weight] + (up @ found.pop(name)).to(state[weight].dtype)
    return found


def check_adapters(names: Iterable[str], own: Mapping[str, Tensor], source: str) -> None:
    """ModelError for adapters in a file's weights where a model, whose own weights these are, has none."""
    if any(".adapter_" in name and name not in own for name in names):
        raise ModelError(f"{source} has bottleneck adapters, which cannot be merged: add --adapter bottleneck.")


def _put_bottlenecks(module: nn.Module, rank: int) -> None:
    parts = module._modules
    if {"ln_1", "attn", "ls_1", "ls_2", "mlp"} <= parts.keys():  # a block of OpenCLIP's
        weight, places = module.attn.out_proj.weight, ("ls_1", "ls_2")
    elif {"LayerNorm", "dropout"} <= parts.keys() and any(name.startswith("dense") for name in parts):  # of BERT's kind
        weight, places = module.LayerNorm.weight, ("dropout",)
    else:
        return
    for name in places:
        setattr(module, name, Bottleneck(parts[name], len(weight), rank, weight))


def _to_plain(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    inner = f"{prefix}{BASE}."
    for name in [name for name in state if name.startswith(inner)]:
        state[prefix + name.removeprefix(inner)] = state.pop(name)


def _from_plain(module: nn.Module, state: dict[str, Any], prefix: str, *more: Any) -> None:
    own = tuple(f"{prefix}{name}." for name in module._modules if name != BASE)
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(own)]:
        state[f"{prefix}{BASE}.{name.removeprefix(prefix)}"] = state.pop(name)
