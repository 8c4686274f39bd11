"""METER's pre-training by the command: exact resume, images that are drawn, processes, what is refused."""
import json

import pytest
import torch

from training.control import EXIT_INTERRUPTED
from training.main import main

from ..processes import torchrun
from .fusion_runs import METER, write_fusion
from .runs import assert_equal_weights, command, evaluations, interrupted, losses, picture, rows, write_shards


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_fusion(tmp_path_factory.mktemp("model"), METER)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), shards=2, samples=20, broken={7})


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lists")
    for number in range(24):
        (folder / f"{number}.png").write_bytes(picture(number))
    items = [{"image": f"{number}.png", "caption": ["a red thing", "a blue square thing"]} for number in range(24)]
    for part, name in ((items[:16], "a.json"), (items[16:], "b.json")):
        (folder / name).write_text(json.dumps(part))
    one = [item | {"caption": item["caption"][number % 2]} for number, item in enumerate(items[16:])]
    (folder / "val.json").write_text(json.dumps(one))
    return folder


def meter(data, logs, model, *more, name="run"):
    argv = command(str(data), logs, "--lr", "1e-3", "--lr-scheduler", "linear", *more, name=name, model=model)
    argv[argv.index("webdataset")] = "auto"
    return argv


def test_a_run_interrupted_within_an_epoch_of_accumulation_is_the_uninterrupted_one(lists, model, tmp_path, capsys):
    data = f"{lists / 'a.json'}::{lists / 'b.json'}"
    flags = ["--batch-size", "4", "--accum-freq", "2", "--val-data", str(lists / "val.json"), "--precision", "amp_bf16"]
    flags += ["--grad-checkpointing", "--ema-decay", "0.9", "--text-reduction", "random"]
    assert main(meter(data, tmp_path, model, *flags, "--queue-size", "24", name="straight")) == 0
    assert "--queue-size: no effect without momentum twin." in capsys.readouterr().err
    for stop in (2, 5):
        with interrupted(stop):
            assert main(meter(data, tmp_path, model, *flags, "--resume", "latest", name="cut")) == EXIT_INTERRUPTED
    assert main(meter(data, tmp_path, model, *flags, "--resume", "latest", name="cut")) == 0
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    a, b = (torch.load(run / "checkpoints" / "epoch_2.pt", weights_only=True) for run in (straight, cut))
    for part in ("state_dict", "ema"):
        assert_equal_weights(a[part], b[part])
    assert losses(straight) == losses(cut) and [float(row["lr"]) for row in rows(straight)][:3] == [0, 5e-4, 1e-3]
    assert float(rows(straight)[0]["gflops_per_sample"]) > 0
    assert evaluations(straight) == evaluations(cut) and len(evaluations(cut)) == 2
    last = evaluations(cut)[-1]
    assert last["val-num_samples"] == 8 and 0 <= last["val-itm_accuracy"] <= 1
    assert last["val-mlm_itm_accuracy"] == pytest.approx(last["val-mlm_accuracy"] + last["val-itm_accuracy"])


def test_an_evaluation_is_the_same_on_two_processes_which_draw_for_themselves(lists, model, shards, tmp_path):
    flags = ["--val-data", str(lists / "val.json"), "--epochs", "1", "--batch-size", "4", "--workers", "0"]
    done = torchrun("-m", "training.main", "--", *meter(shards, tmp_path, model, *flags))
    assert done.returncode == 0, done.stderr
    file = tmp_path / "run" / "checkpoints" / "epoch_1.pt"
    argv = meter("", tmp_path, model, "--val-data", str(lists / "val.json"), "--pretrained", str(file), name="again")
    cut = argv.index("--train-data")
    assert main([*argv[:cut], *argv[cut + 2 :]]) == 0
    found = [{k: v for k, v in evaluations(tmp_path / name)[-1].items() if "val-" in k} for name in ("run", "again")]
    assert found[0] == pytest.approx(found[1]) and found[0]["val-num_samples"] == 8


REFUSED = {
    "--batch-size 1": "A batch of one pair has no negative to match with: raise --batch-size.",
    "--fsdp": "--fsdp is for CLIP models",
    "--zeroshot-data DATA": "A METER model has no space of contrast: leave out",
    "--start-image nothing.pth": "The weights nothing.pth to start from cannot be had",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_work_is_told_before_the_run(flags, lists, model, tmp_path, capsys):
    words = flags.replace("DATA", str(lists)).split()
    assert main(meter(lists / "a.json", tmp_path, model, *words)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and REFUSED[flags] in error[0]
    assert not (tmp_path / "run").exists()
