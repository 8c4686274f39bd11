"""From configs/study to the runs there are: cells by table, their settings, operations, lengths and names."""
from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from open_clip_elip.profile import command as profile
from training.data.sets.folders import list_shards
from training.errors import UserError

FULL, REDUCED = "full", "vision-guided-reduction"  # how weights are evaluated: with all tokens, or with some
THREADS = 1  # of the CPU, for a run: sums, and with them the last digits, depend on it

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A row of the table in its full name: options of `training.main` beside the base's, how weights are evaluated."""

    full_name: str
    options: Options = field(default_factory=dict)
    evaluation: str = FULL

    @property
    def name(self) -> str:
        return self.full_name.partition("/")[2]


@dataclass(frozen=True)
class Table:
    """Cells to compare with the one called `reference`, after as many samples or, with `match`, operations as it."""

    name: str
    part: str
    title: str
    reference: str
    cells: Sequence[Cell]
    match: str | None = None


@dataclass(frozen=True)
class Study:
    """What configs/study and the command line say."""

    tables: Sequence[Table]
    base: Options  # of all runs
    seeds: Sequence[int]
    batch_size: int
    samples: int  # of a run where compute is not matched, scaled by the budget
    data: Path
    out: Path = Path("logs/study")  # a row `<id>.json` for each finished run; the runs, their config files and logs
    device: str | None = None
    fashion_mnist: Path | None = None  # folder, for another probe
    keep_weights: bool = False  # the last checkpoint of each run

    @property
    def cells(self) -> list[Cell]:
        return [cell for table in self.tables for cell in table.cells]


@dataclass(frozen=True)
class Run:
    """One training. Equal runs are one: `id` is a hash of all that the result depends on."""

    id: str
    options: Options
    seed: int
    samples: int
    flops: float = 0.0  # of one sample, as counted before the run
    cells: list[str] = field(default_factory=list)  # full names of those that it is the result of
    evaluations: set[str] = field(default_factory=set)


def load_study(
    folder: Path, *, budget: float = 1.0, data: Path | None = None, model: str | None = None, **settings: Any
) -> Study:
    """The study in `folder`/study.yaml with `settings`, which are more attributes of `Study`. `budget` is a factor for
    the number of samples; `data` and `model` are taken instead of the study's own.

    UserError: a file that is not there or says something that cannot be meant, or a budget that leaves no step.
    """
    whole = _read(folder / "study.yaml")
    if set(whole) != {"base", "tables", "seeds", "samples", "data"}:
        raise UserError(f"{folder / 'study.yaml'} must have base, tables, seeds, samples and data.")
    base = _read(folder / whole["base"]) | ({} if model is None else {"model": model})
    tables = [table for file in whole["tables"] for table in _tables(folder / file)]
    batch = int(base["batch-size"])
    steps = whole["samples"] * budget / batch
    if not steps > 0.5:
        raise UserError(f"--budget {budget:g} leaves less than one step of {batch} samples; raise it.")
    return Study(tables, base, whole["seeds"], batch, round(steps) * batch, data or Path(whole["data"]), **settings)


def _tables(file: Path) -> list[Table]:
    tables = []
    for name, content in _read(file).items():
        if not isinstance(content, dict) or set(content) - {"match"} != {"title", "reference", "cells"}:
            raise UserError(f"{file}: the table {name} must have title, reference and cells, and may have match.")
        cells = []
        for cell, options in content["cells"].items():
            options = dict(options or {})
            cells.append(Cell(f"{name}/{cell}", evaluation=options.pop("evaluate", FULL), options=options))
        if content["reference"] not in content["cells"] or content.get("match", "compute") != "compute":
            raise UserError(f"{file}: the reference of {name} must be one of its cells, and match can only be compute.")
        if wrong := {cell.evaluation for cell in cells} - {FULL, REDUCED}:
            raise UserError(f"{file}: in {name}, evaluate is {FULL} or {REDUCED}, not {wrong.pop()}.")
        tables.append(Table(name, file.stem, **content | {"cells": cells}))
    return tables


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not a YAML mapping ({' '.join(str(error).split())}); check --configs.") from None


def choose(study: Study, cell: str | None, seed: int | None) -> set[tuple[str, int]]:
    """The full names and seeds that are meant by a name, in full or not, and a seed, or by None.

    UserError: no such cell, several, no such seed, or folders of the study that are not there.
    """
    if not (study.data / "dataset.json").is_file():
        raise UserError(f"There are no pictures in {study.data}; make them with scripts/make_study_data.py --out DIR.")
    if study.fashion_mnist is not None and not study.fashion_mnist.is_dir():
        raise UserError(f"There is no folder {study.fashion_mnist}; check --fashion-mnist.")
    found = [own.full_name for own in study.cells if cell in (None, own.name, own.full_name)]
    if not found or (cell and len(found) > 1):
        several = f"There are {' and '.join(found)}; say which."
        raise UserError(several if found else f"There is no cell {cell}; --list shows them.")
    if seed not in (None, *study.seeds):
        raise UserError(f"--seed must be one of {', '.join(map(str, study.seeds))}, not {seed}.")
    return {(name, own) for name in found for own in study.seeds if seed in (None, own)}


def expand(study: Study, flops: Callable[[Options], float]) -> list[Run]:
    """All runs, each once, in an order that gives a whole coarse result early: the parts in turn, in each all cells
    with one seed after another. `flops` are the operations of one sample in training with a cell's options."""
    data = hashlib.sha256((study.data / "dataset.json").read_bytes()).hexdigest()[:12]
    runs: dict[str, Run] = {}
    for part, seed in ((part, seed) for part in dict.fromkeys(t.part for t in study.tables) for seed in study.seeds):
        for table, cell in ((t, cell) for t in study.tables if t.part == part for cell in t.cells):
            samples, cost = study.samples, flops(cell.options)
            if table.match:
                reference = next(flops(other.options) for other in table.cells if other.name == table.reference)
                samples = round(samples * reference / cost / study.batch_size) * study.batch_size
            what = {"seed": seed, "samples": samples, "threads": THREADS, "data": data}
            text = json.dumps({**study.base, **cell.options, **what}, sort_keys=True)
            key = hashlib.sha256(text.encode()).hexdigest()[:12]
            run = runs.setdefault(key, Run(key, cell.options, seed, samples, cost))
            run.cells.append(cell.full_name)
            run.evaluations.add(cell.evaluation)
    return list(runs.values())


def count_operations(study: Study) -> Callable[[Options], float]:
    """Operations of one sample in training by a cell's options, as `open_clip_elip.profile` counts them for captions
    of the study's lengths; UserError if a cell's model cannot be made."""

    def spec(options: Options) -> str:
        values = {"shortcuts": True, **options.get("token-reduction", {})}
        words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
        return f"{study.base['model']}:{','.join(words)}"

    full, captions = spec({"token-reduction": {"method": "none"}}), []
    for shard in list_shards(study.data / "train")[:2]:
        with tarfile.open(shard) as tar:
            captions += [tar.extractfile(member).read().decode() for member in tar if member.name.endswith(".txt")]
    specs, said = {full, *(spec(cell.options) for cell in study.cells)}, io.StringIO()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(said):
        lines, found = Path(folder, "captions.txt"), Path(folder, "profile.json")
        lines.write_text("\n".join(captions), encoding="utf-8")
        flags = ["--no-time", "--device", "cpu", "--batch-size", str(study.batch_size), "--caption-lengths", str(lines)]
        if profile.main([*sorted(specs), *flags, "--json", str(found)]):
            raise UserError(said.getvalue().strip().removeprefix("error: "))
        models = json.loads(found.read_text())["models"]
    counted = {model["label"]: 1e12 * model["tflops_per_step"] / model["batch_size"] for model in models}

    def flops(options: Options) -> float:
        share = float(str(options.get("full-tokens-last", "0%")).removesuffix("%")) / 100
        return (1 - share) * counted[spec(options)] + share * counted[full]

    return flops
