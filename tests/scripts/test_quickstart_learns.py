"""The claim of the quick start, in a short form: real pictures are learnt, and held-out ones are recognised."""
import csv
import importlib.util
import json
import math
from pathlib import Path

import make_emoji_shards
import pytest
import torch

from training.main import main

ROOT = Path(__file__).parents[2]
MISSING = [name for name, module in make_emoji_shards.PACKAGES.items() if importlib.util.find_spec(module) is None]


@pytest.mark.skipif(bool(MISSING), reason="the quick start's packages are missing")
def test_a_short_run_on_real_pictures_beats_chance_several_times(tmp_path):
    data = tmp_path / "openmoji"
    assert make_emoji_shards.main(["--out", str(data), "--size", "64"]) == 0
    torch.set_num_threads(2)
    argv = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--no-progress"]
    argv += ["--epochs", "2", "--force-image-size", "32"]
    for flag, name in (("--train-data", "train"), ("--val-data", "val")):
        shards = sorted((data / name).glob("*.tar"))
        argv += [flag, str(data / name / f"{{{shards[0].stem}..{shards[-1].stem}}}.tar")]
    argv += ["--zeroshot-data", str(data / "val"), "--logs", str(tmp_path), "--name", "run"]
    assert main(argv) == 0

    with (tmp_path / "run" / "train.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < math.log(64) - 0.5
    result = json.loads((tmp_path / "run" / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])
    # Not top-1: a model that knows only the largest class, flags, would be above chance already.
    assert result["zeroshot-val-mean_per_class_recall"] > 3 / result["zeroshot-val-classes"]
    for direction in ("image_to_text", "text_to_image"):
        assert result[f"{direction}_R@10"] > 3 * 10 / result["num_samples"]
