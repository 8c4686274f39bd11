"""Options of the linear probe."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..files import check_folder
from .evaluation import EvaluationOptions
from .kinds import FRACTION_BELOW_1, NOT_NEGATIVE, POSITIVE, POSITIVE_COUNT, SEED, Kind, one_of
from .parser import forbid, option

SWEEP = "sweep"
FEATURE_FORMATS = ("float32", "bf16", "fp16")
REGULARISATION = Kind(
    lambda word: word if word == SWEEP else float(word), f"{SWEEP} or a number from 1e-30 to 1e30", "sweep|X",
    lambda value: value == SWEEP or 1e-30 <= value <= 1e30)  # fmt: skip


@dataclass
class ProbeOptions(EvaluationOptions, title="probe", command="training.linear_probe"):
    also: list[str] = option(
        [], "More test sets for the probes: each with the classes of one of --data, or with some of ImageNet's.",
        metavar="[NAME=]PATH", nargs="+", path=True)
    layer: str = option("pooled", "Features before or after the projection.", one_of("pooled", "projected"))
    normalize: bool = option(False, "Features of unit length.")
    standardize: bool = option(False, "Mean 0 and variance 1 in each dimension, on the training set.")
    regularisation: float | str = option(
        SWEEP, "C of scikit-learn's LogisticRegression.", REGULARISATION, spellings=("--regularization",))
    held_out: float = option(
        0.1, "Share of the training set for the sweep, if the data have no val split of their own.", FRACTION_BELOW_1,
        needs=f"regularisation={SWEEP}")
    max_iterations: int = option(1000, "Of L-BFGS.", POSITIVE_COUNT)
    tolerance: float = option(1e-6, "Of L-BFGS.", POSITIVE)
    max_train_samples: int | None = option(
        None, "Train on N samples, the classes keeping their shares.", POSITIVE_COUNT)
    shots: int | None = option(None, "Train on K samples of each class, drawn by --seed.", POSITIVE_COUNT, metavar="K")
    seed: int = option(0, "Seed of what is drawn at random.", SEED)
    cache: str | None = option(
        None, "Where features are kept. Without it: features in the folder of --results.", metavar="DIR", path=True)
    feature_dtype: str = option("float32", "Number format of features on disk.", one_of(*FEATURE_FORMATS))
    feature_memory: float | None = option(
        None, "GB of the device for the training features; if they need more they are read from disk in each "
        "iteration. Without it: half of what is free on a GPU.", NOT_NEGATIVE)
    gone = dict.fromkeys(("solver", "epochs", "lr", "solver_batch_size"), "is gone: probes are fitted by L-BFGS alone")

    def check(self) -> None:
        forbid(self.held_out == 0, "--held-out must be between 0 and 1, such as 0.1.")
        if self.cache is None:
            nowhere = self.results.lower() == "none"
            forbid(nowhere, "--results none leaves no place for the features; name one with --cache.")
            self.cache = str(Path(self.results, "features"))
        check_folder(Path(self.cache), "--cache")
        forbid(self.shots and self.max_train_samples, "--shots and --max-train-samples both choose images; give one.")
