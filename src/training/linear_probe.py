"""Linear probe: a linear classifier on the image features of a frozen model.

    python -m training.linear_probe --model ViT-B-16-ELIP --pretrained epoch_32.pt --data cifar10=/data/cifar10
    torchrun --nproc_per_node 4 -m training.linear_probe --model ViT-B-16 --pretrained openai \\
        --data imagenet=/data/imagenet --also imagenet-v2=/data/imagenetv2 imagenet-r=/data/imagenet-r
"""
from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from .distributed import Ranks, end
from .errors import UserError
from .evaluation.command import Parser, add_common_options, load_model, run_command
from .evaluation.features import DTYPES
from .evaluation.passes import check_weights
from .evaluation.probe import SWEEP, Probe, load_jobs
from .evaluation.results import Results
from .evaluation.sweep import patient


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one sentence on stderr."""
    parser = Parser(prog="python -m training.linear_probe", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_common_options(parser, data_help="data sets with a training and a test split; each gets a probe of its own")
    add_options(parser)
    return run_command(parser, work, argv)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--also", nargs="+", default=[], metavar="[NAME=]PATH",
        help="more test sets for the probes: each with the classes of one of --data, or with some of ImageNet's")
    add("--layer", choices=("pooled", "projected"), default="pooled",
        help="features before or after the projection (default: %(default)s)")
    add("--normalize", action="store_true", help="features of unit length")
    add("--standardize", action="store_true", help="mean 0 and variance 1 in each dimension, on the training set")
    add("--regularisation", "--regularization", type=_regularisation, default=SWEEP, metavar="sweep|VALUE",
        help="C of scikit-learn (default: %(default)s)")
    add("--held-out", type=float, default=0.1, metavar="FRACTION",
        help="of the training set, for the sweep, if the data have no val split of their own (default: %(default)s)")
    add("--max-iterations", type=int, default=1000, help="of L-BFGS (default: %(default)s)")
    add("--tolerance", type=float, default=1e-6, help="of L-BFGS (default: %(default)s)")
    add("--max-train-samples", type=int, metavar="N", help="train on N samples, the classes keeping their shares")
    add("--seed", type=int, default=0, help="of what is drawn at random (default: %(default)s)")
    add("--cache", metavar="DIR", help="where features are kept (default: features in the folder of --results)")
    add("--feature-dtype", choices=tuple(DTYPES), default="float32", help="on disk (default: %(default)s)")
    add("--feature-memory", type=float, metavar="GB",
        help="of the device for the training features; if they need more they are read from disk in each iteration "
        "(default: what is free)")


def work(args: argparse.Namespace, ranks: Ranks) -> str:
    """Everything the command does; the table. A collective call."""
    check(args)
    with ranks.agree():
        results = Results.of(args, ranks)
        jobs = load_jobs(args)
        loaded = load_model(args, ranks)
        check_weights(loaded.model, loaded.name)
    waiting = patient(ranks)
    rows = [("data", "top-1", "top-5", "mean per class", "regularisation")]
    for splits in jobs:
        for record in Probe(args, loaded, splits, results, waiting).run():
            metrics = record["metrics"]
            numbers = [f"{metrics[name]:.2%}" for name in ("top1", "top5", "mean_per_class_recall")]
            rows.append((f"{record['data']} ({record['split']})", *numbers, f"{record['regularisation']:.4g}"))
    return results.shown(rows)


def check(args: argparse.Namespace) -> None:
    """Refuses what cannot be meant, and fills in the place of the features.

    Raises:
        UserError: see above.
    """
    if args.regularisation != SWEEP and not 0 < args.regularisation < math.inf:
        raise UserError("--regularisation must be finite and more than 0.")
    for name in ("max_iterations", "tolerance", "max_train_samples"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be more than 0.")
    if not 0 < args.held_out < 1:
        raise UserError("--held-out must be between 0 and 1, such as 0.1.")
    if args.feature_memory is not None and args.feature_memory < 0:
        raise UserError("--feature-memory must be 0 (always read from disk) or more.")
    if args.cache is None:
        if args.results.lower() == "none":
            raise UserError("--results none leaves no place for the features; name one with --cache.")
        args.cache = str(Path(args.results, "features"))
    if Path(args.cache).exists() and not Path(args.cache).is_dir():
        raise UserError(f"--cache {args.cache} is a file; name a folder.")


def _regularisation(text: str) -> float | str:
    if text == SWEEP:
        return SWEEP
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {SWEEP!r}") from None


if __name__ == "__main__":
    end(main())
