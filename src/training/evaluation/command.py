"""What the evaluation commands have in common: their options, and how they end."""
from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..data.pixels import FAST, PLAIN, REDUCED
from ..distributed import Ranks, init_ranks, launch_rank, leave
from ..errors import EXIT_USER_ERROR, UserError
from ..log import setup_logging
from .loaded import LoadedModel
from .passes import SKIP, STOP, EncodeSettings
from .results import Results

PRECISIONS = ("fp32", "amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16")


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
