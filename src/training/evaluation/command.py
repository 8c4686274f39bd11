"""What the evaluation commands have in common: loading the model, and how they report."""
from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from open_clip_elip import with_shortcuts
from open_clip_elip.clip import SHORTCUT, TextFirst

from .. import checkpoint
from ..data.transforms import with_decoding
from ..distributed import Ranks
from ..errors import UserError
from .options import EvaluationOptions
from ..options.model import reduction_of
from .passes import EncodeSettings
from .results import Results

_MODEL_FLAGS = (
    "force_quick_gelu", "force_custom_text", "force_image_size", "force_context_length",
    "image_mean", "image_std", "image_interpolation", "image_resize_mode",
)  # fmt: skip


@dataclass
class LoadedModel:
    """A model with its weights, ready to evaluate.

    Attributes:
        model: on the device, in eval mode.
        tokenizer, preprocess: its tokenizer and evaluation transform.
        transform_key: what the transform does, as text, for cache keys.
        weights_hash: 16 hexadecimal digits that tell these weights from any others, wherever they came from.
        name, pretrained: as given on the command line.
    """

    model: nn.Module
    tokenizer: Callable
    preprocess: Callable
    transform_key: str
    weights_hash: str
    name: str
    pretrained: str | None


def load_model(args: EvaluationOptions, ranks: Ranks) -> LoadedModel:
    """The model of `--model` and `--pretrained`; for the block of a `ranks.agree()`.

    Raises:
        UserError: no such model, or weights that cannot be had or do not fit.
    """
    from .. import models as model_setup  # registers the models with token reduction

    config = _config_of(args.pretrained)
    if args.model is None:
        args.model = config.get("model")
    if args.model is None and args.pretrained is not None and not Path(args.pretrained).is_file():
        raise UserError(f"--pretrained {args.pretrained} is not a file; correct the path, or add --model.")
    if args.model is None:
        raise UserError("--model is missing, and only a checkpoint of this trainer as --pretrained tells it by itself.")
    if ":" not in args.model:  # local-dir:... and hf-hub:... bring their weights along
        name = args.model.replace("/", "-")
        model_setup.check_model_name(name)
        if args.pretrained is None:
            raise UserError("--pretrained is missing: give a checkpoint file or the name of pretrained weights.")
        if not Path(args.pretrained).is_file() and not open_clip.is_pretrained_cfg(name, args.pretrained):
            raise UserError(f"--pretrained {args.pretrained} is neither a file nor a name of weights for {args.model}.")
    if args.ema and not (args.pretrained and Path(args.pretrained).is_file()):
        raise UserError("--ema needs a checkpoint file of this trainer as --pretrained.")
    changes = {}
    if config.get("model") == args.model:
        changes = _changes_of(config)
        saved = SimpleNamespace(model=args.model, token_reduction=reduction_of(config))
        reduction = model_setup.reduction_config(saved) if args.vision_guided_reduction else None
        changes |= {} if reduction is None else {"token_reduction": reduction}
    replaced = model_setup.replaces_weights(args.model, args.pretrained)
    with model_setup.creating(args.model, args.pretrained):
        model, _, preprocess = open_clip.create_model_and_transforms(
            args.model,
            args.pretrained,
            precision=args.precision,
            device=ranks.device,
            require_pretrained=not replaced,
            load_weights=not replaced,
            **changes,
        )
        tokenizer = open_clip.get_tokenizer(args.model, context_length=changes.get("force_context_length"))
    if replaced:
        model_setup.load_replacement(model, args.pretrained)
    if type(model) in SHORTCUT:
        model = with_shortcuts(model)
    if args.vision_guided_reduction:
        if not isinstance(model, TextFirst):
            raise UserError(f"--vision-guided-reduction needs a model with token reduction; {args.model} has none.")
        if not model.reduction.works_alone:
            raise UserError("--vision-guided-reduction is for elip, evit and tome, not for this model's method.")
        model.vision_guided = True
    if args.ema:
        averages = checkpoint.load(args.pretrained).get("ema")
        if not averages:
            raise UserError(f"{args.pretrained} has no averaged weights (--ema-decay was off); leave out --ema.")
        checkpoint.load_weights(model, averages, args.pretrained)
    preprocess = with_decoding(preprocess, args.image_decode)
    weights = hash_weights(model.state_dict())
    return LoadedModel(model.eval(), tokenizer, preprocess, repr(preprocess), weights, args.model, args.pretrained)


def _config_of(pretrained: str | None) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint of this trainer; {} for any other weights."""
    if pretrained is None or not Path(pretrained).is_file():
        return {}
    try:
        return checkpoint.load(pretrained).get("config") or {}
    except UserError:  # other formats that open_clip reads, such as safetensors
        return {}


def _changes_of(config: dict[str, Any]) -> dict[str, Any]:
    """The flags of a run that made its model or transform another than the one its name stands for."""
    changes = {name: config[name] for name in _MODEL_FLAGS if config.get(name) not in (None, False)}
    size = changes.get("force_image_size")
    if isinstance(size, (list, tuple)) and len(size) == 1:
        changes["force_image_size"] = size[0]
    if config.get("siglip"):
        changes["init_logit_bias"] = 0.0  # gives the model the parameter that the weights fill
    return changes


def hash_weights(state_dict: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of the SHA-256 of a state dict: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(state_dict.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def image_encoder(model: nn.Module, args: EvaluationOptions, normalize: bool) -> Callable[[Tensor], Tensor]:
    """(B, 3, H, W) to float32 image features (B, D), with all tokens; compiled with `--compile`."""

    def encode(images: Tensor) -> Tensor:
        return model.encode_image(images, normalize=normalize).float()

    return torch.compile(encode) if args.torchcompile else encode


def encode_settings(args: EvaluationOptions, description: str) -> EncodeSettings:
    progress = sys.stderr.isatty() if args.progress is None else args.progress
    return EncodeSettings(args.batch_size, args.workers, args.precision, args.on_broken, progress, description)


def open_results(args: EvaluationOptions, ranks: Ranks) -> Results:
    return Results(None if args.results.lower() == "none" else Path(args.results), ranks, args.redo)


def described(args: EvaluationOptions, command: str, loaded: LoadedModel) -> dict:
    """The part of a result's description that every command has; see `Results`."""
    return {
        "command": command,
        "model": loaded.name,
        "pretrained": loaded.pretrained,
        "weights": loaded.weights_hash,
        "settings": {
            "precision": args.precision,
            "transform": loaded.transform_key,
            "on_broken": args.on_broken,
            "vision_guided_reduction": args.vision_guided_reduction,
        },
    }


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left and the others to the right; `rows` begins with the headings."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(pairs)).rstrip()
        for pairs in (zip(row, widths, strict=True) for row in rows)
    )

