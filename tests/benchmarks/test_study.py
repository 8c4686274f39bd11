"""The study: cells and runs, going on after an interruption, reports of known figures, and a real run of one cell."""
from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from training.errors import UserError

from ..study_packages import load_script, write_packages

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.study import cells, report, run  # noqa: E402
from benchmarks.study.costs import Costs  # noqa: E402

CONFIGS = ROOT / "configs" / "study"
FLOPS = {"none": 4.0, "random": 2.0}  # others 3


def flops(options) -> float:
    return FLOPS.get(options.get("token-reduction"), 3.0)


def expanded(study):
    return cells.expand(study, flops, lambda: 0.2820513, data_key="d")


# ------------------------------------------------------------------------------------------------------- cells and runs


def test_the_committed_study_has_all_that_it_should():
    study = cells.load_study(CONFIGS)
    runs, of_cell = expanded(study)
    assert {run.seed for run in runs} == set(study.seeds) and len(study.seeds) >= 3
    assert len({run.id for run in runs}) == len(runs)
    tables = {table.name: table for table in study.tables}
    assert [table.part for table in study.tables][:2] == ["methods", "methods"]
    for name in ("steps", "compute"):
        assert {c.name for c in tables[name].cells} == {
            "none", "elip", "elip-depth1", "evit", "tome", "random", "random-unmasked",
        }  # fmt: skip
    points = {(float(c.options.get("lam", 0.6)), c.options.get("text-scale", "match")) for c in tables["lam"].cells}
    assert {lam for lam, _ in points} == {0.0, 0.2, 0.4, 0.6, 0.8, 1.0}
    assert len(tables["schedule"].cells) == 6
    default = of_cell["steps/elip", 0]
    assert all(of_cell[name, 0] is default for name in (
        "lam/match-0.6", "merge/merge", "scoring/block", "downstream/reduced", "schedule/2(100)-2(90)-6(65)-2(40)",
    ))  # fmt: skip
    assert sorted(default.evaluations) == sorted([cells.FULL, cells.REDUCED])
    assert of_cell["lam/match-1.0", 1] is of_cell["lam/none-1.0", 1] is not of_cell["lam/match-1.0", 0]
    assert of_cell["steps/none", 0] is of_cell["compute/none", 0]


def test_parts_come_in_turn_and_in_them_seeds():
    runs, _ = expanded(cells.load_study(CONFIGS))
    parts = ["methods" if run.name.startswith(("steps", "compute")) else "ablations" for run in runs]
    assert parts == sorted(parts, reverse=True)
    for part in ("methods", "ablations"):
        seeds = [run.seed for run, own in zip(runs, parts, strict=True) if own == part]
        assert seeds == sorted(seeds)


def test_matched_compute_and_matched_rrt():
    study = cells.load_study(CONFIGS, budget=2.0)
    _, of_cell = expanded(study)
    assert of_cell["steps/random", 0].samples == study.samples
    assert of_cell["compute/random", 0].samples == 2 * study.samples
    assert of_cell["compute/elip", 0].samples == round(study.samples * 4 / 3 / 64) * 64
    assert of_cell["steps/evit", 0].options["target-rrt"] == 0.282051


def test_any_changed_setting_is_another_run():
    study = cells.load_study(CONFIGS)
    others = [cells.load_study(CONFIGS, budget=5), cells.load_study(CONFIGS, overrides={"model": "ViT-S-16-ELIP"})]
    ids = [{run.id for run in expanded(s)[0]} for s in (study, *others)]
    ids += [{run.id for run in cells.expand(study, flops, lambda: 0.3, data_key="e")[0]}]
    ids += [{run.id for run in cells.expand(study, flops, lambda: 0.2820513, data_key="d", threads=2)[0]}]
    assert len(set.union(*ids)) == sum(map(len, ids))


def test_words():
    options = {"merge": False, "fsdp": True, "keep-ratio": [1.0, 0.5], "text-scale": "none"}
    assert cells.words(options) == ["--no-merge", "--fsdp", "--keep-ratio", "1.0", "0.5", "--text-scale", "none"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"reference": "nothing"}, "is none of its cells"),
        ({"match": "steps"}, "match of the table t can only be compute"),
        ({"cells": {"a": {"evaluate": "twice"}}, "reference": "a"}, "can be evaluated full or"),
        ({"titel": "x"}, "must have title, reference and cells"),
    ],
)
def test_bad_tables_are_refused(tmp_path, change, sentence):
    table = {"title": "T", "reference": "a", "cells": {"a": {}}} | change
    write_configs(tmp_path, {"t": table})
    with pytest.raises(UserError, match=sentence):
        cells.load_study(tmp_path)


def write_configs(folder: Path, tables: dict, samples: int = 16, seeds=(0,), data: str = "data") -> Path:
    base = yaml.safe_load((CONFIGS / "base.yaml").read_text()) | {"batch-size": 8, "log-every-n-steps": 1}
    whole = {"base": "base.yaml", "tables": ["methods.yaml"], "seeds": list(seeds), "samples": samples, "data": data}
    for name, content in (("base", base), ("study", whole), ("methods", tables)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


# --------------------------------------------------------------------------------------------------------------- report

TABLE = {"steps": {"title": "Methods", "reference": "none", "cells": {"none": {"token-reduction": "none"}, "elip": {}}}}
TOP1 = {"steps/none": (0.5, 0.4, 0.6), "steps/elip": (0.45, 0.35, 0.54)}


def made_up_rows(seeds: int) -> dict:
    return {
        (name, seed): {
            "id": f"{name[-4:]}{seed}", "seed": seed, "threads": 1, "model": "M", "rrt": 0.25, "gflops": 1.0,
            "pflops": 0.1,
            "samples": 1280, "steps": 10, "seconds": 60.0, "train_loss": 2.0 + seed, "seen_top1": values[seed],
            "heldout_top1": 0.1, "options": {},
        }
        for name, values in TOP1.items() for seed in range(seeds)
    }  # fmt: skip


def test_known_means_spreads_and_paired_differences(tmp_path):
    study = cells.load_study(write_configs(tmp_path, TABLE, seeds=(0, 1, 2)))
    rows = made_up_rows(3)
    differences = report.paired(rows, study.tables[0], study.tables[0].cells[1], "seen_top1")
    assert differences == pytest.approx([-0.05, -0.05, -0.06])
    assert report.mean_std([1.0, 2.0, 3.0]) == (2.0, 1.0) and report.mean_std([4.0]) == (4.0, 0.0)
    assert report.is_clear(differences) and not report.is_clear(differences[:2]) and not report.is_clear([-1, 1, 0.5])

    report.write_report(study, rows, tmp_path / "results")
    text = (tmp_path / "results" / "README.md").read_text()
    assert "| none | 3 | 25.0 % | 1.000 | 1,280 | 0.1000 | 50.0 (10.0) | 10.0 (0.0) |" in text
    assert "| elip | 3 | **-5.3 (0.6)** | +0.0 (0.0) |" in text
    assert (tmp_path / "results" / "runs.csv").read_text().count("\n") == 7
    header, *lines = (tmp_path / "results" / "cells.csv").read_text().splitlines()
    elip = dict(zip(header.split(","), lines[1].split(","), strict=True))
    assert float(elip["seen_top1_mean"]) == pytest.approx(1.34 / 3, rel=1e-4) and elip["n"] == "3"
    assert float(elip["seen_top1_difference"]) == pytest.approx(-0.16 / 3, rel=1e-4)


def test_a_report_can_be_made_again_from_its_table(tmp_path):
    study = cells.load_study(write_configs(tmp_path, TABLE, seeds=(0, 1, 2)))
    report.write_report(study, made_up_rows(3), tmp_path / "first")
    rows = report.read_rows(tmp_path / "first" / "runs.csv")
    assert rows["steps/elip", 2] == made_up_rows(3)["steps/elip", 2]
    report.write_report(study, rows, tmp_path / "again")
    for name in ("README.md", "runs.csv", "cells.csv"):
        assert (tmp_path / "first" / name).read_text() == (tmp_path / "again" / name).read_text()
    with pytest.raises(UserError, match="nothing to report"):
        report.read_rows(tmp_path / "runs.csv")


def test_the_committed_report_is_that_of_the_committed_runs(tmp_path):
    folder = ROOT / "benchmarks" / "results" / "study"
    study, rows = cells.load_study(CONFIGS), report.read_rows(folder / "runs.csv")
    report.write_report(study, rows, tmp_path)
    for name in ("README.md", "cells.csv"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()
    page = (ROOT / "docs" / "results.md").read_text()
    assert report.fill_page(page, study, rows) == page
    assert page.count("<!-- table") == len(study.tables)


def test_tables_of_a_page(tmp_path):
    study = cells.load_study(write_configs(tmp_path, TABLE, seeds=(0, 1, 2)))
    page = "# A\n<!-- table steps -->\nold\n<!-- end -->\nB\n"
    filled = report.fill_page(page, study, made_up_rows(3))
    assert "| `none` (reference) | 3 | 25.0 % | 1.000 | 1,280 | 50.0 ± 10.0 |" in filled
    assert "| `elip` | 3 | 25.0 % | 1.000 | 1,280 | **44.7 ± 9.5** |" in filled
    assert "old" not in filled and filled.startswith("# A\n") and filled.endswith("<!-- end -->\nB\n")
    assert report.fill_page(filled, study, made_up_rows(3)) == filled
    with pytest.raises(UserError, match="no table other"):
        report.fill_page(page.replace("steps", "other"), study, {})


@pytest.mark.parametrize("method", ["none", "elip", "evit", "tome", "random"])
def test_profile_log_and_study_count_alike(method, data, tmp_path):
    """The ratio of removed tokens, the tokens of each layer and the operations of a method."""
    from open_clip_elip.cost import step_cost
    from open_clip_elip.profile.flops import count_flops
    from open_clip_elip.text import TextParts

    study = cells.load_study(write_configs(tmp_path, TABLE, data=str(data)))
    setting = run.Setting(study, tmp_path / "out")
    job = cells.Run("x", {"token-reduction": method}, 0, 16, 1, ["steps/x"])
    assert run.trainer.main(run.command_line(job, setting)) == 0
    row = run.read_training(setting.out / "runs" / "x")
    with (setting.out / "runs" / "x" / "train.csv").open() as file:
        logged = list(csv.DictReader(file))[-1]

    costs = Costs(study)
    model = costs.model(job.options).train()
    assert row["rrt"] == pytest.approx(model.tower.rrt(), abs=1e-6)
    if method != "none":
        assert row["tokens_per_layer"] == model.tower.token_counts()
    assert row["gflops"] == pytest.approx(float(logged["gflops_per_pair"]), rel=1e-6)
    length = 9
    image = torch.randn(4, 3, *model.visual.image_size)
    counted = count_flops(model, image, TextParts((torch.randint(1, 40, (4, length)),), torch.arange(4)))
    assert counted.total == 4 * step_cost(model, length).total
    planned = costs.flops(job.options)
    assert planned == step_cost(model, costs.text_length).total == pytest.approx(1e9 * row["gflops"], rel=0.05)


def test_a_part_of_the_results_is_reported(tmp_path):
    study = cells.load_study(write_configs(tmp_path, TABLE, seeds=(0, 1, 2)))
    rows = made_up_rows(2)
    del rows["steps/none", 1]
    report.write_report(study, rows, tmp_path / "results")
    text = (tmp_path / "results" / "README.md").read_text()
    assert "| none | 1 |" in text and "| elip | 2 |" in text and "| elip | 1 | -5.0 (0.0) |" in text
    assert "nothing to report" in report.write_report(study, {}, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_plots_are_small_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    study = cells.load_study(write_configs(tmp_path, TABLE, seeds=(0, 1, 2)))
    report.write_report(study, made_up_rows(3), tmp_path / "results")
    plot = tmp_path / "results" / "steps.png"
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size < 100_000


# -------------------------------------------------------------------------------------------------------------- running


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    packages = write_packages(folder / "packages")
    load_script("make_study_data").build(folder / "data", packages=packages, size=64, holdout=0.2)
    return folder / "data"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, data):
    """(configs, out) of a study of two cells of the study's model, two steps of eight pairs each; all run."""
    folder = tmp_path_factory.mktemp("tiny")
    table = {"title": "T", "reference": "elip", "cells": {"elip": {}, "eval": {"evaluate": cells.REDUCED}}}
    configs = write_configs(folder, {"steps": table}, data=str(data))
    done = study_command("--configs", configs, "--out", folder / "out", "--results", folder / "results")
    assert done.returncode == 0, done.stdout + done.stderr
    return configs, folder / "out", done.stdout


def study_command(*line) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "study.py"), *map(str, line)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_a_run_leaves_its_row_and_a_report(tiny):
    configs, out, shown = tiny
    rows = [json.loads(file.read_text()) for file in out.glob("*.json")]
    assert len(rows) == 1 and "[1/1] steps/elip seed 0" in shown
    row = rows[0]
    assert row["samples"] == 16 and row["steps"] == 2 and row["threads"] == 1
    study = cells.load_study(configs)
    model = Costs(study).model({})
    assert row["rrt"] == pytest.approx(model.tower.rrt()) and row["tokens_per_layer"] == model.tower.token_counts()
    assert row["gflops"] > 0 and row["pflops"] == pytest.approx(row["gflops"] * 16 / 1e6)
    for key in ("seen_top1", "heldout_top5", "category_top1", "image_to_text_R@5", "reduced_seen_top1"):
        assert 0 <= row[key] <= 1
    assert math.isfinite(row["val_loss"]) and len(row["weights"]) == 16
    assert not list(out.glob("runs/*/checkpoints/*.pt"))
    assert "| eval | 1 |" in (configs / "results" / "README.md").read_text()


def test_what_is_finished_is_not_run_again(tiny):
    configs, out, _ = tiny
    study = cells.load_study(configs)
    key = next(out.glob("*.json")).stem
    again = cells.Run(key, {}, 0, 16, 1, ["steps/elip"], [cells.FULL, cells.REDUCED])
    setting = run.Setting(study, out)
    assert setting.finished(again)["id"] == key
    shown: list[str] = []
    assert run.run_all([again], setting, jobs=1, show=shown.append) == []
    assert shown == ["1 of 1 runs are finished already"]
    more = run.Setting(study, out, fashion_mnist=Path("fashion"))
    assert more.finished(again) is None  # its row lacks that probe
    (out / f"{key}.json").rename(out / "kept")
    assert setting.finished(again) is None
    (out / f"{key}.json").write_text("{cut off")
    assert setting.finished(again) is None
    (out / "kept").rename(out / f"{key}.json")


def test_the_same_command_gives_the_same_weights(tiny, data, tmp_path):
    """And one command for one cell is enough: the run in this process has the numbers of the one before."""
    configs, out, _ = tiny
    row = json.loads(next(out.glob("*.json")).read_text())
    study = cells.load_study(configs)
    again = cells.Run(row["id"], {}, 0, 16, 1, ["steps/elip"], [cells.FULL])
    threads = torch.get_num_threads()
    try:
        mine = run.execute(again, run.Setting(study, tmp_path))
    finally:
        torch.set_num_threads(threads)
    same = ("weights", "train_loss", "seen_top5", "val_loss", "category_top1", "text_to_image_mean_rank")
    assert {key: mine[key] for key in same} == {key: row[key] for key in same}


def test_all_methods_begin_alike(data, tmp_path):
    """Equal initial weights and an equal first batch, whatever the reduction."""
    from training.data import build_train_data
    from training.distributed import seed_everything
    from training.evaluation.command import hash_weights
    from training.models import build_model
    from training.options.params import parse_args

    study = cells.load_study(write_configs(tmp_path, TABLE, data=str(data)))
    found = set()
    others = [{"token-reduction": name} for name in ("none", "evit", "tome", "random")]
    for options in ({}, {"lam": 1.0, "merge": False}, *others):
        line = run.command_line(cells.Run("x", options, 3, 16, 1, ["steps/x"]), run.Setting(study, tmp_path))
        args = parse_args(line)
        seed_everything(args.seed)
        model, preprocess, _, tokenizer = build_model(args, torch.device("cpu"))
        seed_everything(args.seed)
        batch = next(iter(build_train_data(args, preprocess, tokenizer, rank=0, world_size=1).epoch(0)))
        found.add((hash_weights(model.state_dict()), tuple(batch["key"]), batch["image"].float().sum().item()))
    assert len(found) == 1


def test_a_failing_run_is_told_and_the_others_go_on(tmp_path, data):
    cell = {"bad": {"lam": 7.0}, "none": {"token-reduction": "none"}}
    table = {"title": "T", "reference": "none", "cells": cell}
    configs = write_configs(tmp_path, {"steps": table}, samples=8, data=str(data))
    done = study_command("--configs", configs, "--out", tmp_path / "out", "--results", tmp_path / "results")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED steps/bad" in done.stdout and "lam" in done.stdout and "1 runs failed" in done.stdout
    assert "| none | 1 |" in (tmp_path / "results" / "README.md").read_text()


def refused(capsys, *line) -> str:
    assert load_script("study").main(list(map(str, line))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_misuse_gives_one_sentence(tmp_path, data, capsys):
    here = ("--data", data)
    assert "There is no cell nothing" in refused(capsys, *here, "--cell", "nothing")
    assert "steps/elip and compute/elip; say which" in refused(capsys, *here, "--cell", "elip")
    assert "make them with" in refused(capsys, "--data", tmp_path / "none")
    assert "--budget must be more than 0" in refused(capsys, *here, "--budget", "0")
    assert "less than one step" in refused(capsys, *here, "--budget", "1e-9")
    assert "--jobs must be at least 1" in refused(capsys, *here, "--jobs", "0")
    assert "--seed must be one of 0, 1, 2" in refused(capsys, *here, "--cell", "steps/elip", "--seed", "9")
    assert "check --configs" in refused(capsys, *here, "--configs", tmp_path)
    assert "check --fashion-mnist" in refused(capsys, *here, "--fashion-mnist", tmp_path / "none")
