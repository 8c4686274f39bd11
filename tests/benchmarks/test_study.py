"""The study: cells and runs, going on after an interruption, reports of known figures, and a real run of one cell."""
from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import make_study_data
import pandas
import pytest
import torch
import yaml
from benchmarks.study import cells, report, run
from scripts import study as script

from training.errors import UserError

from ..study_packages import write_packages

ROOT = Path(__file__).parents[2]
CONFIGS, RESULTS = ROOT / "configs" / "study", ROOT / "benchmarks" / "results" / "study"
BEGUN: dict[str, torch.Tensor] = {}  # weights at the start
NONE = {"token-reduction": {"method": "none"}}
TABLE = {"steps": {"title": "Methods", "reference": "none", "cells": {"none": NONE, "elip": {}}}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    packages = write_packages(folder / "packages")
    make_study_data.build(folder / "data", packages=packages, size=64, holdout=0.2)
    return folder / "data"


def flops(options) -> float:
    return {"none": 4.0, "random": 2.0}.get(options.get("token-reduction", {}).get("method"), 3.0)


def expanded(data, **changes) -> dict:
    """The committed study's runs by full name of a cell and seed."""
    runs = cells.expand(cells.load_study(CONFIGS, data=data, **changes), flops)
    assert len({one.id for one in runs}) == len(runs)
    return {(name, one.seed): one for one in runs for name in one.cells}


def write_configs(folder: Path, tables: dict, samples: int = 16, seeds=(0,), data: str = "data") -> Path:
    base = yaml.safe_load((CONFIGS / "base.yaml").read_text()) | {"batch-size": 8, "log-every-n-steps": 1}
    whole = {"base": "base.yaml", "tables": ["methods.yaml"], "seeds": list(seeds), "samples": samples, "data": data}
    for name, content in (("base", base), ("study", whole), ("methods", tables)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder



def test_the_committed_study_has_all_that_it_should(data):
    study, of_cell = cells.load_study(CONFIGS), expanded(data)
    tables = {table.name: table for table in study.tables}
    methods = {"none", "elip", "elip-depth1", "evit", "tome", "random", "random-unmasked"}
    assert all({cell.name for cell in tables[name].cells} == methods for name in ("steps", "compute"))
    found = {cell.options.get("token-reduction", {}).get("lam") for cell in tables["lam"].cells}
    assert found == {None, 0.0, 0.2, 0.4, 0.8, 1.0}
    assert len(tables["schedule"].cells) == 6 and len(study.seeds) >= 3
    default = of_cell["steps/elip", 0]
    assert {"lam/match-0.6", "merge/merge", "scoring/block", "downstream/reduced"} < set(default.cells)
    assert default.evaluations == {cells.FULL, cells.REDUCED}
    assert of_cell["lam/match-1.0", 1] is of_cell["lam/none-1.0", 1] is not of_cell["lam/match-1.0", 0]
    assert of_cell["steps/none", 0] is of_cell["compute/none", 0]
    runs = cells.expand(cells.load_study(CONFIGS, data=data), flops)  # the parts come in turn, and in them seeds
    order = [(not one.cells[0].startswith(("steps", "compute")), one.seed) for one in runs]
    assert order == sorted(order) and {seed for _, seed in order} == {0, 1, 2}


def test_matched_compute_and_that_any_changed_setting_is_another_run(data, tmp_path):
    of_cell, samples = expanded(data, budget=2.0), 2 * 17920
    assert of_cell["steps/random", 0].samples == samples and of_cell["compute/random", 0].samples == 2 * samples
    assert of_cell["compute/elip", 0].samples == round(samples * 4 / 3 / 64) * 64
    (tmp_path / "dataset.json").write_text("other data")
    changes = ({}, {"budget": 5}, {"model": "ViT-S-16-ELIP"})
    ids = [{one.id for one in expanded(data, **change).values()} for change in changes]
    ids.append({one.id for one in expanded(tmp_path).values()})
    assert len(set.union(*ids)) == sum(map(len, ids))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"reference": "nothing"}, "must be one of its cells"),
        ({"match": "steps"}, "match can only be compute"),
        ({"cells": {"a": {"evaluate": "twice"}}, "reference": "a"}, "evaluate is full or"),
        ({"titel": "x"}, "must have title, reference and cells"),
    ],
)
def test_bad_tables_are_refused(tmp_path, change, sentence):
    write_configs(tmp_path, {"t": {"title": "T", "reference": "a", "cells": {"a": {}}} | change})
    with pytest.raises(UserError, match=sentence):
        cells.load_study(tmp_path)



def made_up_runs(seeds: int = 3) -> pandas.DataFrame:
    top1 = {"steps/elip": (0.45, 0.35, 0.54), "steps/none": (0.5, 0.4, 0.6)}
    row = {"threads": 1, "model": "M", "rrt": 0.25, "gflops": 1.0, "pflops": 0.1, "samples": 1280, "heldout_top1": 0.1}
    return pandas.DataFrame(
        row | {"cells": name, "id": f"{name}{seed}", "seed": seed, "train_loss": 2.0 + seed, "seen_top1": found[seed]}
        for name, found in top1.items() for seed in range(seeds)
    )  # fmt: skip


def test_known_means_spreads_and_paired_differences(tmp_path):
    study, runs = cells.load_study(write_configs(tmp_path, TABLE)), made_up_runs()
    differences = report.paired(runs, study.tables[0], study.cells[1], "seen_top1")
    assert list(differences) == pytest.approx([-0.05, -0.05, -0.06])
    assert report.mean_std(pandas.Series([1.0, 2.0, 3.0])) == (2.0, 1.0)
    assert report.is_clear(differences) and not report.is_clear(differences[:2])
    report.write_report(study, runs, tmp_path / "results")
    text = (tmp_path / "results" / "README.md").read_text()
    assert "| none | 3 | 25.0 % | 1.000 | 1,280 | 0.1000 | 50.0 (10.0) | 10.0 (0.0) |" in text
    assert "| elip | 3 | **-5.3 (0.6)** | +0.0 (0.0) |" in text
    page = "# A\n<!-- table steps -->\nold\n<!-- end -->\nB\n"
    filled = report.fill_page(page, study, runs)
    assert "| `none` (reference) | 3 | 25.0 % | 1.000 | 1,280 | 50.0 ± 10.0 |" in filled
    assert "| `elip` | 3 | 25.0 % | 1.000 | 1,280 | **44.7 ± 9.5** |" in filled
    assert "old" not in filled and filled.startswith("# A\n") and filled.endswith("<!-- end -->\nB\n")
    with pytest.raises(UserError, match="no table other"):
        report.fill_page(page.replace("steps", "other"), study, runs)


def test_the_committed_report_is_that_of_the_committed_runs(tmp_path):
    """With a cell that the study no longer has."""
    study, runs = cells.load_study(CONFIGS), report.read_runs(RESULTS / "runs.csv")
    report.write_report(study, runs, tmp_path)
    for name in ("README.md", "runs.csv"):
        assert (tmp_path / name).read_text() == (RESULTS / name).read_text()
    page = (ROOT / "docs" / "results.md").read_text()
    assert report.fill_page(page, study, runs) == page
    assert page.count("<!-- table") == len(study.tables) and "| `adaptive` | 3 |" in page
    with pytest.raises(UserError, match="nothing to report"):
        report.read_runs(tmp_path / "none.csv")
    pytest.importorskip("matplotlib")
    for plot in ("steps", "compute", "lam"):
        content = (tmp_path / f"{plot}.png").read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) < 100_000


def test_a_part_of_the_results_is_reported(tmp_path):
    study, runs = cells.load_study(write_configs(tmp_path, TABLE)), made_up_runs(2)
    report.write_report(study, runs[runs["id"] != "steps/none1"], tmp_path / "results")
    text = (tmp_path / "results" / "README.md").read_text()
    assert "| none | 1 |" in text and "| elip | 2 |" in text and "| elip | 1 | -5.0 (0.0) |" in text
    assert "nothing to report" in report.write_report(study, runs[:0], tmp_path / "none")
    assert not (tmp_path / "none").exists()



@pytest.mark.parametrize("method", ["none", "elip", "evit", "tome", "random"])
def test_methods_begin_alike_and_cost_what_was_planned(method, data, tmp_path):
    options = {"token-reduction": {"method": method}, "lr": 1e-12}  # the weights stay what they were
    table = {"title": "T", "reference": "a", "cells": {"a": options}}
    study = cells.load_study(write_configs(tmp_path, {"t": table}, data=str(data)), out=tmp_path / "out")
    (planned,) = cells.expand(study, cells.count_operations(study))
    assert run.trainer.main(run.command_line(planned, study)) == 0
    row = run.read_training(study.out / "runs" / planned.id)
    assert planned.flops == pytest.approx(1e9 * row["gflops"], rel=0.05)  # captions differ from batch to batch
    weights = run.newest(study.out / "runs" / planned.id / "checkpoints")
    state = torch.load(weights, weights_only=True)["state_dict"]
    BEGUN.update({} if BEGUN else state)
    assert state.keys() == BEGUN.keys() and all(torch.allclose(state[name], BEGUN[name]) for name in BEGUN)
    assert (row["rrt"] > 0.2) == (method != "none") and row["samples"] == 16
    assert method == "none" or json.loads(row["tokens_per_layer"])[-1] < 65


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, data):
    """A study of the study's model, two steps of eight pairs each, all run: of two cells, and one that is refused."""
    folder = tmp_path_factory.mktemp("tiny")
    own = {"elip": {}, "eval": {"evaluate": cells.REDUCED}, "bad": {"lr": -1}}
    table = {"title": "T", "reference": "elip", "cells": own}
    configs = write_configs(folder, {"steps": table}, data=str(data))
    line = ["--configs", configs, "--out", folder / "out", "--results", folder / "results", "--jobs", 2]
    with redirect_stdout(io.StringIO()) as told:
        assert script.main(list(map(str, line))) == 1
    return cells.load_study(configs, out=folder / "out"), told.getvalue(), folder / "results" / "README.md"


def test_runs_leave_their_rows_and_a_report(tiny):
    """And a run that fails is told, and the others go on."""
    study, told, report = tiny
    (row,) = (json.loads(file.read_text()) for file in study.out.glob("*.json"))
    assert "[1/2] steps/elip = steps/eval seed 0" in told
    assert "FAILED steps/bad" in told and "--lr" in told and "1 runs failed" in told
    assert row["samples"] == 16 and row["steps"] == 2 and row["rrt"] == pytest.approx(0.2820513, abs=1e-6)
    assert row["gflops"] > 0 and row["pflops"] == pytest.approx(row["gflops"] * 16 / 1e6)
    for key in ("seen_top1", "heldout_top5", "category_top1", "image_to_text_R@5", "reduced_seen_top1"):
        assert 0 <= row[key] <= 1
    assert math.isfinite(row["val_loss"]) and len(row["weights"]) == 16
    assert not list(study.out.glob("runs/*/checkpoints/*.pt"))
    text = report.read_text()
    assert "| elip | 1 |" in text and "| eval | 1 |" in text and "bad" not in text


def test_what_is_finished_is_not_run_again_and_the_same_command_gives_the_same(tiny, tmp_path):
    study, _, _ = tiny
    (file,) = study.out.glob("*.json")
    again = cells.Run(file.stem, {}, 0, 16, 0.0, ["steps/elip"], {cells.FULL})
    shown: list[str] = []
    assert run.run_all([again], study, jobs=1, show=shown.append) == []
    assert shown == ["1 of 1 runs are finished already"]
    assert run.finished(again, cells.load_study(study.out.parent, out=study.out, fashion_mnist=Path("x"))) is None
    threads = torch.get_num_threads()
    try:
        mine = run.execute(again, cells.load_study(study.out.parent, out=tmp_path))
    finally:
        torch.set_num_threads(threads)
    row = json.loads(file.read_text())
    same = ("weights", "train_loss", "seen_top5", "val_loss", "category_top1", "text_to_image_mean_rank")
    assert {key: mine[key] for key in same} == {key: row[key] for key in same}
    (tmp_path / file.name).write_text("{cut off")
    assert run.finished(again, cells.load_study(study.out.parent, out=tmp_path)) is None


def refused(capsys, *line) -> str:
    assert script.main(list(map(str, line))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_misuse_gives_one_sentence(tmp_path, data, capsys):
    here = ("--data", data)
    assert "There is no cell nothing" in refused(capsys, *here, "--cell", "nothing")
    assert "steps/elip and compute/elip; say which" in refused(capsys, *here, "--cell", "elip")
    assert "make them with" in refused(capsys, "--data", tmp_path / "none")
    assert "less than one step" in refused(capsys, *here, "--budget", "0")
    jobs = refused(capsys, *here, "--jobs", "0")
    assert "--jobs must be at least 1" in jobs
    itself = [sys.executable, script.__file__, "--jobs", "0"]
    assert subprocess.run(itself, capture_output=True, text=True, cwd=tmp_path).stderr == jobs
    assert "--seed must be one of 0, 1, 2" in refused(capsys, *here, "--cell", "steps/elip", "--seed", "9")
    assert "check --configs" in refused(capsys, *here, "--configs", tmp_path)
    assert "check --fashion-mnist" in refused(capsys, *here, "--fashion-mnist", tmp_path / "none")
    wrong = {"t": {"title": "T", "reference": "a", "cells": {"a": {"token-reduction": {"lam": 7.0}}}}}
    assert "lam" in refused(capsys, *here, "--configs", write_configs(tmp_path, wrong), "--out", tmp_path / "out")
