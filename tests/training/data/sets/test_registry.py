from __future__ import annotations

import os

import pytest
import torch

from training.data.sets import registry
from training.data.sets.labelled import ArrayImages, LabelledImages
from training.data.sets.registry import SETS, data_set, load_data, parse_spec

from .layout_files import message_of, write_folder, write_shard


class TestSpec:
    def test_names(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert parse_spec("mnist=~/x")[1] == tmp_path / "x"
        assert {"imagenet", "imagenet-v2", "cifar10", "folder"} <= set(SETS)
        assert parse_spec("ImageNet_V2=/data/x=1")[0] == "imagenet-v2"
        assert str(parse_spec("ImageNet_V2=/data/x=1")[1]) == "/data/x=1"
        assert parse_spec("CIFAR-10=/data")[0] == "cifar10"
        assert parse_spec("imagenet-1k=/data")[0] == "imagenet"
        assert parse_spec("/data/imagenet") == (None, parse_spec("imagenet=/data/imagenet")[1])
        assert [parse_spec(f"{name}=x")[0] for name in SETS] == list(SETS)

    def test_paths_with_equals_signs(self, tmp_path, monkeypatch):
        root = write_folder(tmp_path / "lr=3" / "mnist=1", {"a/x.png": b""}, classnames="a")
        assert len(load_data(str(root))) == 1
        monkeypatch.chdir(root.parent.parent)
        assert len(load_data("lr=3/mnist=1")) == 1
        assert f"There is no folder {root.parent / 'mnist=2'}" in message_of(root.parent / "mnist=2")
        assert "There is no data set called 'lr'" in message_of("lr=3/mnist=2")

    def test_mistakes(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert "cifar10 must have the path of a folder: say cifar10=PATH" in message_of("cifar10")
        assert "say cifar10=PATH" in message_of("cifar10=")
        assert "say NAME=PATH" in message_of("")
        assert "no data set called 'imagnet'; did you mean imagenet?" in message_of("imagnet=/data")
        assert "fashion-mnist" in message_of("quickdraw=/data")
        assert "There is no folder missing" in message_of("missing")
        for name in SETS:
            assert "missing" in message_of(f"{name}=missing")
        write_folder(tmp_path / "cifar10", {"a/x.png": b""}, classnames="a")  # called like a data set
        assert load_data("cifar10").name == "cifar10"
        with pytest.raises(ValueError, match="split"):
            load_data(".", split="dev")

    def test_names_of_other_data(self, tmp_path):
        root = write_folder(tmp_path / "pets", {"val/a/x.png": b""}, classnames="a")
        assert (load_data(str(root)).name, load_data(str(root)).split) == ("pets", "val")
        write_folder(root / "val", {}, classnames="a")
        assert load_data(f"folder={root / 'val'}").name == "pets"
        write_folder(tmp_path / "s", {}, classnames="a")
        write_shard(tmp_path / "s" / "0.tar", {"a.png": b"1", "a.cls": "0"})
        assert load_data(f"WDS={tmp_path / 's'}").name == "s"

    def test_unreadable_folders(self, tmp_path, monkeypatch):
        root = write_folder(tmp_path, {"a/x.png": b""}, classnames="a")

        def scandir(path):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(os, "scandir", scandir)
        assert "cannot be read" in message_of(root)


def test_one_function_is_a_data_set(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(registry, "SETS", dict(registry.SETS))

    @data_set("dots", {"train": 2, "val": 2}, found_in=lambda folder: (folder / "dots").is_dir(), aliases=("points",))
    def read(folder, split):
        pixels = torch.zeros(2, 4, 4, dtype=torch.uint8).numpy()
        return LabelledImages(ArrayImages(pixels, str(folder)), torch.tensor([1, 1]), ["none", "some"], split=split)

    (tmp_path / "dots").mkdir()
    assert "dots" in registry.SETS
    for spec in (f"dots={tmp_path}", f"Points={tmp_path}", str(tmp_path)):
        data = load_data(spec)  # of what people report on
        assert (data.name, data.split, len(data)) == ("dots", "val", 2)
    assert "has no picture of 1 of its 2 classes: none" in caplog.text
    write_folder(tmp_path, {}, names="nothing\nsomething")
    assert load_data(f"dots={tmp_path}", classnames=tmp_path / "names.txt").classnames == ["nothing", "something"]
    data_set("spots", {"test": 1}, found_in=lambda folder: (folder / "dots").is_dir())(read)
    assert "dots has no test split" not in message_of(f"spots={tmp_path}", split="train")
    assert f"may hold dots or spots; say dots={tmp_path} or spots={tmp_path}" in message_of(tmp_path)
