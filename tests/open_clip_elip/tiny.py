"""Small blocks, models and inputs for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import pytest
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
    """By the names of the model below what torch.compile wraps around it."""
    named = getattr(model, "_orig_mod", model).named_parameters()
    return {name: None if p.grad is None else p.grad.clone() for name, p in named}


def step(
    model: nn.Module, image: Tensor, text: Tensor, forward: Callable | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Output and gradients of one training step, by the model or by what stands for it, from a clean slate."""
    model.zero_grad()
    output = (forward or model)(image, text)
    contrastive_loss(output).backward()
    return {key: value.detach() for key, value in output.items()}, gradients(model)


def seen_lengths(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[list[tuple[float, float]], dict]:
    """(in attention, in MLP) of each layer in its last run without shortcuts, tokens per image; and the output."""
    model.tower.shortcuts, images = False, len(batch[0])
    blocks = model.visual.transformer.resblocks
    lengths, hooks = [[0.0, 0.0] for _ in blocks], []
    for layer, block in enumerate(blocks):
        for half, norm in enumerate((block.ln_1, block.ln_2)):

            def write(_, args, layer=layer, half=half):
                lengths[layer][half] = args[0].shape[:-1].numel() / images

            hooks.append(norm.register_forward_pre_hook(write))
    output = model(*batch)
    for hook in hooks:
        hook.remove()
    return [tuple(pair) for pair in lengths], output


def seeded(function: Callable, *args: Any, seed: int = 7) -> Any:
    torch.manual_seed(seed)
    return function(*args)


def assert_images_train_their_own_tower_only(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    model(*batch)["image_features"].square().mul(torch.rand(20, dtype=torch.float64)).sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("visual."):
            assert parameter.grad is not None and parameter.grad.any(), name
        else:
            assert parameter.grad is None or not parameter.grad.any(), name


def assert_one_sentence(error: pytest.ExceptionInfo) -> None:
    text = str(error.value)
    assert len(text) > 10 and "\n" not in text and text.rstrip("?.") != text, text
