"""CLIP as transformers has it: the same model under other names, with query, key and value apart.

Its names are those of `CLIPModel` and `CLIPVisionModelWithProjection`; ours those of `open_clip.CLIP`.
"""
from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer
from open_clip.utils import to_2tuple
from torch import Tensor

# Where names begin, here and there.
_BEGINNINGS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # as it is spelt there
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
# Within a layer, but for what is packed here.
_LAYER = {
    ".ln_1.": ".layer_norm1.", ".ln_2.": ".layer_norm2.", ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.", ".mlp.c_proj.": ".mlp.fc2.",
}  # fmt: skip
_PACKED = re.compile(r"(.*\.layers\.\d+)\.attn\.in_proj_(weight|bias)")
_APART = re.compile(r"(.*\.layers\.\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers
_TRANSPOSED = ("visual.proj", "text_projection")


def is_clip(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of transformers' CLIP, of its image tower at least."""
    return "vision_model.pre_layrnorm.weight" in state


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers' CLIP under the names of `open_clip.CLIP`; names that are not its own stay."""
    found: dict[str, Tensor] = {}
    apart: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if name.endswith(".position_ids"):  # of older versions
            continue
        if part := _APART.fullmatch(name):
            packed = _exchange(f"{part[1]}.attn.in_proj_{part[3]}", _turned(_BEGINNINGS), {})
            apart.setdefault(packed, {})[part[2]] = value
            continue
        name = _exchange(name, _turned(_BEGINNINGS), _turned(_LAYER))
        found[name] = value.t() if name in _TRANSPOSED else value
    return found | {name: torch.cat([of[x] for x in "qkv"]) for name, of in apart.items() if len(of) == 3}


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way round; a ValueError names the first for which there is no place."""
    found = {}
    for own, value in state.items():
        name = _exchange(own, _BEGINNINGS, _LAYER)
        if packed := _PACKED.fullmatch(name):
            for which, part in zip("qkv", value.chunk(3), strict=True):
                found[f"{packed[1]}.self_attn.{which}_proj.{packed[2]}"] = part
        elif name == own and own != "logit_scale":
            raise ValueError(f"transformers' CLIPModel has no place for {own}")
        else:
            found[name] = value.t() if own in _TRANSPOSED else value
    return {name: value.contiguous() for name, value in found.items()}


def _exchange(name: str, beginnings: Mapping[str, str], within: Mapping[str, str]) -> str:
    for old, new in beginnings.items():
        if name == old or (old.endswith(".") and name.startswith(old)):
            name = new + name.removeprefix(old)
            for part, other in within.items():
                name = name.replace(part, other)
            break
    return name


def _turned(names: Mapping[str, str]) -> dict[str, str]:
    return {there: here for here, there in names.items()}


def read_config(folder: str | Path) -> dict[str, Any]:
    """What open_clip_config.json would say of the CLIPModel in a folder; a ValueError if it is another model, or has
    what OpenCLIP's CLIP has not."""
    folder = Path(folder)
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "architecture" in found:
        what = f"it is timm's {found['architecture']}, an image tower without a text tower"
        raise ValueError(f"{what}; only ALBEF and BLIP start from timm's ViTs, with --start-image FILE")
    if (kind := found.get("model_type")) is None:
        raise ValueError("its config.json is not of transformers, and there is no open_clip_config.json")
    if kind != "clip":
        raise ValueError(f"it is a {kind!r} of transformers, where only 'clip' (CLIPModel) has CLIP's parts")
    whole = package().CLIPConfig.from_pretrained(folder)
    vision, text = whole.vision_config, whole.text_config
    for name in ("hidden_act", "layer_norm_eps"):
        if getattr(vision, name) != getattr(text, name):
            raise ValueError(f"its towers differ in {name}, which OpenCLIP's do not")
    if vision.hidden_act not in ("gelu", "quick_gelu") or vision.layer_norm_eps != 1e-5:
        raise ValueError(f"OpenCLIP has no hidden_act {vision.hidden_act} with layer_norm_eps {vision.layer_norm_eps}")
    config = {
        "embed_dim": whole.projection_dim,
        "quick_gelu": vision.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size, "patch_size": vision.patch_size, "layers": vision.num_hidden_layers,
            "width": vision.hidden_size, "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings, "vocab_size": text.vocab_size, "width": text.hidden_size,
            "heads": text.num_attention_heads, "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
        },
    }  # fmt: skip
    if text.vocab_size != CLIPTextCfg.vocab_size:  # not CLIP's own words
        config["text_cfg"]["hf_tokenizer_name"] = str(folder)
    if text.eos_token_id not in (2, text.vocab_size - 1):  # 2 stands for the highest number there
        config["text_cfg"] |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    return {"model_cfg": config, "preprocess_cfg": _preprocess(folder)}


def _preprocess(folder: Path) -> dict[str, Any]:
    """As OpenCLIP's `preprocess_cfg`; {}, for its defaults, where the folder says nothing."""
    try:
        found = package().CLIPImageProcessor.from_pretrained(folder)
    except OSError:
        return {}
    named = {kind: name for name, kind in _RESAMPLE.items()}
    if found.resample not in named:
        raise ValueError(f"it resizes pictures by resample {found.resample}; OpenCLIP has 2 and 3")
    mode = "shortest" if found.size.get("shortest_edge") else "squash"
    means = {"mean": list(found.image_mean), "std": list(found.image_std)}
    return {**means, "interpolation": named[found.resample], "resize_mode": mode}


def processor(identity: Any, tokenizer: Any) -> Any:
    """CLIPProcessor: pictures and captions as a model takes them; a ValueError if there is none that does it so."""
    known, seen, side = package(), identity.preprocess, identity.preprocess["size"]
    if isinstance(tokenizer, SimpleTokenizer):
        ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
        vocab = {ends.get(word, word): number for word, number in tokenizer.encoder.items()}
        words = known.CLIPTokenizer(vocab, list(tokenizer.bpe_ranks), model_max_length=tokenizer.context_length)
    else:
        words = tokenizer.tokenizer
    if seen["resize_mode"] not in ("shortest", "squash") or seen["interpolation"] not in _RESAMPLE:
        raise ValueError(f"there, pictures are not resized at the {seen['resize_mode']} side, {seen['interpolation']}")
    whole = {"height": side[0], "width": side[1]}
    pictures = known.CLIPImageProcessor(
        size={"shortest_edge": min(side)} if seen["resize_mode"] == "shortest" else whole, crop_size=whole,
        resample=_RESAMPLE[seen["interpolation"]], image_mean=seen["mean"], image_std=seen["std"],
    )  # fmt: skip
    return known.CLIPProcessor(pictures, words)


def clip_config(config: Mapping[str, Any]) -> Any:
    """transformers' CLIPConfig for OpenCLIP's configuration of a model; what it has no word for is left out."""
    parts = (config["vision_cfg"], CLIPVisionCfg), (config["text_cfg"], CLIPTextCfg)
    vision, text = (kind(**{one.name: of[one.name] for one in fields(kind) if one.name in of}) for of, kind in parts)
    if len({*to_2tuple(vision.image_size)}) > 1:
        raise ValueError("there, pictures are square")
    shared = {
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu", "projection_dim": config["embed_dim"],
    }  # fmt: skip
    return package().CLIPConfig(
        projection_dim=config["embed_dim"],
        vision_config={
            "hidden_size": vision.width, "intermediate_size": int(vision.width * vision.mlp_ratio),
            "num_hidden_layers": vision.layers, "num_attention_heads": vision.width // vision.head_width,
            "image_size": vision.image_size, "patch_size": vision.patch_size, **shared,
        },
        text_config={
            "hidden_size": text.width, "intermediate_size": int(text.width * text.mlp_ratio),
            "num_hidden_layers": text.layers, "num_attention_heads": text.heads, "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length, "pad_token_id": 0, "bos_token_id": text.vocab_size - 2,
            "eos_token_id": text.vocab_size - 1 if text.pool_type == "argmax" else text.eos_id, **shared,
        },
    )  # fmt: skip


def package() -> Any:
    """The package transformers; a ValueError if it is not installed."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ValueError("it needs transformers: pip install 'open_clip_elip[fusion]' brings it") from error
    return transformers
