"""From a checkpoint and pictures to files that show what is kept."""
from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from ..identity import Identity, ModelError, reduced, tokenizer, transform
from ..pretrained import find
from ..profile.models import ProfileError, find_device, parse_options
from . import statistics
from .draw import sheet, views
from .page import page
from .pictures import Pair, read_pairs
from .trace import trace

BATCH = 32


def visualize(args: argparse.Namespace) -> list[Path]:
    """Writes what the options of the command ask for; ModelError: what a person can mend."""
    torch.manual_seed(0)  # for methods that draw
    pairs = read_pairs(args.image, args.count or (None if args.statistics else 8))
    identity, model = load(args)
    batches = batched(pairs, args.captions, transform(identity), tokenizer(identity))
    title = f"{identity.name}, {_settings(identity.token_reduction)}"
    try:
        with torch.no_grad():
            if args.statistics:
                return _statistics(model, batches, title, args.out)
            return _pictures(model, batches, title, args.out, beside=len(args.captions or [""]))
    except OSError as error:
        told = f"{args.out} cannot be written ({error.strerror}); name another folder in --out."
        raise ModelError(told) from error


def load(args: argparse.Namespace) -> tuple[Identity, nn.Module]:
    """The model with its weights, on the device and in eval mode. Raises ModelError."""
    found = find(args.model, args.pretrained)
    identity = found.identity
    if args.token_reduction:
        words = [word if "=" in word else f"method={word}" for word in args.token_reduction]
        try:
            settings = parse_options(",".join(words))
        except ProfileError as error:
            raise ModelError("--token-reduction takes one method, and settings as key=value, each once.") from error
        identity = reduced(identity, settings)
    if identity.token_reduction is None:
        raise ModelError(f"{identity.name} has no token reduction; add one, as in --token-reduction elip.")
    model, _ = found._replace(identity=identity).create(device=find_device(args.device))
    if not model.tower.rrt():
        settings = _settings(identity.token_reduction)
        raise ModelError(f"There is nothing to see: {settings} removes no token; give other settings.")
    if len(args.captions or ()) > 1 and not model.tower.reduction.uses_text:
        raise ModelError(f"{identity.token_reduction['method']} looks at no caption, so give one at most.")
    return identity, model.eval()


def batched(
    pairs: Iterator[Pair], captions: Sequence[str] | None, preprocess: Callable, tokenize: Callable
) -> Iterator[tuple[list[Pair], Tensor, Tensor | None]]:
    """Pairs, images (B, 3, H, W) and texts (B, T), None where a pair has none; each picture under all `captions`, if
    there are any, instead of its own."""
    if captions is not None:
        pairs = (pair._replace(caption=caption) for pair in pairs for caption in captions)
    while batch := list(islice(pairs, BATCH)):
        image = torch.stack([preprocess(pair.image) for pair in batch])
        known = all(pair.caption for pair in batch)
        yield batch, image, tokenize([pair.caption for pair in batch]) if known else None


def _pictures(model: nn.Module, batches: Iterator, title: str, out: Path, beside: int) -> list[Path]:
    shown = []
    for batch, image, text in batches:
        names, captions = [pair.name for pair in batch], [pair.caption for pair in batch]
        if text is None and any(captions) and model.tower.reduction.uses_text:
            raise ModelError("Some of the pictures have captions and others have none; give one with --caption.")
        shown += views(model, image, names, captions, trace(model, image, text))
    out.mkdir(parents=True, exist_ok=True)
    sheet(shown, title, beside).savefig(out / "kept.png", dpi=150)
    (out / "kept.html").write_text(page(shown, title), encoding="utf-8")
    return [out / "kept.png", out / "kept.html"]


def _statistics(model: nn.Module, batches: Iterator, title: str, out: Path) -> list[Path]:
    found = statistics.collect(model, ((image, text) for _, image, text in batches))
    out.mkdir(parents=True, exist_ok=True)
    return statistics.save(found, title, out)


def _settings(token_reduction: Mapping) -> str:
    parts = [f"{key} {value}" for key, value in token_reduction.items() if key != "method"]
    return ", ".join([token_reduction["method"], *parts])
