"""What models cost in training, side by side.

    python -m open_clip_elip.profile ViT-S-16 ViT-S-16-ELIP ViT-S-16-ELIP:scoring_depth=1
    python -m open_clip_elip.profile ViT-B-16 ViT-B-16-ELIP --precision amp_bf16 --batch-size 256 --compile --memory 80
    python -m open_clip_elip.profile ViT-L-14 ViT-L-14-ELIP --no-time --markdown cost.md --plot cost.png

A model is NAME, or NAME:option=value,... with options of the token reduction, such as lam=0.5 or keep_ratio=1,.9,.5,.4;
adapter=lora,rank=16 or adapter=bottleneck trains nothing but adapters and heads;
shortcuts=true runs a plain OpenCLIP model with this package's exact shortcuts. Ratios are to the first model.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ..errors import ModelError
from . import ProfileError

PRECISIONS = ("fp32", "amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16")
MEAN = 14.5  # tokens, start and end included: web captions such as CC3M's


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one sentence on stderr."""
    args = _parser().parse_args(argv)
    try:
        _check(args)
        from .compare import compare  # torch, once the options are right

        compare(args)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("batch_size", "rounds", "repeat", "memory"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1e9:
            raise ProfileError(f"--{name.replace('_', '-')} is {value}; it must be above 0, and below 10**9.")
    if args.memory is not None and (args.batch_size < 2 or not args.time):
        raise ProfileError("--memory measures at two batch sizes: give a --batch-size of at least 2, and no --no-time.")
    if args.plot is not None and find_spec("matplotlib") is None:
        raise ProfileError("--plot needs matplotlib; pip install 'open_clip_elip[profile]' brings it.")
    if len({*args.models}) < len(args.models):
        raise ProfileError("The same model is given twice; name each once.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m open_clip_elip.profile", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="NAME or NAME:option=value,...")
    add("--batch-size", type=int, default=32, metavar="N", help="pairs in a step; default: %(default)s")
    add("--precision", default="fp32", choices=PRECISIONS, help="default: %(default)s")
    add("--device", metavar="cpu|cuda[:N]", help="default: cuda if there is one")
    add("--image-size", type=int, metavar="PIXELS", help="instead of the models' own")
    lengths = "tokens: a mean (default: %(default)s), all of the context, or a file with a length or a caption a line"
    add("--caption-lengths", default=str(MEAN), metavar="MEAN|full|FILE", help=lengths)
    add("--rounds", type=int, default=5, metavar="N", help="measurements of each model, in turn; default: %(default)s")
    add("--repeat", type=int, metavar="N", help="steps in one measurement; default: 1 on a CPU, 10 on a GPU")
    add("--memory", type=float, metavar="GB", help="tell the largest batch that fits (1 GB = 10^9 bytes)")
    add("--compile", "--torchcompile", action="store_true", help="for the times, and on CUDA for the peak memory")
    add("--no-time", dest="time", action="store_false", help="counts only: no step is run, nothing is measured")
    add("--json", type=Path, metavar="FILE")
    add("--markdown", type=Path, metavar="FILE")
    add("--plot", type=Path, metavar="FILE.png")
    return parser
