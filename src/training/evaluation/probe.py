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
from ..options.linear_probe import SWEEP
from .features import DTYPES, FeatureRows, FeatureSet, extract_features, feature_encoder
from .loaded import LoadedModel
from .logistic import LinearClassifier, fit, held_out_score
from .passes import EncodeSettings, ImagePass
from .results import Results, described, digest_of
from .scores import check_classes, score
from .sweep import Trial, few_shots, stratified_sample, sweep


class Splits(NamedTuple):
    """What a probe is trained and evaluated on."""

    train: LabelledImages
    val: LabelledImages | None  # for the sweep, if the data have one that is not the test set
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
    check_classes(train, test)
    val = None
    if test.split != "val":
        try:
            val = load_data(spec, split="val", download=options.download)
        except UserError as error:
            logging.info(f"no validation split: {str(error).partition(';')[0]}")
    if val is not None:
        check_classes(train, val)
        if val.same_pictures(train):
            logging.warning(f"{spec}: the validation and the training split are the same pictures; it is left out.")
        val = None if val.same_pictures(test) or val.same_pictures(train) else val
    if options.max_train_samples is not None and options.max_train_samples < len(train):
        train = train.subset(stratified_sample(train.labels, options.max_train_samples, options.seed))
    check_all_classes(train, train.labels, options.max_train_samples)
    if options.shots is not None:
        counts = torch.bincount(train.labels)
        if counts.min() < options.shots:
            few = train.classnames[counts.argmin()]
            raise UserError(f"{spec} has {counts.min()} training images of {few!r}; lower --shots to that.")
        train = train.subset(few_shots(train.labels, options.shots, options.seed))
    return Splits(train, val, [test])


def check_all_classes(data: LabelledImages, labels: Tensor, max_train_samples: int | None) -> None:
    """Raises UserError if a class does not occur in `labels`."""
    missing = set(range(len(data.classnames))).difference(labels.tolist())
    if missing:
        remedy = "add some" if max_train_samples is None else "add some, or raise --max-train-samples"
        raise UserError(
            f"{len(missing)} of the {len(data.classnames)} classes of {data.name} have no readable training image "
            f"(the first is {data.classnames[min(missing)]!r}); {remedy}."
        )


class Probe:
    """One probe of `training.linear_probe`: its data, and where things are kept. `ranks`: see `sweep.patient`."""

    def __init__(self, options: Any, loaded: LoadedModel, splits: Splits, results: Results, ranks: Ranks):
        self.options, self.loaded, self.splits, self.results, self.ranks = options, loaded, splits, results, ranks
        self.device = torch.device("cpu") if ranks.device.type == "mps" else ranks.device  # MPS has no float64
        self.limits = options.max_iterations, options.tolerance
        held_out = options.regularisation == SWEEP and not splits.val
        names = ("layer", "normalize", "standardize", "feature_dtype", "regularisation", "max_iterations", "tolerance")
        self.training = {
            **{name: getattr(options, name) for name in names},
            "train": splits.train.name,
            "train_fingerprint": splits.train.fingerprint(),
            "train_classes": _classes(splits.train),
            "val_fingerprint": splits.val.fingerprint() if splits.val else None,
            "held_out": options.held_out if held_out else None,
            "shots": options.shots,
            "seed": options.seed if held_out or options.shots else None,
        }

    def run(self) -> list[dict]:
        """The records of all test sets. What is finished is not done again."""
        records, trained = [], None
        for test in self.splits.tests:
            own = {"classes": _classes(test), **self.training}
            work = described("linear_probe", self.options, self.loaded.described, test, **own)
            record = self.results.find(work)
            if record is None:
                trained = trained or self._trained()
                features, metrics = self._features(test), None
                with self.ranks.agree():
                    if self.ranks.is_main:
                        classifier = LinearClassifier(*(trained[name].to(self.device) for name in ("weight", "bias")))
                        logits = torch.cat([logits.cpu() for logits, _ in classifier.logits(self._rows([features]))])
                        metrics = score(logits, test, features.rows)
                metrics = self.ranks.broadcast(metrics)
                record = self.results.add(work, metrics, {**trained["found"], "skipped": list(features.skipped)})
            records.append(record)
        return records

    def _features(self, data: LabelledImages) -> FeatureSet:
        options = self.options
        encoder = feature_encoder(self.loaded.model, options.layer, options.normalize, options.torchcompile)
        settings = EncodeSettings.of(options, f"{data.name} ({data.split})")
        images = ImagePass(encoder, data.images, self.loaded.preprocess, ranks=self.ranks, settings=settings)
        what = {**self.loaded.described, "layer": options.layer, "normalize": options.normalize}
        dtype, folder = DTYPES[options.feature_dtype], Path(options.cache)
        return extract_features(images, data, what, dtype=dtype, folder=folder, redo=options.redo)

    def _trained(self) -> dict:
        """`weight` and `bias`, and what was `found`, the same on every process; kept beside the features."""
        key = digest_of([self.loaded.described, self.options.on_broken, self.training])
        trained = self.results.kept(Path(self.options.cache, f"probe-{key}.pt"), "--cache", self._train)
        if not trained["found"]["converged"]:
            tried = trained["found"]["iterations"]
            logging.warning(f"L-BFGS had not converged after {tried} iterations; raise --max-iterations.")
        return trained

    def _train(self) -> dict:
        sets = [self._features(data) for data in (self.splits.train, self.splits.val) if data is not None]
        check_all_classes(self.splits.train, sets[0].labels[sets[0].rows], self.options.max_train_samples)
        if self._fits(sets):
            sets = [part._replace(features=part.features.to(self.device, copy=True)) for part in sets]
        regularisation, trials = self.options.regularisation, []
        if regularisation == SWEEP:
            best, trials = self._sweep(sets)
            regularisation = best.regularisation
        sets = sets if self.options.shots is None else sets[:1]  # shots are all that is trained on
        trained = None
        if self.ranks.is_main:  # it would be the same on all processes
            classifier = fit(self._training_rows(sets), regularisation, *self.limits)
            found = {
                "regularisation": regularisation,
                "iterations": classifier.iterations,
                "converged": classifier.converged,
                "num_train_samples": sum(len(part.rows) for part in sets),
                "train_skipped": [name for part in sets for name in part.skipped],
                "trials": [
                    {**asdict(trial), "loss": trial.loss if math.isfinite(trial.loss) else None} for trial in trials
                ],
            }
            trained = {"weight": classifier.weight.cpu(), "bias": classifier.bias.cpu(), "found": found}
        trained = self.ranks.broadcast(trained)
        if not (trained["weight"].isfinite().all() and trained["bias"].isfinite().all()):
            raise UserError(f"The fit with regularisation {regularisation} diverged; take another one.")
        return trained

    def _sweep(self, parts: list[FeatureSet]) -> tuple[Trial, list[Trial]]:
        """The best regularisation for rows that are not trained on: the val split, or some of the training rows."""
        kept, held_out = parts[0], parts[-1]
        if self.splits.val is None:
            count = max(1, round(self.options.held_out * len(kept.rows)))
            held = stratified_sample(kept.labels[kept.rows], count, self.options.seed, leave=1)
            if not len(held):
                raise UserError(
                    f"{self.splits.train.name} has one training image a class, none to hold out for the sweep; give "
                    "--regularisation a value."
                )
            rest = torch.ones(len(kept.rows), dtype=torch.bool)
            rest[held] = False
            kept, held_out = kept._replace(rows=kept.rows[rest]), kept._replace(rows=kept.rows[held])
        logging.info(f"sweep: {len(kept.rows):,} samples to train on, {len(held_out.rows):,} held out")
        train, test = self._training_rows([kept]), self._rows([held_out])

        def attempt(regularisation: float) -> Trial:
            classifier = fit(train, regularisation, *self.limits)
            return Trial(regularisation, *held_out_score(classifier, test), classifier.iterations)

        best, trials = sweep(attempt, self.ranks)
        logging.info(f"chosen: {best.regularisation:.4g}, with {best.top1:.2%} held out")
        return best, trials

    def _training_rows(self, parts: list[FeatureSet]) -> FeatureRows:
        rows = self._rows(parts)
        return rows.standardized() if self.options.standardize else rows

    def _rows(self, parts: list[FeatureSet]) -> FeatureRows:
        return FeatureRows(parts, len(self.splits.train.classnames), self.device)

    def _fits(self, parts: list[FeatureSet]) -> bool:
        """Whether the training features are kept on the device; else they are read from their file, again and again."""
        size, room = sum(part.features.nbytes for part in parts), 0  # the system keeps in memory what it can of a file
        if self.options.feature_memory is not None:
            room = self.options.feature_memory * 1e9
        elif self.device.type == "cuda":
            room = torch.cuda.mem_get_info(self.device)[0] / 2
        where = f"kept on {self.device}" if size <= room else "read from disk in each iteration"
        logging.info(f"{size / 1e9:.2f} GB of training features are {where}")
        return size <= room


def _classes(data: LabelledImages) -> str:
    """A hash of the names of the classes, and of which of ImageNet's they are."""
    groups = data.imagenet_classes
    return digest_of([list(data.classnames), None if groups is None else [list(group) for group in groups]])
