"""Writes a model for other programs, and checks that it gives the same features there.

    python -m open_clip_elip.export open_clip my-model --pretrained logs/my-run/checkpoints/epoch_32.pt
    python -m open_clip_elip.export transformers my-clip --model ViT-B-16-ELIP --pretrained epoch_32.pt
    python -m open_clip_elip.export onnx image.onnx --part image --vision-guided-reduction --pretrained epoch_32.pt
    python -m open_clip_elip.export released albef.pth --pretrained logs/albef/checkpoints/epoch_20.pt

OUT is a folder for open_clip (`local-dir:OUT`), transformers (CLIPModel) and timm (the image tower), and a file for
onnx, torch (of torch.export) and released (of ALBEF, BLIP, METER).
"""
from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import ModelError

FORMATS = ("open_clip", "transformers", "timm", "onnx", "torch", "released")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one sentence on stderr."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    try:
        _check(args)
        from .write import write  # torch, once the options are right

        print(write(args))
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.out.exists():
        raise ModelError(f"{args.out} exists already; delete it, or name another place.")
    graph = args.format in ("onnx", "torch")
    for flag, given, needed in (
        ("--part", args.part != "both", graph), ("--vision-guided-reduction", args.vision_guided_reduction, graph),
        ("--plain", args.plain, args.format == "open_clip"), ("--model", args.model, args.format != "released"),
        ("--ema", args.ema, args.format != "released"),
    ):  # fmt: skip
        if given and not needed:
            raise ModelError(f"{flag} does nothing for {args.format}; leave it out.")
    if args.vision_guided_reduction and args.part == "text":
        raise ModelError("--vision-guided-reduction is of the image tower, and --part text has none; leave one out.")


def _parser() -> argparse.ArgumentParser:
    about, _, more = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m open_clip_elip.export", description=about, epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("format", choices=FORMATS)
    add("out", type=Path, help="folder or file to write")
    add("--model", help="name; left out, what the checkpoint tells")
    add("--pretrained", help="checkpoint, folder, URL, or tag of open_clip's; left out, what --model brings along")
    add("--ema", action="store_true", help="take the averaged weights of the checkpoint")
    add("--plain", action="store_true", help="without token reduction, so that open_clip alone reads it")
    add("--part", choices=("image", "text", "both"), default="both", help="which towers, of onnx and torch")
    add("--vision-guided-reduction", action="store_true", help="the image tower removes tokens, of onnx and torch")
    return parser
