"""From configs/study to the runs there are: cells by table, their settings, lengths and names."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from training.errors import UserError

FULL, REDUCED = "full", "vision-guided-reduction"  # how weights are evaluated: with all tokens, or with some
MATCH_ELIP = "elip"  # as a target_rrt: that of the model's own reduction

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One row of a table: flags of `training.main` beside the base's, and how the weights are evaluated."""

    table: str
    name: str
    options: Options
    evaluation: str = FULL

    @property
    def full_name(self) -> str:
        return f"{self.table}/{self.name}"


@dataclass(frozen=True)
class Table:
    """Cells that are compared with the cell called `reference`, after as many samples or as many operations as it."""

    name: str
    part: str
    title: str
    reference: str
    cells: Sequence[Cell]
    match_compute: bool = False


@dataclass(frozen=True)
class Study:
    """What configs/study says.

    Attributes:
        base: flags of all runs: those in `base_file`, with `overrides` on top.
        samples: of a run, already scaled by the budget.
    """

    tables: Sequence[Table]
    base: Options
    base_file: Path
    overrides: Options
    seeds: Sequence[int]
    samples: int
    data: Path

    @property
    def batch_size(self) -> int:
        return int(self.base["batch-size"])


@dataclass(frozen=True)
class Run:
    """One training. Equal runs are one: `id` is a hash of all that the result depends on.

    Attributes:
        cells: full names of the cells that it is the result of.
        evaluations: `FULL`, `REDUCED`, or both.
        flops: of one pair, as far as they are known before the run.
    """

    id: str
    options: Options
    seed: int
    samples: int
    threads: int
    cells: list[str] = field(default_factory=list)
    evaluations: list[str] = field(default_factory=list)
    flops: float | None = None

    @property
    def name(self) -> str:
        return self.cells[0]


def load_study(
    folder: Path, *, budget: float = 1.0, data: Path | None = None, overrides: Options | None = None
) -> Study:
    """The study in `folder`/study.yaml.

    Args:
        budget: factor for the number of samples.
        data: instead of the study's own.
        overrides: flags of the trainer that win over the base's, such as {"model": "ViT-S-16-ELIP"}.

    Raises:
        UserError: a file that is not there or says something that cannot be meant, or a budget that leaves no step.
    """
    if not budget > 0:
        raise UserError(f"--budget must be more than 0, not {budget:g}.")
    whole = _read(folder / "study.yaml", {"base", "tables", "seeds", "samples", "data"})
    overrides = dict(overrides or {})
    base = _read(folder / whole["base"]) | overrides
    tables = [table for file in whole["tables"] for table in _tables(folder / file)]
    names = [table.name for table in tables]
    if len(set(names)) < len(names):
        raise UserError(f"{folder}: two tables have the same name; the names are {', '.join(names)}.")
    batch = int(base["batch-size"])
    steps = round(whole["samples"] * budget / batch)
    if not steps:
        raise UserError(f"--budget {budget:g} leaves less than one step of {batch} samples; raise it.")
    file, data = folder / whole["base"], data or Path(whole["data"])
    return Study(tables, base, file, overrides, whole["seeds"], steps * batch, data)


def _tables(file: Path) -> list[Table]:
    tables = []
    for name, content in _read(file).items():
        known = {"title", "reference", "match", "cells"}
        if not isinstance(content, dict) or not {"title", "reference", "cells"} <= set(content) <= known:
            raise UserError(f"{file}: the table {name} must have title, reference and cells, and may have match.")
        if content.get("match", "compute") != "compute":
            raise UserError(f"{file}: match of the table {name} can only be compute, not {content['match']!r}.")
        if content["reference"] not in content["cells"]:
            raise UserError(f"{file}: the reference {content['reference']!r} of the table {name} is none of its cells.")
        cells = []
        for cell, options in content["cells"].items():
            options = dict(options or {})
            evaluation = options.pop("evaluate", FULL)
            if evaluation not in (FULL, REDUCED):
                raise UserError(f"{file}: {name}/{cell} can be evaluated {FULL} or {REDUCED}, not {evaluation!r}.")
            cells.append(Cell(name, str(cell), options, evaluation))
        match = content.get("match") == "compute"
        tables.append(Table(name, file.stem, content["title"], content["reference"], cells, match))
    return tables


def _read(file: Path, needed: set[str] | None = None) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); check --configs.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict) or (needed and set(content) != needed):
        raise UserError(f"{file} must be a YAML mapping" + (f" of {', '.join(sorted(needed))}." if needed else "."))
    return content


# ------------------------------------------------------------------------------------------------------------- runs


def expand(
    study: Study,
    flops: Callable[[Options], float | None],
    rrt: Callable[[], float],
    *,
    data_key: str,
    threads: int = 1,
) -> tuple[list[Run], dict[tuple[str, int], Run]]:
    """All runs in their order, each once, and the run of each (full name of a cell, seed).

    The order gives a whole coarse result early: the parts in turn, and in each all cells with one seed after another.

    Args:
        flops: operations of one pair in training with these options; None if they cannot be counted.
        rrt: the ratio of removed tokens that `target_rrt: elip` stands for.
        data_key: what tells the data from other data.
        threads: of the CPU, for each run; sums, and with them the last digits, depend on it.
    """
    runs: dict[str, Run] = {}
    of_cell: dict[tuple[str, int], Run] = {}
    for part in dict.fromkeys(table.part for table in study.tables):
        for seed in study.seeds:
            for table in (table for table in study.tables if table.part == part):
                for cell in table.cells:
                    options = resolved(cell.options, rrt)
                    samples, cost = study.samples, flops(options)
                    if table.match_compute:
                        reference = next(c for c in table.cells if c.name == table.reference)
                        samples = matched_samples(study, flops(resolved(reference.options, rrt)), cost)
                    key = run_id(study, options, seed, samples, threads, data_key)
                    run = runs.setdefault(key, Run(key, options, seed, samples, threads, flops=cost))
                    if cell.full_name not in run.cells:
                        run.cells.append(cell.full_name)
                    if cell.evaluation not in run.evaluations:
                        run.evaluations.append(cell.evaluation)
                    of_cell[cell.full_name, seed] = run
    return list(runs.values()), of_cell


def resolved(options: Options, rrt: Callable[[], float]) -> dict[str, Any]:
    """`options` with the number that `target_rrt: elip` stands for."""
    reduction = options.get("token-reduction", {})
    if reduction.get("target_rrt") == MATCH_ELIP:
        return {**options, "token-reduction": {**reduction, "target_rrt": round(rrt(), 6)}}
    return dict(options)


def matched_samples(study: Study, reference: float | None, cost: float | None) -> int:
    """Samples, in whole steps, that cost as much as `study.samples` of the reference; 0 where that is not known."""
    if not reference or not cost:
        return 0
    return round(study.samples * reference / cost / study.batch_size) * study.batch_size


def run_id(study: Study, options: Options, seed: int, samples: int, threads: int, data_key: str) -> str:
    what = {**study.base, **options, "seed": seed, "samples": samples, "threads": threads, "data": data_key}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def find_cell(study: Study, name: str) -> Cell:
    """The cell with this full name, or with this name if only one table (or only equal cells) has it.

    Raises:
        UserError: there is none, or there are several.
    """
    cells = [cell for table in study.tables for cell in table.cells]
    found = [cell for cell in cells if name in (cell.full_name, cell.name)]
    if not found:
        raise UserError(f"There is no cell {name}; --list shows them.")
    if len(found) > 1 and name not in (cell.full_name for cell in found):
        raise UserError(f"There are {' and '.join(cell.full_name for cell in found)}; say which.")
    return found[0]


def words(options: Options) -> list[str]:
    """Options as words of a command line: true and false become --name and --no-name, mappings key=value."""
    line = []
    for name, value in options.items():
        if isinstance(value, bool):
            line.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, Mapping):
            settings = (f"{key}={item}".replace(" ", "") for key, item in value.items() if key != "method")
            line += [f"--{name}", *([value["method"]] if "method" in value else []), *settings]
        else:
            line += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return line
