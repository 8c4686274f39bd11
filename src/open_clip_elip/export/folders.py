"""Folders that open_clip, transformers and timm load by themselves. Each writer returns what reads it back."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import open_clip
import timm
import torch
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from open_clip.model import CLIPVisionCfg
from open_clip.push_to_hf_hub import save_config_for_hf
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn.functional import normalize

from .. import hugging_face
from ..identity import creating
from .source import Source

Reader = Callable[[Tensor, Tensor], dict[str, Tensor]]


def write_open_clip(source: Source, out: Path) -> Reader:
    """`local-dir:OUT`, or a repository's files for `hf-hub:`, with the tokenizer if it is one of Hugging Face's."""
    out.mkdir()
    save_config_for_hf(source.model, out / HF_CONFIG_NAME, source.identity.config)
    save_file({name: v.clone(memory_format=torch.contiguous_format) for name, v in source.model.state_dict().items()},
              out / HF_SAFE_WEIGHTS_NAME)  # fmt: skip
    if hasattr(source.tokenizer, "save_pretrained"):
        source.tokenizer.save_pretrained(out)
    with creating(f"local-dir:{out}"):
        model = open_clip.create_model(f"local-dir:{out}", output_dict=True).eval()
    return lambda image, text: {key: model(image, text)[key] for key in ("image_features", "text_features")}


def write_transformers(source: Source, out: Path) -> Reader:
    """A CLIPModel with its processor: tokenizer and picture transform."""
    transformers = hugging_face.package()
    transformers.utils.logging.disable_progress_bar()
    own = {name.removeprefix("text."): value for name, value in source.model.state_dict().items()}
    state = hugging_face.to_transformers(own)
    model = transformers.CLIPModel(hugging_face.clip_config(source.identity.config))
    _fill(model, state, "CLIPModel")
    model.save_pretrained(out)
    hugging_face.processor(source.identity, source.tokenizer).save_pretrained(out)
    read = transformers.CLIPModel.from_pretrained(out).eval()

    def compare(image: Tensor, text: Tensor) -> dict[str, Tensor]:
        found = read(pixel_values=image, input_ids=text)
        return {"image_features": found.image_embeds, "text_features": found.text_embeds}

    return compare


def write_timm(source: Source, out: Path) -> Reader:
    """The image tower as timm's ViT; its classifier is the projection into CLIP's space."""
    visual = source.model.visual
    if not isinstance(visual, VisionTransformer):
        raise ValueError(f"its image tower is a {type(visual).__name__}, not OpenCLIP's own ViT")
    config = source.identity.config["vision_cfg"]
    vision = CLIPVisionCfg(**{one.name: config[one.name] for one in fields(CLIPVisionCfg) if one.name in config})
    shape = {
        "img_size": vision.image_size, "patch_size": vision.patch_size, "embed_dim": vision.width,
        "depth": vision.layers, "num_heads": vision.width // vision.head_width, "mlp_ratio": vision.mlp_ratio,
        "num_classes": visual.output_dim,
    }  # fmt: skip
    kind = "quickgelu_" if source.identity.config.get("quick_gelu") else ""
    model = timm.create_model(f"vit_base_patch16_clip_{kind}224", **shape)
    visible = {f"visual.{name}": value for name, value in visual.state_dict().items()}
    _fill(model, checkpoint_filter_fn(visible, model), "timm's ViT")
    pictures = source.identity.preprocess
    seen = {"mean": pictures["mean"], "std": pictures["std"], "interpolation": pictures["interpolation"],
            "input_size": [3, *pictures["size"]], "crop_pct": 1.0}  # fmt: skip
    timm.models.save_for_hf(model, out, {"pretrained_cfg": seen}, shape, safe_serialization=True)
    read = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    return lambda image, text: {"image_features": normalize(read(image), dim=-1)}


def _fill(model: nn.Module, state: dict[str, Tensor], what: str) -> None:
    own = model.state_dict()
    for name in (*state, *own):
        if name not in own or name not in state:
            raise ValueError(f"{what} has no {name}" if name in state else f"it has no {name}, which {what} has")
    model.load_state_dict(state)
