"""Names of the weights in the files that the authors of ALBEF, BLIP and METER released, and ours; both ways.

Files of DeiT and of timm's ViT name the image tower's weights like the released ones, without their prefix.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# (released, ours), inside of the image tower, and in front of the others' names.
_IMAGE = (
    ("patch_embed.proj.", "conv1."), ("cls_token", "class_embedding"), ("pos_embed", "positional_embedding"),
    ("blocks.", "transformer.resblocks."), (".norm1.", ".ln_1."), (".norm2.", ".ln_2."),
    (".attn.qkv.", ".attn.in_proj_"), (".attn.proj.", ".attn.out_proj."), (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."), ("norm.", "ln_post."),
)  # fmt: skip
# Whatever has a momentum copy has it as NAME_m.
_PARTS = (
    "visual_encoder", "text_encoder", "text_decoder", "vision_proj", "text_proj", "itm_head", "cls_head", "ta_head",
    "temp", "vit_model", "text_transformer", "token_type_embeddings", "mlm_score", "itm_score", "rank_output",
    "vqa_classifier", "nlvr2_classifier", "snli_classifier",
    *(f"cross_modal_{one}_{part}" for one in ("text", "image") for part in ("transform", "layers", "pooler")),
)  # fmt: skip
# A decoder's weights are others', tied; of CLIP's text tower and BERT's pooler METER's files have remains without use.
_NO_WEIGHT = re.compile(
    r"position_ids$|cls\.predictions\.decoder\.|^vit_model\.(positional_embedding|ln_final\.)|^text_transformer\.pooler\."
)
_ALBEF = (
    (r"^text_encoder\.(bert\.)?embeddings\.", "text.embeddings."), (r"^text_encoder\.cls\.", "mlm_head."),
    (r"^text_decoder\.bert\.embeddings\.", "embeddings."), (r"^text_decoder\.bert\.encoder\.layer\.", "decoder."),
    (r"^text_decoder\.cls\.", "lm_head."), (r"^(cls|ta)_head\.", "head."),
)  # fmt: skip
_TOWERS = ("visual_encoder.", "text_encoder.", "text_decoder.", "vit_model.", "text_transformer.")
_LAYER = re.compile(r"text_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\.")
_BLIP = (("text_encoder.", "text."), ("text_decoder.", "decoder."), ("cls_head.", "head."))
_METER = (
    ("vit_model.visual.", "visual."), ("text_transformer.", "text."), ("mlm_score.transform.", "mlm_head.0."),
    ("mlm_score.decoder.", "mlm_head.1."), ("mlm_score.bias", "mlm_head.1.bias"), ("itm_score.fc.", "itm_head."),
    ("vqa_classifier.", "head."), ("nlvr2_classifier.", "head."), ("snli_classifier.", "head."),
)  # fmt: skip


class Names(NamedTuple):
    """A family's, of all but the image tower."""

    ours: Callable[[str], str]
    released: Callable[[str], str]
    heads: tuple[tuple[str, str], ...]  # ours, of language heads and of the embeddings that they are tied to


class Released(NamedTuple):
    """A released file: weights of the model and of its momentum twin by our names; the rest by its own."""

    model: dict[str, Tensor]
    twin: dict[str, Tensor]
    rest: dict[str, Tensor]


def albef(fusion_layer: int) -> Names:
    """fusion_layer: the first of BERT's layers that looks at the image."""

    def ours(name: str) -> str:
        if layer := _LAYER.match(name):
            number, rest = int(layer[1]), name[layer.end() :]
            fused = f"fusion.{number - fusion_layer}.{rest}"
            return fused if number >= fusion_layer else f"text.encoder.layer.{number}.{rest}"
        for released, own in _ALBEF:
            name = re.sub(released, own, name)
        return name

    def released(name: str) -> str:
        part, _, rest = name.partition(".")
        if part == "fusion":
            number, _, rest = rest.partition(".")
            return f"text_encoder.bert.encoder.layer.{int(number) + fusion_layer}.{rest}"
        starts = {"text": "text_encoder.bert", "mlm_head": "text_encoder.cls"}
        return f"{starts[part]}.{rest}" if part in starts else name

    return Names(ours, released, (("mlm_head.", "text."), ("lm_head.", "")))


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for one, other in pairs:
        if name.startswith(one):
            return other + name.removeprefix(one)
    return name


def _table(pairs: tuple[tuple[str, str], ...], heads: tuple[tuple[str, str], ...] = ()) -> Names:
    back = tuple(pair[::-1] for pair in sorted(pairs, key=lambda pair: -len(pair[1])))
    return Names(lambda name: _renamed(name, pairs), lambda name: _renamed(name, back), heads)


BLIP, METER = _table(_BLIP, (("decoder.cls.", "decoder.bert."),)), _table(_METER)


def read_released(state: Mapping[str, Tensor], names: Names) -> Released:
    """The weights of a released file, of pre-training or of a task; those by our names are taken as they are."""
    found = Released({}, {}, {})
    if not any(name.startswith(_TOWERS) for name in state):
        return Released(dict(state), {}, {})
    for name, value in state.items():
        part, dot, rest = name.partition(".")
        if _NO_WEIGHT.search(name):
            continue
        if part.removesuffix("_m") in _PARTS:
            place = found.twin if part.endswith("_m") else found.model
            own, value = _ours(part.removesuffix("_m") + dot + rest, value, names)
            place[own] = value
        else:
            found.rest[name] = value
    for one in found[:2]:
        for head, embeddings in names.heads:
            if (bias := one.get(f"{head}predictions.bias")) is not None:
                one[f"{head}predictions.decoder.bias"] = bias
                words = f"{embeddings}embeddings.word_embeddings.weight"
                one |= {f"{head}predictions.decoder.weight": one[words]} if words in one else {}
    return found


def write_released(model: Mapping[str, Tensor], twin: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Weights of a model of pre-training and of its momentum twin by their released names: `read_released` undone.

    The queues are not among them. What the twin of the release has no copy of is left out: temperature, matching head.
    """
    found = {}
    for state, suffix in ((model, ""), (twin, "_m")):
        for name, value in state.items():
            name, value = _released(name, value, names)
            part, dot, rest = name.partition(".")
            if not suffix or part not in ("temp", "itm_head"):
                found[part + suffix + dot + rest] = value
    for name, value in list(found.items()):
        if name.endswith("embeddings.position_embeddings.weight"):
            found[name.replace("position_embeddings.weight", "position_ids")] = torch.arange(len(value))[None]
    return found


def _released(name: str, value: Tensor, names: Names) -> tuple[str, Tensor]:
    part, _, rest = name.partition(".")
    if part != "visual" or names is METER:  # whose image tower has OpenCLIP's names
        return names.released(name), value
    value = {"class_embedding": value.view(1, 1, -1), "positional_embedding": value[None]}.get(rest, value)
    for released, ours in reversed(_IMAGE):
        rest = re.sub(rf"(^|(?<=\.)){re.escape(ours.lstrip('.'))}", released.lstrip("."), rest)
    return f"visual_encoder.{rest}", value


def _ours(name: str, value: Tensor, names: Names) -> tuple[str, Tensor]:
    if not name.startswith("visual_encoder."):
        return names.ours(name), value
    name = name.removeprefix("visual_encoder.")
    for released, ours in _IMAGE:
        name = name.replace(released, ours)
    shape = {"class_embedding": (-1,), "positional_embedding": value.shape[1:]}.get(name, value.shape)
    return f"visual.{name}", value.reshape(shape)
