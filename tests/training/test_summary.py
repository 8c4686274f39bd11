"""The curves of a run: which there are, of what, and where they are drawn."""
from __future__ import annotations

import base64
import json
import re

import pytest

from training.summary import main, read

TRAIN = """step,epoch,samples,loss,itm,lr,samples_per_second,rrt
0,0,16,3.5,0.7,1e-4,10,0.28
5,0,96,nan,0.6,1e-4,20,0.28
10,1,176,2.5,0.5
10,1,176,2.5,0.5,1e-4,40,0.28
15,1,2"""
RESULTS = [
    {"epoch": 1, "step": 8, "clip_val_loss": 3.0, "image_to_text_R@1": 0.25, "image_to_text_R@5": 0.5, "images": 9},
    {"epoch": 2, "step": 16, "clip_val_loss": 2.0, "image_to_text_R@1": 0.5, "zeroshot-val-top1": 0.75},
]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "train.csv").write_text(TRAIN)
    lines = [*map(json.dumps, RESULTS), '{"epoch": 3, "st']
    (tmp_path / "checkpoints" / "results.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_curves_are_those_of_whole_rows(run):
    panels = read(run)
    assert list(panels) == ["loss", "accuracy", "samples a second"]
    assert panels["loss"].keys() == {"loss", "itm", "clip_val_loss"}
    assert panels["loss"]["itm"] == [(0, 0.7), (5, 0.6), (10, 0.5)]
    assert panels["loss"]["clip_val_loss"] == [(8, 3.0), (16, 2.0)]
    assert panels["accuracy"] == {"image_to_text_R@1": [(8, 0.25), (16, 0.5)], "zeroshot-val-top1": [(16, 0.75)]}
    assert panels["samples a second"]["samples_per_second"] == [(0, 10), (5, 20), (10, 40)]


def test_the_accuracy_of_steps_is_no_loss(run):
    (run / "train.csv").write_text(TRAIN.replace("itm", "accuracy"))
    panels = read(run)
    assert panels["loss"].keys() == {"loss", "clip_val_loss"}
    assert panels["accuracy"].keys() == {"accuracy", "image_to_text_R@1", "zeroshot-val-top1"}


def test_a_figure_that_is_not_known_costs_no_row(run):
    (run / "train.csv").write_text(TRAIN.replace("20,0.28", "20,"))
    assert read(run)["samples a second"]["samples_per_second"] == [(0, 10), (5, 20), (10, 40)]


def test_the_picture_is_in_the_page_too(run, capsys):
    pytest.importorskip("matplotlib")
    (run / "summary.txt").write_text("loss <3.5>\n")
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/summary.png\n{run}/summary.html\n"
    picture, page = (run / "summary.png").read_bytes(), (run / "summary.html").read_text()
    assert picture.startswith(b"\x89PNG") and "loss &lt;3.5&gt;" in page
    assert base64.b64decode(re.search('base64,([^"]+)"', page)[1]) == picture


def test_what_is_no_run_is_one_sentence(run, tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/none is no folder of a run that trained")
    (run / "train.csv").write_text(TRAIN.splitlines()[0] + "\n")
    assert main([str(run)]) == 2
    assert capsys.readouterr().err == f"error: {run}/train.csv has no whole row yet; let the run go on.\n"
