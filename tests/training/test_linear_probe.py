"""The linear probe's command, on a data set of noise in three colours; what it is made of is tested in evaluation/."""
import os
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from training import linear_probe
from training.data.sets.labelled import ArrayImages, LabelledImages
from training.data.sets.registry import load_data
from training.evaluation import features as features_module
from training.evaluation import probe

from ..processes import run as run_in_two
from .colours import write_colours
from .runs import records


@pytest.fixture
def colours(tmp_path):
    return write_colours(tmp_path / "colours", train=60, test=30)


@pytest.fixture
def run(model, colours, tmp_path, capsys):
    """Runs the command: the table it prints, or the sentence it ends with. What it logged is in `run.log`."""

    def run(*flags, data=colours, results="results", code=0):
        words = command(model, data, tmp_path / results)
        assert linear_probe.main([*words, *flags]) == code
        out, run.log = capsys.readouterr()
        if not code:
            return out
        *_, last = run.log.splitlines()
        assert out == "" and last.startswith("error: ") and run.log.count("error:") == 1, run.log
        return last

    return run


def command(model, data, results):
    return ["--model", f"local-dir:{model}", "--data", str(data), "--results", str(results), "--batch-size", "7",
            "--workers", "0", "--device", "cpu", "--precision", "fp32", "--no-progress"]  # fmt: skip


def pooled_features(model, colours, split):
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model}")
    data = load_data(str(colours), split=split)
    clip.eval().visual.proj = None
    with torch.inference_mode():
        features = clip.visual(torch.stack([preprocess(data.images.load(i)) for i in range(len(data))]))
    return features.double().numpy(), data.labels.numpy()


def test_command(run, model, colours, tmp_path, monkeypatch):
    """The sweep's choice, fitted again by scikit-learn on all training pictures, has the same score."""
    shown = run()
    (record,) = records(tmp_path / "results")
    assert (record["command"], record["data"], record["split"]) == ("linear_probe", "colours", "test")
    assert (record["num_train_samples"], record["metrics"]["num_samples"]) == (60, 30)
    assert len(record["trials"]) >= 11 and record["regularisation"] in {t["regularisation"] for t in record["trials"]}
    train, test = (pooled_features(model, colours, split) for split in ("train", "test"))
    theirs = LogisticRegression(C=record["regularisation"], max_iter=2000, tol=1e-8).fit(*train)
    assert record["metrics"]["top1"] == pytest.approx(theirs.score(*test), abs=1e-9)
    assert record["metrics"]["top1"] > 0.8 and record["metrics"]["top5"] == 1
    assert record["metrics"]["mean_per_class_recall"] == pytest.approx(record["metrics"]["top1"])  # 10 of each
    assert "colours (test)" in shown and f"{record['metrics']['top1']:.2%}" in shown
    assert f"{record['regularisation']:.4g}" in shown

    # Finished: nothing is encoded or fitted again. With another setting only the features are used again.
    monkeypatch.setattr(features_module, "_extract", lambda *args: pytest.fail("features made again"))
    monkeypatch.setattr(probe, "sweep", lambda *args: pytest.fail("swept again"))
    (path,) = (tmp_path / "results").glob("*.json")
    assert run() == f"{shown}found, not evaluated again (--redo does it): {path}\n"
    assert records(tmp_path / "results") == [record]  # the date too
    value = repr(record["regularisation"])
    assert run("--regularisation", value) == shown  # the same classifier
    path.unlink()
    run("--regularization", value, "--also", str(colours))
    with pytest.raises(pytest.fail.Exception, match="features made again"):
        run("--redo")


def test_probe_is_kept_for_more_test_sets(run, colours, tmp_path, monkeypatch):
    """--also evaluates the probe that was trained before, on sets with the same classes."""
    run()
    more = tmp_path / "more"
    shutil.copytree(colours, more)
    shutil.rmtree(more / "train")
    for path in more.glob("test/*/*.png"):
        Image.open(path).rotate(180).save(path)
    (next(more.glob("test/red/*.png"))).write_bytes(b"no picture")
    monkeypatch.setattr(probe, "fit", lambda *args: pytest.fail("fitted again"))
    lines = run("--also", str(more)).splitlines()
    assert [line.split()[0] for line in lines] == ["data", "colours", "more", "found,"]
    other = next(record for record in records(tmp_path / "results") if record["data"] == "more")
    assert other["metrics"]["num_samples"] == 29 and len(other["skipped"]) == 1
    assert other["settings"]["train"] == "colours"
    assert other["regularisation"] == records(tmp_path / "results")[0]["regularisation"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--regularisation", "1e4", "--layer", "projected", "--normalize"],
        ["--regularisation", "10", "--standardize", "--feature-dtype", "bf16", "--max-train-samples", "30"],
    ],
)
def test_options(run, tmp_path, flags):
    run(*flags)
    (record,) = records(tmp_path / "results")
    assert record["metrics"]["top1"] > 0.6
    if "--max-train-samples" in flags:
        assert record["num_train_samples"] == 30
        assert record["settings"]["feature_dtype"] == "bf16" and record["settings"]["standardize"] is True
    else:
        assert record["num_train_samples"] == 60


def test_shots(run, colours, tmp_path):
    """So many of each class are trained on and no others, seeded; a val split only chooses."""
    run("--shots", "4", "--regularisation", "1")
    run("--shots", "4", "--seed", "1", "--regularisation", "1")
    shutil.copytree(colours / "test", colours / "val")
    shutil.rmtree(colours / "test")
    write_colours(tmp_path / "other", train=3, test=3)
    (tmp_path / "other" / "test").rename(colours / "test")
    run("--shots", "5")
    found = sorted(records(tmp_path / "results"), key=lambda record: (record["num_train_samples"], record["date"]))
    assert [record["num_train_samples"] for record in found] == [12, 12, 15]
    assert [record["settings"]["shots"] for record in found] == [4, 4, 5]
    assert {record["settings"]["seed"] for record in found[:2]} == {0, 1}
    assert len({record["settings"]["train_fingerprint"] for record in found}) == 3
    assert "15 samples to train on, 30 held out" in run.log


def test_streaming_from_disk_changes_nothing(run, tmp_path):
    found = []
    for gigabytes, said in (("0", "read from disk in each iteration"), ("1", "kept on cpu")):
        run("--feature-memory", gigabytes, "--redo")
        assert said in run.log
        found += [{**record, "date": ""} for record in records(tmp_path / "results")]
    assert found[0] == found[1]


def test_a_val_split_is_used_for_the_sweep(run, colours, tmp_path):
    run()
    assert "54 samples to train on, 6 held out" in run.log
    assert "colours has no val split, only train and test" in run.log
    write_colours(tmp_path / "other", train=45, test=3)
    for path in (tmp_path / "other" / "train").glob("*/*.png"):
        target = colours / "val" / path.parent.name / f"val-{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    run(results="with-val")
    assert "60 samples to train on, 45 held out" in run.log
    (record,) = records(tmp_path / "with-val")
    assert record["num_train_samples"] == 105  # the refit takes both
    assert record["settings"]["val_fingerprint"] and record["settings"]["held_out"] is None


def test_imagenet_probe_on_some_of_its_classes(run, tmp_path, monkeypatch):
    """A probe for 1000 classes is evaluated on sets with some of them, as ImageNet-R is; other sets have their own."""
    names = open_clip.IMAGENET_CLASSNAMES
    pixels = np.random.default_rng(0).integers(0, 256, (1030, 8, 8, 3), dtype=np.uint8)
    every, asked = torch.arange(1000), []

    def fake(spec, *, split="test", download=False):
        if spec == "imagenet":
            asked.append(split)
            rows, split = (every, split) if split == "train" else (torch.arange(1000, 1030), "val")
            labels = every if split == "train" else every[:30]
            groups = [[i] for i in range(1000)]
            images = ArrayImages(pixels, "noise").subset(rows)
            return LabelledImages(images, labels, names, name=spec, split=split, imagenet_classes=groups)
        # The training pictures of two ImageNet classes, as one class, and of a third.
        images = ArrayImages(pixels, "noise").subset(torch.tensor([7, 8, 500]))
        return LabelledImages(
            images, torch.tensor([0, 0, 1]), ["birds", "other"], name=spec, imagenet_classes=[[7, 8], [500]]
        )

    monkeypatch.setattr(probe, "load_data", fake)
    assert "one training image a class, none to hold out" in run(data="imagenet", code=2)
    run("--also", "imagenet-r", "--regularisation", "1e6", "--max-iterations", "50", data="imagenet")
    assert set(asked) == {"train", "test"}  # the "test" set is the val split, which no sweep may look at
    first, second = records(tmp_path / "results")
    by_name = {record["data"]: record["metrics"] for record in (first, second)}
    assert by_name["imagenet-r"]["top1"] == 1  # it has seen them
    assert by_name["imagenet-r"]["num_samples"] == 3
    assert by_name["imagenet"]["top1"] < 0.1 and by_name["imagenet"]["num_samples"] == 30


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--held-out", "0"], "--held-out must be between 0 and 1"),
        (["--regularisation", "nan"], "--regularisation must be sweep or a number from 1e-30 to 1e30, not 'nan'"),
        (["--regularisation", "1e-300"], "--regularisation must be sweep or a number from 1e-30 to 1e30"),
        (["--shots", "21"], "has 20 training images of 'blue'; lower --shots to that"),
        (["--shots", "2", "--max-train-samples", "9"], "--shots and --max-train-samples both choose images"),
        (["--max-train-samples", "2"], "1 of the 3 classes of colours have no readable training image"),
        (["--results", "none"], "--results none leaves no place for the features; name one with --cache"),
        (["--cache", "pets/classnames.txt"], "pets/classnames.txt is a file; name a folder"),
        (["--data", "colours/test"], "has no train split"),
        (["--data", "colours/train"], "no test split"),
        (["--also", "pets"], "pets (test) has 2 classes, but the classifier is for the 3 of colours (train)"),
        (["--data", "nowhere"], "There is no folder nowhere"),
    ],
)
def test_mistakes(run, colours, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.work.linear_probe.load_model", lambda *args, **more: pytest.fail("loaded too early"))
    shutil.copytree(colours, "pets")
    shutil.rmtree("pets/train")
    shutil.rmtree("pets/test/red")
    Path("pets/classnames.txt").write_text("blue\ngreen\n")
    for split in ("train", "test"):
        shutil.copy(colours / "classnames.txt", colours / split)
    assert message in run(*flags, code=2)
    assert not Path("results").exists()


def test_classes_without_pictures(run, colours):
    for path in (colours / "train" / "green").iterdir():
        path.write_bytes(b"no picture")
    assert "1 of the 3 classes of colours have no readable training image (the first is 'green')" in run(code=2)
    for path in [*colours.glob("*/green"), *colours.glob("*/blue")]:
        shutil.rmtree(path)
    (colours / "classnames.txt").write_text("red\n")
    assert "has one class, 'red'; a linear probe needs two" in run("--regularisation", "1", code=2)


def test_splits_are_compared_by_their_pictures(run, colours, tmp_path):
    """Equal names are not equal pictures, and a copy is no other split."""
    other = write_colours(tmp_path / "other", train=30, test=30)
    shutil.rmtree(other / "test")
    shutil.copytree(other / "train", other / "test")
    for path in (other / "test").glob("*/*.png"):
        os.utime(path, (1, 1))
    assert "the training and the test split are the same pictures" in run(data=other, code=2)
    for path in (other / "test").glob("*/*.png"):
        Image.open(path).rotate(180).save(path)
    run("--regularisation", "1", data=other)
    for split in ("test", "train"):
        shutil.copytree(other / split, other / "val")
        run("--regularisation", "1", "--redo", data=other)
        assert records(tmp_path / "results")[0]["settings"]["val_fingerprint"] is None
        shutil.rmtree(other / "val")
    assert "the validation and the training split are the same pictures; it is left out" in run.log


def test_two_processes(model, colours, tmp_path):
    """The command writes in two processes what it writes in one, features and probe to the last bit."""
    (colours / "train" / "red" / "002.png").write_bytes(b"no picture")
    one, two = (command(model, colours, tmp_path / name) for name in ("one", "two"))
    run_in_two(linear_probe.main, two)
    run_in_two(linear_probe.main, ["--data", "missing", *two[4:], "--model", two[1]], 2)
    assert linear_probe.main(one) == 0
    (first,), (second,) = (records(tmp_path / name) for name in ("one", "two"))
    assert {**first, "date": ""} == {**second, "date": ""}
    assert first["num_train_samples"] == 59 and len(first["train_skipped"]) == 1
    files = [sorted((tmp_path / name / "features").iterdir()) for name in ("one", "two")]
    assert [path.name for path in files[0]] == [path.name for path in files[1]] and len(files[0]) == 5
    for a, b in zip(*files, strict=True):
        if a.suffix == ".pt":
            a, b = (torch.load(path) for path in (a, b))
            assert torch.equal(a["weight"], b["weight"]) and torch.equal(a["bias"], b["bias"])
        else:
            assert a.read_bytes() == b.read_bytes()
