"""Small blocks, models and inputs for the tests of this folder."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

VISION = {"image_size": 32, "patch_size": 8, "layers": 4, "width": 32, "head_width": 16}
TEXT = {"context_length": 12, "vocab_size": 64, "layers": 2, "width": 24, "heads": 2}
REDUCTION = {"method": "elip", "depths": [1, 1, 1, 1], "keep_ratio": [1.0, 0.8, 0.5, 0.3]}


def random_blocks(depth: int, width: int = 16, heads: int = 2, layer_scale: float | None = None) -> nn.ModuleList:
    """Transformer blocks in float64 whose attention is far from uniform, and no parameter of which is zero."""
    blocks = nn.ModuleList(
        ResidualAttentionBlock(width, heads, ls_init_value=layer_scale) for _ in range(depth)
    ).double()
    with torch.no_grad():
        for name, parameter in blocks.named_parameters():
            if name.endswith("in_proj_weight"):
                parameter.normal_(std=1.5 * width**-0.5)
            elif parameter.ndim == 2:
                parameter.normal_(std=0.7 * parameter.shape[1] ** -0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return blocks


def config(**overrides: Any) -> dict[str, Any]:
    """An OpenCLIP model configuration of toy size; `vision` and `text` update the towers' parts."""
    vision, text = overrides.pop("vision", {}), overrides.pop("text", {})
    return {"embed_dim": 20, "vision_cfg": {**VISION, **vision}, "text_cfg": {**TEXT, **text}, **overrides}


def plain_model(custom_text: bool = False, **overrides: Any) -> nn.Module:
    """A plain OpenCLIP model of toy size, float64, train mode, with sizeable weights."""
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    model = kind(**config(**overrides), output_dict=True).double()
    enliven(model)
    return model.train()


def enliven(model: nn.Module) -> None:
    """Give every parameter that starts at a constant some noise, so that no gradient vanishes by symmetry."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 1:
                parameter.add_(0.1 * torch.randn_like(parameter))


def pairs(
    batch: int = 3, image_size: int | tuple[int, int] = 32, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Random images (B, 3, H, W) and captions (B, 12) whose last token has the highest id (OpenCLIP's end of text)."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    text = torch.zeros(batch, TEXT["context_length"], dtype=torch.long)
    for sample in range(batch):
        length = 4 + sample % 6
        text[sample, :length] = torch.randint(1, TEXT["vocab_size"] - 1, (length,))
        text[sample, length] = TEXT["vocab_size"] - 1
    return torch.randn(batch, 3, height, width, dtype=dtype), text


def contrastive_loss(output: dict[str, Tensor]) -> Tensor:
    """CLIP's loss on one process, written out."""
    logits = output["logit_scale"] * output["image_features"] @ output["text_features"].T
    target = torch.arange(len(logits), device=logits.device)
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
