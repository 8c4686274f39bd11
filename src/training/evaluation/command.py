"""What the evaluation commands have in common: their options, loading the model, and how they end."""
from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import open_clip
import torch
from torch import Tensor, nn

from open_clip_elip import with_shortcuts
from open_clip_elip.clip import SHORTCUT, TextFirst

from .. import checkpoint
from ..data.pixels import FAST, PLAIN, REDUCED
from ..data.transforms import with_decoding
from ..distributed import Ranks, init_ranks, launch_rank, leave
from ..errors import EXIT_USER_ERROR, UserError
from ..log import setup_logging
from .passes import SKIP, STOP, EncodeSettings
from .results import Results

PRECISIONS = ("fp32", "amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16")


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


class Parser(argparse.ArgumentParser):
    """Tells what is wrong in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"error: {message}; --help lists the options.\n" if launch_rank() == 0 else None)


def add_common_options(parser: argparse.ArgumentParser, *, data_help: str) -> None:
    """Options of every evaluation command: model, data, how to run, where results go."""
    add = parser.add_argument
    add(
        "--model",
        help="a name open_clip knows (ELIP too), local-dir:FOLDER or hf-hub:REPOSITORY; "
        "default: the one that a checkpoint of this trainer names",
    )
    add("--pretrained", metavar="FILE|TAG", help="checkpoint of this trainer or of OpenCLIP, or a tag open_clip knows")
    add("--ema", action="store_true", help="take the averaged weights of a checkpoint of this trainer")
    add("--data", required=True, nargs="+", metavar="[NAME=]PATH", help=data_help)
    add("--download", action="store_true", help="fetch data sets that torchvision can fetch (CIFAR, MNIST)")
    add("--batch-size", type=int, default=64, help="images a process and step (default: %(default)s)")
    add("--workers", type=int, default=4, help="decoding processes a process (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or mps")
    default = "amp_bf16" if torch.cuda.is_available() else "fp32"
    add("--precision", choices=PRECISIONS, default=default, help="as in training (default: %(default)s)")
    add(
        "--vision-guided-reduction",
        action="store_true",
        help="reduce the image tokens of an ELIP model as the image alone would have it: faster, not exact",
    )
    add("--compile", action="store_true", help="torch.compile the image tower")
    add(
        "--image-decode", choices=(PLAIN, FAST, REDUCED), default=PLAIN, help="as in training (default: %(default)s)"
    )
    add("--on-broken", choices=(SKIP, STOP), default=SKIP, help="leave broken images out or end (default: %(default)s)")
    add("--results", default="results", metavar="DIR", help="where results go (default: %(default)s); none: nowhere")
    add("--redo", action="store_true", help="do finished work again")
    add("--progress", action=argparse.BooleanOptionalAction, help="progress bars (default: on a terminal)")


def run_command(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace, Ranks], str],
    argv: Sequence[str] | None = None,
) -> int:
    """Runs `work` on every process and prints the text it returns. The exit code is 0, or 2 after one sentence."""
    args = parser.parse_args(argv)
    setup_logging(logging.INFO, None, console=launch_rank() == 0)
    try:
        _check(args)
        text = work(args, init_ranks(args.device, None, None, False))
    except UserError as error:
        if launch_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    finally:
        leave()
    if launch_rank() == 0:
        print(text)
    return 0


def load_model(args: argparse.Namespace, ranks: Ranks) -> LoadedModel:
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
        reduction = model_setup.reduction_config(argparse.Namespace(**config)) if args.vision_guided_reduction else None
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
        model.tower.vision_guided = True
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


def image_encoder(model: nn.Module, args: argparse.Namespace, normalize: bool) -> Callable[[Tensor], Tensor]:
    """(B, 3, H, W) to float32 image features (B, D), with all tokens; compiled with `--compile`."""

    def encode(images: Tensor) -> Tensor:
        return model.encode_image(images, normalize=normalize).float()

    return torch.compile(encode) if args.compile else encode


def encode_settings(args: argparse.Namespace, description: str) -> EncodeSettings:
    progress = sys.stderr.isatty() if args.progress is None else args.progress
    return EncodeSettings(args.batch_size, args.workers, args.precision, args.on_broken, progress, description)


def open_results(args: argparse.Namespace, ranks: Ranks) -> Results:
    return Results(None if args.results.lower() == "none" else Path(args.results), ranks, args.redo)


def described(args: argparse.Namespace, command: str, loaded: LoadedModel) -> dict:
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


def _check(args: argparse.Namespace) -> None:
    if not args.results:
        raise UserError("--results is empty; name a folder, or none.")
    if args.batch_size < 1 or args.workers < 0:
        raise UserError("--batch-size must be at least 1 and --workers at least 0.")
    try:
        device = torch.device(args.device)
    except RuntimeError:
        raise UserError(f"There is no device {args.device!r}; use cpu, cuda or mps.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device} is not available; use --device cpu.")
