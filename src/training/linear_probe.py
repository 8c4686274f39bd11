"""Linear probe: a linear classifier on the image features of a frozen model.

    python -m training.linear_probe --model ViT-B-16-ELIP --pretrained epoch_32.pt --data cifar10=/data/cifar10
    torchrun --nproc_per_node 4 -m training.linear_probe --model ViT-B-16 --pretrained openai \\
        --data imagenet=/data/imagenet --also imagenet-v2=/data/imagenetv2 imagenet-r=/data/imagenet-r
"""
from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint
from .distributed import Ranks, end
from .errors import UserError
from .evaluation.command import (
    LoadedModel,
    Parser,
    add_common_options,
    described,
    encode_settings,
    load_model,
    open_results,
    run_command,
    table,
)
from .data.sets.registry import load_data
from .evaluation.feature_rows import FeatureRows, Part, memory_need
from .evaluation.features import DTYPES, FeatureSet, extract_features
from .evaluation.logistic import LinearClassifier, SolverSettings, all_logits, fit, held_out_score
from .data.sets.labelled import LabelledImages
from .evaluation.results import Results
from .evaluation.scores import check_classes, score
from .evaluation.sweep import Trial, patient, stratified_sample, sweep

SWEEP = "sweep"
# What the original recipes have; SLIP's batch is 128 on each GPU. The sweep of a weight decay ends at 1, where the
# learning rate of 0.1 still leaves most of the weights.
RECIPES = {
    "lbfgs": {"regularisation": SWEEP, "decades": (-6, 6)},
    "sgd": {"regularisation": 0.0, "decades": (-6, 0), "epochs": 90, "solver_batch_size": 1024, "lr": 0.1},
    "adamw": {"regularisation": SWEEP, "decades": (-6, 0), "epochs": 20, "solver_batch_size": 512, "lr": 0.1},
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m training.linear_probe", description=__doc__.splitlines()[0])
    add_common_options(parser, data_help="data sets with a training and a test split; each gets a probe of its own")
    add_options(parser)
    return run_command(parser, probe, argv)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--also", nargs="+", default=[], metavar="[NAME=]PATH",
        help="more test sets for the probes: each with the classes of one of --data, or with some of ImageNet's")
    add("--layer", choices=("pooled", "projected"), default="pooled",
        help="features before or after the projection (default: %(default)s)")
    add("--normalize", action="store_true", help="features of unit length")
    add("--standardize", action="store_true", help="mean 0 and variance 1 in each dimension, on the training set")
    add("--solver", choices=tuple(RECIPES), default="lbfgs", help="default: %(default)s")
    add("--regularisation", "--regularization", type=_regularisation, metavar="sweep|VALUE",
        help="C of scikit-learn for lbfgs, weight decay for the others (default: sweep; 0 for sgd)")
    add("--held-out", type=float, default=0.1, metavar="FRACTION",
        help="of the training set, for the sweep, if the data have no val split of their own (default: %(default)s)")
    add("--max-iterations", type=int, default=1000, help="of lbfgs (default: %(default)s)")
    add("--tolerance", type=float, default=1e-6, help="of lbfgs (default: %(default)s)")
    add("--epochs", type=int, help="of sgd and adamw (default: 90 and 20)")
    add("--lr", type=float, help="of sgd and adamw (default: 0.1)")
    add("--solver-batch-size", type=int, help="of sgd and adamw (default: 1024 and 512)")
    add("--max-train-samples", type=int, metavar="N", help="train on N samples, the classes keeping their shares")
    add("--seed", type=int, default=0, help="of what is drawn at random (default: %(default)s)")
    add("--cache", metavar="DIR", help="where features are kept (default: features in the folder of --results)")
    add("--feature-dtype", choices=tuple(DTYPES), default="float32", help="on disk (default: %(default)s)")
    add("--feature-memory", type=float, metavar="GB",
        help="of the device for the training features; if they need more they are read from disk in each iteration "
        "(default: what is free)")


@dataclass(frozen=True)
class Splits:
    """What a probe is trained and evaluated on. val: for the sweep, if the data have one that is not the test set."""

    train: LabelledImages
    val: LabelledImages | None
    tests: Sequence[LabelledImages]


def probe(args: argparse.Namespace, ranks: Ranks) -> str:
    """Everything the command does; the table. A collective call."""
    complete_options(args)
    with ranks.agree():
        results = open_results(args, ranks)
        jobs = load_jobs(args)
        loaded = load_model(args, ranks)
    waiting = patient(ranks)
    rows = [("data", "top-1", "top-5", "mean per class", "regularisation")]
    for splits in jobs:
        for record in Probe(args, loaded, splits, results, waiting).run():
            metrics = record["metrics"]
            numbers = [f"{metrics[name]:.2%}" for name in ("top1", "top5", "mean_per_class_recall")]
            rows.append((f"{record['data']} ({record['split']})", *numbers, f"{record['regularisation']:.4g}"))
    return table(rows)


def complete_options(args: argparse.Namespace) -> None:
    """Refuses what cannot be meant, and fills in what depends on the solver.

    Raises:
        UserError: see above.
    """
    recipe = RECIPES[args.solver]
    if args.regularisation is None:
        args.regularisation = recipe["regularisation"]
    if args.regularisation != SWEEP:
        if not 0 <= args.regularisation < math.inf or (args.regularisation == 0 and args.solver == "lbfgs"):
            raise UserError("--regularisation must be finite and not negative, and more than 0 with lbfgs.")
    for name in ("epochs", "lr", "solver_batch_size"):
        flag = f"--{name.replace('_', '-')}"
        if getattr(args, name) is not None and args.solver == "lbfgs":
            raise UserError(f"{flag} is for sgd and adamw; leave it out, or choose --solver.")
        if getattr(args, name) is None:
            setattr(args, name, recipe.get(name))
        elif getattr(args, name) <= 0:
            raise UserError(f"{flag} must be more than 0.")
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


def load_jobs(args: argparse.Namespace) -> list[Splits]:
    """The splits of each `--data`, and the sets of `--also` with the one whose classes they have.

    Raises:
        UserError: no training split, or classes that do not fit.
    """
    jobs = [load_splits(args, spec) for spec in args.data]
    for spec in args.also:
        data, problem = load_data(spec, download=args.download), None
        for i, splits in enumerate(jobs):
            try:
                check_classes(splits.train, data)
            except UserError as error:
                problem = problem or error
            else:
                jobs[i] = replace(splits, tests=[*splits.tests, data])
                break
        else:
            raise problem
    return jobs


def load_splits(args: argparse.Namespace, spec: str) -> Splits:
    """The splits of one `--data`.

    Raises:
        UserError: no training split, or classes that differ between the splits.
    """
    train = load_data(spec, split="train", download=args.download)
    test = load_data(spec, split="test", download=args.download)
    if train.same_pictures(test):
        raise UserError(f"{spec}: the training and the test split are the same pictures; give data that have both.")
    val = None if test.split == "val" else _load_val(spec, args.download)
    if val is not None and val.same_pictures(test):
        val = None
    for data in (test, val):
        if data is not None:
            check_classes(train, data)
    if args.max_train_samples is not None and args.max_train_samples < len(train):
        train = train.subset(stratified_sample(train.labels, args.max_train_samples, args.seed))
    check_all_classes(train, train.labels, args.max_train_samples)
    return Splits(train, val, [test])


def _load_val(spec: str, download: bool) -> LabelledImages | None:
    try:
        return load_data(spec, split="val", download=download)
    except UserError as error:
        logging.info(f"no validation split: {str(error).partition(';')[0]}")
        return None


def check_all_classes(data: LabelledImages, labels: Tensor, max_train_samples: int | None) -> None:
    """Every class occurs in `labels`.

    Raises:
        UserError: one does not.
    """
    missing = (torch.bincount(labels, minlength=len(data.classnames)) == 0).nonzero()[:, 0].tolist()
    if missing:
        remedy = "add some" if max_train_samples is None else "add some, or raise --max-train-samples"
        raise UserError(
            f"{len(missing)} of the {len(data.classnames)} classes of {data.name} have no readable training image "
            f"(the first is {data.classnames[missing[0]]!r}); {remedy}."
        )


class Probe:
    """One probe: its training data, its test sets, and where things are kept. All methods are collective."""

    def __init__(
        self, args: argparse.Namespace, loaded: LoadedModel, splits: Splits, results: Results, ranks: Ranks
    ):
        self.args, self.loaded, self.splits, self.results, self.ranks = args, loaded, splits, results, ranks
        self.num_classes = len(splits.train.classnames)
        self.device = torch.device("cpu") if ranks.device.type == "mps" else ranks.device  # MPS has no float64
        self.settings = SolverSettings(
            args.solver, args.max_iterations, args.tolerance, epochs=args.epochs or 0,
            batch_size=args.solver_batch_size or 0, lr=args.lr or 0.0, seed=args.seed,
        )  # fmt: skip
        self.described = self._describe()

    def run(self) -> list[dict]:
        """The records of all test sets. What is finished is not done again."""
        tests = self.splits.tests
        works = [
            {**self.described, "data": test.name, "split": test.split, "data_fingerprint": test.fingerprint()}
            for test in tests
        ]
        records = [self.results.find(work) for work in works]
        if all(records):
            logging.info(f"{tests[0].name}: finished before; --redo does it again.")
            return records
        classifier, found = self.classifier()
        for i, test in enumerate(tests):
            if records[i] is None:
                features = self.features(test)
                rows = FeatureRows([_part(features)], self.num_classes, self.device)
                metrics = None
                with self.ranks.agree():
                    if self.ranks.is_main:
                        metrics = score(all_logits(classifier, rows), test, features.places)
                metrics = self.ranks.broadcast(metrics)
                records[i] = self.results.add(works[i], metrics, {**found, "skipped": list(features.skipped)})
        return records

    def features(self, data: LabelledImages) -> FeatureSet:
        args = self.args
        return extract_features(
            self.loaded,
            data,
            layer=args.layer,
            normalize=args.normalize,
            dtype=DTYPES[args.feature_dtype],
            cache=Path(args.cache),
            ranks=self.ranks,
            settings=encode_settings(args, f"{data.name} ({data.split})"),
            compiled=args.compile,
        )

    def classifier(self) -> tuple[LinearClassifier, dict]:
        """The trained probe and what is worth knowing about it, the same on every process; kept beside the features.

        Raises:
            UserError: its weights are not finite.
        """
        digest = hashlib.sha256(json.dumps(self.described, sort_keys=True).encode()).hexdigest()[:16]
        path = Path(self.args.cache, f"probe-{digest}.pt")
        saved = None
        with self.ranks.agree():
            if self.ranks.is_main and path.is_file() and not self.args.redo:
                saved = checkpoint.load(path)
        saved = self.ranks.broadcast(saved)
        if saved is None:
            saved = self._train()
            with self.ranks.agree():
                if self.ranks.is_main:
                    _save(saved, path)
        found = saved["found"]
        if not found["converged"]:
            logging.warning(f"L-BFGS had not converged after {found['iterations']} iterations; raise --max-iterations.")
        return LinearClassifier(saved["weight"].to(self.device), saved["bias"].to(self.device)), found

    def _train(self) -> dict:
        sets = [self.features(data) for data in (self.splits.train, self.splits.val) if data is not None]
        check_all_classes(self.splits.train, sets[0].labels, self.args.max_train_samples)
        parts = [_part(features) for features in sets]
        if self._fits(parts):
            parts = [part._replace(features=part.features.to(self.device, copy=True)) for part in parts]
        regularisation, trials = self.args.regularisation, []
        if regularisation == SWEEP:
            best, trials = self._sweep(parts)
            regularisation = best.regularisation
        saved = None
        if self.ranks.is_main:  # it would be the same on all processes
            rows = self._rows(parts)
            classifier = fit(rows, regularisation, self.settings)
            saved = {
                "weight": classifier.weight.cpu(),
                "bias": classifier.bias.cpu(),
                "found": {
                    "regularisation": regularisation,
                    "iterations": classifier.iterations,
                    "converged": classifier.converged,
                    "num_train_samples": len(rows),
                    "train_skipped": [name for features in sets for name in features.skipped],
                    "trials": [
                        {**asdict(trial), "loss": trial.loss if math.isfinite(trial.loss) else None} for trial in trials
                    ],
                },
            }
        saved = self.ranks.broadcast(saved)
        if not (saved["weight"].isfinite().all() and saved["bias"].isfinite().all()):
            raise UserError(f"The fit with regularisation {regularisation} diverged; take another, or a lower --lr.")
        return saved

    def _sweep(self, parts: list[Part]) -> tuple[Trial, list[Trial]]:
        """The best regularisation for rows that are not trained on: the val split, or some of the training rows."""
        kept, held_out = parts[:1], parts[1:]
        if not held_out:
            part = parts[0]
            held = stratified_sample(
                part.labels, max(1, round(self.args.held_out * len(part.labels))), self.args.seed, leave=1
            )
            if not len(held):
                raise UserError(
                    f"{self.splits.train.name} has one training image a class, none to hold out for the sweep; give "
                    "--regularisation a value."
                )
            rest = torch.ones(len(part.labels), dtype=torch.bool)
            rest[held] = False
            kept, held_out = [part._replace(rows=rest.nonzero()[:, 0])], [part._replace(rows=held)]
        train, test = self._rows(kept), FeatureRows(held_out, self.num_classes, self.device)
        logging.info(f"sweep: {len(train):,} samples to train on, {len(test):,} held out")

        def attempt(regularisation: float) -> Trial:
            classifier = fit(train, regularisation, self.settings)
            return Trial(regularisation, *held_out_score(classifier, test), classifier.iterations)

        best, trials = sweep(attempt, RECIPES[self.args.solver]["decades"], self.ranks)
        logging.info(f"chosen: {best.regularisation:.4g}, with {best.top1:.2%} held out")
        return best, trials

    def _rows(self, parts: list[Part]) -> FeatureRows:
        rows = FeatureRows(parts, self.num_classes, self.device)
        return rows.standardized() if self.args.standardize else rows

    def _fits(self, parts: list[Part]) -> bool:
        """Whether the training features are kept on the device; else they are read from disk whenever they are used."""
        features = parts[0].features
        rows, width = sum(len(part.features) for part in parts), features.shape[1]
        need = memory_need(rows, width, self.num_classes, features.dtype, self.settings.history)
        given = self.args.feature_memory
        free = _free_memory(self.device) if given is None else given * 1e9
        fits = sum(need) <= free
        logging.info(
            f"{rows:,} x {width} training features of {self.args.feature_dtype}: {need.features / 1e9:.2f} GB, and "
            f"{need.work / 1e9:.2f} GB to work with, of {free / 1e9:.2f} GB "
            f"{'free' if given is None else 'allowed'} on {self.device}; they are "
            f"{'kept there' if fits else 'read from disk in each iteration'}"
        )
        return fits

    def _describe(self) -> dict:
        """All that the classifier depends on."""
        args, splits = self.args, self.splits
        described_ = described(args, "linear_probe", self.loaded)
        described_["settings"] |= {
            "layer": args.layer,
            "normalize": args.normalize,
            "standardize": args.standardize,
            "feature_dtype": args.feature_dtype,
            "regularisation": args.regularisation,
            "train": splits.train.name,
            "train_fingerprint": splits.train.fingerprint(),
            "val_fingerprint": splits.val.fingerprint() if splits.val else None,
            "held_out": args.held_out if args.regularisation == SWEEP and not splits.val else None,
            **asdict(self.settings),
        }
        return described_


def _part(features: FeatureSet) -> Part:
    return Part(features.features, features.labels, torch.arange(len(features.labels)))


def _save(saved: dict, path: Path) -> None:
    try:
        checkpoint.save(saved, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as either
        reason = str(error).splitlines()[0]
        raise UserError(f"The probe cannot be written to {path} ({reason}); give another --cache.") from None


def _free_memory(device: torch.device) -> float:
    """Bytes that this process can count on: most of a GPU's free memory, or its share of half of the machine's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return 0.9 * torch.cuda.mem_get_info(device)[0]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return available / 2 / processes


def _regularisation(text: str) -> float | str:
    if text == SWEEP:
        return SWEEP
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {SWEEP!r}") from None


if __name__ == "__main__":
    end(main())
