"""Writes a model in one of the forms, compares, and puts it into its place when it is right."""
from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from .. import weights
from ..errors import ModelError
from .folders import write_open_clip, write_timm, write_transformers
from .graphs import PARTS, write_onnx, write_torch
from .released import write_released_form
from .source import Source, open_source

FOLDERS = {"open_clip": write_open_clip, "transformers": write_transformers, "timm": write_timm}
GRAPHS = {"onnx": write_onnx, "torch": write_torch}
TOLERANCE = 1e-5  # of features of unit length


def write(args: argparse.Namespace) -> str:
    """What was written, in words; ModelError: what a person can mend."""
    if args.format == "released":
        if not weights.is_file(args.pretrained):
            raise ModelError("The authors' form is for a checkpoint of this trainer: give --pretrained.")
        return _whole(args.out, lambda out: write_released_form(args.pretrained, out))
    source = open_source(args.model, args.pretrained, ema=args.ema, plain=args.plain)
    if args.format in FOLDERS and "adapter" in source.identity.config:
        raise ModelError(f"{source.identity.name} has bottleneck adapters, for which {args.format} has no place.")
    if args.vision_guided_reduction:
        source.reduce_alone()
    return _whole(args.out, lambda out: _write(source, out, args))


@torch.no_grad()
def _write(source: Source, out: Path, args: argparse.Namespace) -> str:
    """Writes, reads it back with the program that it is for, and compares."""
    name = source.identity.name
    try:
        if args.format in GRAPHS:
            read = GRAPHS[args.format](source, out, PARTS[args.part])
        else:
            read = FOLDERS[args.format](source, out)
    except Exception as error:  # of any kind, from a library that has no such model
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{name} cannot be written for {args.format}: {reason}.") from error
    differences, names = [], []
    for count in (3, 1):
        image, text = source.examples(count)
        found = read(image, text)
        own = source.model(image, text)
        names = sorted(found)
        differences += [float((own[key] - found[key]).abs().max()) for key in found]
    worst = max(differences, key=lambda one: (one != one, one))  # NaN is the worst
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
