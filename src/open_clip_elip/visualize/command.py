"""What token reduction keeps of pictures, stage by stage, and by which attention.

    python -m open_clip_elip.visualize --pretrained logs/RUN/checkpoints/epoch_6.pt --image dog.jpg --caption "A dog"
    python -m open_clip_elip.visualize --pretrained FILE --image dog.jpg --captions "A dog" "Grass" "A red ball"
    python -m open_clip_elip.visualize --pretrained FILE --image 'val/{00000..00003}.tar' --count 12
    python -m open_clip_elip.visualize --pretrained FILE --image 'val/{00000..00003}.tar' --statistics
    python -m open_clip_elip.visualize --pretrained FILE --image dog.jpg --token-reduction tome r=4

Writes kept.png and kept.html (with a slider over the stages) to --out; with --statistics CSV files and a plot instead.
"""
from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ..errors import ModelError


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one sentence on stderr."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        _check(args)
        from .files import visualize  # torch, once the options are right

        written = visualize(args)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, written)))
    return 0


def _check(args: argparse.Namespace) -> None:
    if find_spec("matplotlib") is None:
        raise ModelError("Drawing needs matplotlib; pip install 'open_clip_elip[profile]' brings it.")
    if args.count is not None and args.count < 1:
        raise ModelError(f"--count is {args.count}; it must be at least 1.")
    if args.statistics and args.captions:
        raise ModelError("--statistics takes the captions of the data; leave --captions out.")
    if not all(caption.strip() for caption in args.captions or ()):
        raise ModelError("A caption is empty; write one, or leave it out, and the image alone decides.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m open_clip_elip.visualize", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--pretrained", required=True, metavar="FILE|TAG", help="checkpoint, or a tag that OpenCLIP knows")
    add("--model", metavar="NAME", help="for weights that do not say which model they are of")
    method = "instead of the model's own, as in: tome r=4 (docs/methods.md)"
    add("--token-reduction", nargs="+", metavar="METHOD|KEY=VALUE", help=method)
    add("--image", required=True, metavar="PATH", help="picture, folder of pictures, or shards")
    captions = "guides the choice, instead of the data's; several: each picture under each of them"
    add("--caption", "--captions", dest="captions", nargs="+", metavar="TEXT", help=captions)
    add("--count", type=int, metavar="N", help="pictures of a folder or shards; default: 8, with --statistics all")
    add("--statistics", action="store_true", help="figures over all pictures and captions, as CSV and plots")
    add("--out", type=Path, default=Path("visualize"), metavar="DIR", help="default: %(default)s")
    add("--device", metavar="cpu|cuda[:N]", help="default: cuda if there is one")
    return parser
