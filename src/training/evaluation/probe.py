"""A linear probe: its data, its features, the sweep and the last fit, and what it scores on its test sets."""
from __future__ import annotations

import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.sets.labelled import LabelledImages
from ..data.sets.registry import load_data
from ..distributed import Ranks
from ..errors import UserError
from .feature_rows import FeatureRows, FeatureSet
from .features import DTYPES, extract_features, feature_encoder
from .logistic import LinearClassifier, SolverSettings, all_logits, fit, held_out_score
from .passes import EncodeSettings, ImagePass
from .results import Results, described, described_model, digest_of, keep, read_kept
from .scores import check_classes, score
from .sweep import Trial, stratified_sample, sweep

SWEEP = "sweep"


class Splits(NamedTuple):
    """What a probe is trained and evaluated on. val: for the sweep, if the data have one that is not the test set."""

    train: LabelledImages
    val: LabelledImages | None
    tests: list[LabelledImages]


def load_jobs(options: Any) -> list[Splits]:
    """The splits of each `--data`, and the sets of `--also` with the one whose classes they have, or a UserError."""
    jobs = [load_splits(options, spec) for spec in options.data]
    for spec in options.also:
        data, problems = load_data(spec, download=options.download), []
        for splits in jobs:
            try:
                check_classes(splits.train, data)
            except UserError as error:
                problems.append(error)
            else:
                splits.tests.append(data)
                break
        else:
            raise problems[0]
    return jobs


def load_splits(options: Any, spec: str) -> Splits:
    """The splits of one `--data`; UserError: no training split, one class, or other classes in another split."""
    train, test = (load_data(spec, split=split, download=options.download) for split in ("train", "test"))
    if len(train.classnames) < 2:
        raise UserError(f"{spec} has one class, {train.classnames[0]!r}; a linear probe needs two.")
    if train.same_pictures(test):
        raise UserError(f"{spec}: the training and the test split are the same pictures; give data that have both.")
    val = None
    if test.split != "val":
        try:
            val = load_data(spec, split="val", download=options.download)
        except UserError as error:
            logging.info(f"no validation split: {str(error).partition(';')[0]}")
    if val is not None and val.same_pictures(test):
        val = None
    for data in (test, val):
        if data is not None:
            check_classes(train, data)
    if options.max_train_samples is not None and options.max_train_samples < len(train):
        train = train.subset(stratified_sample(train.labels, options.max_train_samples, options.seed))
    check_all_classes(train, train.labels, options.max_train_samples)
    return Splits(train, val, [test])


def check_all_classes(data: LabelledImages, labels: Tensor, max_train_samples: int | None) -> None:
    """Raises UserError if a class does not occur in `labels`."""
    missing = (torch.bincount(labels, minlength=len(data.classnames)) == 0).nonzero()[:, 0].tolist()
    if missing:
        remedy = "add some" if max_train_samples is None else "add some, or raise --max-train-samples"
        raise UserError(
            f"{len(missing)} of the {len(data.classnames)} classes of {data.name} have no readable training image "
            f"(the first is {data.classnames[missing[0]]!r}); {remedy}."
        )


class Probe:
    """One probe: its training data, its test sets, and where things are kept. All methods are collective.

    The options are those of `training.linear_probe`, the model is a `LoadedModel`; for `ranks` see `sweep.patient`.
    """

    def __init__(self, options: Any, loaded: Any, splits: Splits, results: Results, ranks: Ranks):
        self.options, self.loaded, self.splits, self.results, self.ranks = options, loaded, splits, results, ranks
        self.num_classes = len(splits.train.classnames)
        self.device = torch.device("cpu") if ranks.device.type == "mps" else ranks.device  # MPS has no float64
        self.settings = SolverSettings(options.max_iterations, options.tolerance)
        held_out = options.regularisation == SWEEP and not splits.val
        self.training = {
            **{name: getattr(options, name) for name in ("layer", "normalize", "standardize", "feature_dtype")},
            "regularisation": options.regularisation,
            "train": splits.train.name,
            "train_fingerprint": splits.train.fingerprint(),
            "train_classes": _classes(splits.train),
            "val_fingerprint": splits.val.fingerprint() if splits.val else None,
            "held_out": options.held_out if held_out else None,
            "seed": options.seed if held_out else None,
            **asdict(self.settings),
        }

    def run(self) -> list[dict]:
        """The records of all test sets. What is finished is not done again."""
        records, trained = [], None
        for test in self.splits.tests:
            work = described("linear_probe", self.options, self.loaded, test, classes=_classes(test), **self.training)
            record = self.results.find(work)
            if record is None:
                trained = trained or self.classifier()
                classifier, found = trained
                features, metrics = self.features(test), None
                rows = FeatureRows([features], self.num_classes, self.device)
                with self.ranks.agree():
                    if self.ranks.is_main:
                        metrics = score(all_logits(classifier, rows), test, features.rows)
                metrics = self.ranks.broadcast(metrics)
                record = self.results.add(work, metrics, {**found, "skipped": list(features.skipped)})
            records.append(record)
        return records

    def features(self, data: LabelledImages) -> FeatureSet:
        options = self.options
        with self.ranks.agree():
            encoder = feature_encoder(self.loaded.model, options.layer, options.normalize, options.torchcompile)
        settings = EncodeSettings.of(options, f"{data.name} ({data.split})")
        images = ImagePass(encoder, data.images, self.loaded.preprocess, ranks=self.ranks, settings=settings)
        what = described_model(options, self.loaded) | {"layer": options.layer, "normalize": options.normalize}
        dtype, folder = DTYPES[options.feature_dtype], Path(options.cache)
        return extract_features(images, data, what, dtype=dtype, folder=folder, redo=options.redo)

    def classifier(self) -> tuple[LinearClassifier, dict]:
        """The trained probe and what is worth knowing about it, the same on every process; kept beside the features."""
        options = self.options
        what = [described_model(options, self.loaded), options.on_broken, self.training]
        path = Path(options.cache, f"probe-{digest_of(what)}.pt")
        saved = read_kept(path, self.ranks, options.redo)
        if saved is None:
            saved = self._train()
            keep(saved, path, self.ranks, "--cache")
        found = saved["found"]
        if not found["converged"]:
            logging.warning(f"L-BFGS had not converged after {found['iterations']} iterations; raise --max-iterations.")
        return LinearClassifier(saved["weight"].to(self.device), saved["bias"].to(self.device)), found

    def _train(self) -> dict:
        sets = [self.features(data) for data in (self.splits.train, self.splits.val) if data is not None]
        check_all_classes(self.splits.train, sets[0].labels[sets[0].rows], self.options.max_train_samples)
        if self._fits(sets):
            sets = [part._replace(features=part.features.to(self.device, copy=True)) for part in sets]
        regularisation, trials = self.options.regularisation, []
        if regularisation == SWEEP:
            best, trials = self._sweep(sets)
            regularisation = best.regularisation
        saved = None
        if self.ranks.is_main:  # it would be the same on all processes
            rows = self._rows(sets)
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
            raise UserError(f"The fit with regularisation {regularisation} diverged; take another one.")
        return saved

    def _sweep(self, parts: list[FeatureSet]) -> tuple[Trial, list[Trial]]:
        """The best regularisation for rows that are not trained on: the val split, or some of the training rows."""
        kept, held_out = parts[:1], parts[1:]
        if not held_out:
            part = parts[0]
            count = max(1, round(self.options.held_out * len(part.rows)))
            held = stratified_sample(part.labels[part.rows], count, self.options.seed, leave=1)
            if not len(held):
                raise UserError(
                    f"{self.splits.train.name} has one training image a class, none to hold out for the sweep; give "
                    "--regularisation a value."
                )
            rest = torch.ones(len(part.rows), dtype=torch.bool)
            rest[held] = False
            kept, held_out = [part._replace(rows=part.rows[rest])], [part._replace(rows=part.rows[held])]
        train, test = self._rows(kept), FeatureRows(held_out, self.num_classes, self.device)
        logging.info(f"sweep: {len(train):,} samples to train on, {len(test):,} held out")

        def attempt(regularisation: float) -> Trial:
            classifier = fit(train, regularisation, self.settings)
            return Trial(regularisation, *held_out_score(classifier, test), classifier.iterations)

        best, trials = sweep(attempt, self.ranks)
        logging.info(f"chosen: {best.regularisation:.4g}, with {best.top1:.2%} held out")
        return best, trials

    def _rows(self, parts: list[FeatureSet]) -> FeatureRows:
        rows = FeatureRows(parts, self.num_classes, self.device)
        return rows.standardized() if self.options.standardize else rows

    def _fits(self, parts: list[FeatureSet]) -> bool:
        """Whether the training features are kept on the device; else they are read from their file, again and again."""
        size, given = sum(part.features.nbytes for part in parts), self.options.feature_memory
        if given is not None:
            room = given * 1e9
        elif self.device.type == "cuda":
            room = torch.cuda.mem_get_info(self.device)[0] / 2
        else:
            room = 0  # the system keeps in memory what it can of a file
        where = f"kept on {self.device}" if size <= room else "read from disk in each iteration"
        logging.info(f"{size / 1e9:.2f} GB of training features are {where}")
        return size <= room


def _classes(data: LabelledImages) -> str:
    """A hash of the names of the classes, and of which of ImageNet's they are."""
    groups = data.imagenet_classes
    return digest_of([list(data.classnames), None if groups is None else [list(group) for group in groups]])
