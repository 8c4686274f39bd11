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
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import weights
from ..identity import ModelError
from .folders import write_open_clip, write_timm, write_transformers
from .graphs import PARTS, write_onnx, write_torch
from .released import write_released_form
from .source import Source, features, open_source

FOLDERS = {"open_clip": write_open_clip, "transformers": write_transformers, "timm": write_timm}
GRAPHS = {"onnx": write_onnx, "torch": write_torch}
TOLERANCE = 1e-5  # of features of unit length


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one sentence on stderr."""
    args = _parser().parse_args(argv)
    try:
        _check(args)
        if args.format == "released":
            return _say(_whole(args.out, lambda out: write_released_form(args.pretrained, out)))
        source = open_source(args.model, args.pretrained, ema=args.ema, plain=args.plain)
        if args.vision_guided_reduction:
            source.reduce_alone()
        return _say(_whole(args.out, lambda out: _write(source, out, args)))
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _say(text: str) -> int:
    print(text)
    return 0


def _write(source: Source, out: Path, args: argparse.Namespace) -> str:
    """Writes, reads it back with the program that it is for, and compares."""
    name = source.identity.name
    for warning in source.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    try:
        if args.format in GRAPHS:
            read = GRAPHS[args.format](source, out, PARTS[args.part])
        else:
            read = FOLDERS[args.format](source, out)
    except Exception as error:  # of any kind, from a library that has no such model
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{name} cannot be written for {args.format}: {reason}.") from error
    worst, names = 0.0, []
    for count in (3, 1):
        image, text = source.examples(count)
        found = read(image, text)
        own = features(source.model, image, text)
        names = sorted(found)
        worst = max(worst, *(float((own[key] - found[key]).abs().max()) for key in found))
    if not worst <= TOLERANCE:
        raise ModelError(
            f"{name} cannot be written for {args.format}: it would give other features there (by {worst:.1e}), for it "
            "has parts that are unknown there."
        )
    return f"{args.out}: {' and '.join(names)} differ from the model's by at most {worst:.1e}"


def _whole(out: Path, write: Callable[[Path], str]) -> str:
    """Runs `write` on a place beside `out`, and puts there what it has written, once it is right."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            text = write(Path(folder) / out.name)
            for made in Path(folder).iterdir():
                os.replace(made, out.parent / made.name)
    except OSError as error:
        raise ModelError(f"{out} cannot be written ({error.strerror or error}); name another place.") from error
    return text


def _check(args: argparse.Namespace) -> None:
    if args.out.exists():
        raise ModelError(f"{args.out} exists already; delete it, or name another place.")
    graph = args.format in GRAPHS
    for flag, given, needed in (
        ("--part", args.part != "both", graph), ("--vision-guided-reduction", args.vision_guided_reduction, graph),
        ("--plain", args.plain, args.format == "open_clip"),
    ):  # fmt: skip
        if given and not needed:
            raise ModelError(f"{flag} does nothing for {args.format}; leave it out.")
    if args.format == "released" and not weights.is_file(args.pretrained):
        raise ModelError("The form of the authors' release is for a checkpoint of this trainer: give --pretrained.")


def _parser() -> argparse.ArgumentParser:
    about, _, more = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m open_clip_elip.export", description=about, epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("format", choices=[*FOLDERS, *GRAPHS, "released"])
    add("out", type=Path, help="folder or file to write")
    add("--model", help="name; left out, what the checkpoint tells")
    add("--pretrained", help="checkpoint, folder, URL, or tag of open_clip's; left out, what --model brings along")
    add("--ema", action="store_true", help="take the averaged weights of the checkpoint")
    add("--plain", action="store_true", help="without token reduction, so that open_clip alone reads it")
    add("--part", choices=PARTS, default="both", help="which towers, of onnx and torch")
    add("--vision-guided-reduction", action="store_true", help="the image tower removes tokens, of onnx and torch")
    return parser
