from __future__ import annotations

import gzip
import os
import pickle

import numpy as np
import pytest
import torch
from torchvision import datasets as torchvision_datasets

from training.data.sets.classnames import packaged_lines
from training.data.sets.registry import load_data

from .layout_files import contents, message_of, write_cifar10, write_folder, write_idx, write_python2_pickle


class TestMNIST:
    def files(self, folder, end="", prefix="t10k", count=3, dot="-"):
        pixels = np.arange(count * 28 * 28, dtype=np.int64).reshape(count, 28, 28) % 251
        write_idx(folder / f"{prefix}-images{dot}idx3-ubyte{end}", pixels)
        write_idx(folder / f"{prefix}-labels{dot}idx1-ubyte{end}", np.arange(count)[::-1])
        return pixels

    @pytest.mark.parametrize("end", ["", ".gz"])
    @pytest.mark.parametrize("inner", ["", "raw", "FashionMNIST/raw"])
    def test_layouts(self, tmp_path, inner, end):
        pixels = self.files(tmp_path / inner, end)
        self.files(tmp_path / inner, end, "train", count=5)
        self.files(tmp_path / "MNIST" / "raw", count=7)  # torchvision keeps both in one folder
        data = load_data(f"fashion-mnist={tmp_path}")
        assert (data.name, data.split, len(data)) == ("fashion-mnist", "test", 3)
        assert data.labels.tolist() == [2, 1, 0] and data.labels.dtype == torch.int64
        assert data.classnames[0] == "T-shirt/top" and data.classnames[9] == "Ankle boot"
        for i in range(3):
            image = np.asarray(data.images.load(i))
            assert image.shape == (28, 28, 3) and (image == pixels[i][:, :, None]).all()
        assert len(load_data(f"fashion-mnist={tmp_path}", split="train")) == 5

    def test_which_of_the_two(self, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(torchvision_datasets, "MNIST", None)  # a call would fail
        message = message_of(f"mnist={tmp_path}")
        assert "t10k-images-idx3-ubyte" in message and "--download" in message
        self.files(tmp_path / "MNIST" / "raw", dot=".")
        data = load_data(str(tmp_path))
        assert (data.name, data.classnames) == ("mnist", list("0123456789"))
        assert "holds 3 images of mnist (test), which has 10,000" in caplog.text
        assert "train-images-idx3-ubyte" in message_of(f"mnist={tmp_path}", split="train")
        assert "has no val split, only train and test" in message_of(f"mnist={tmp_path}", split="val")
        assert len(load_data(f"mnist={tmp_path}", download=True)) == 3
        self.files(tmp_path / "FashionMNIST" / "raw")
        assert f"say mnist={tmp_path} or fashion-mnist={tmp_path}" in message_of(tmp_path)
        self.files(tmp_path / "fashion-mnist")
        assert load_data(str(tmp_path / "fashion-mnist")).name == "fashion-mnist"

    def test_download(self, tmp_path, monkeypatch):
        def fetch(root, download):
            self.files(tmp_path / "new" / "FashionMNIST" / "raw")

        def fail(root, download):
            raise RuntimeError("Error downloading")

        monkeypatch.setattr(torchvision_datasets, "FashionMNIST", fetch)
        assert len(load_data(f"fashion-mnist={tmp_path / 'new'}", download=True)) == 3
        monkeypatch.setattr(torchvision_datasets, "CIFAR10", fail)
        assert "cifar10 cannot be downloaded" in message_of(f"cifar10={tmp_path}", download=True)

    @pytest.mark.parametrize(
        "change,message",
        [
            (lambda content: content[:-1], "cannot reshape array of size 2351 into shape (3,28,28)"),
            (lambda content: content + b"x", "is damaged or no idx file"),
            (lambda content: content[:7], "is damaged or no idx file"),
            (lambda content: b"", "starts with nothing"),
            (lambda content: b"\0\0\x0d\x03" + content[4:], "starts with 00000d03 instead of 00000803"),
            (lambda content: content[:4] + b"\0\0\0\x02" + content[8:12] + b"\0\0\0\x2a" + content[16:], "3 labels"),
        ],
    )
    @pytest.mark.parametrize("end", ["", ".gz"])
    def test_damaged_files(self, tmp_path, change, message, end):
        self.files(tmp_path, end)
        path = tmp_path / f"t10k-images-idx3-ubyte{end}"
        content = path.read_bytes()
        path.write_bytes(gzip.compress(change(gzip.decompress(content))) if end else change(content))
        assert message in message_of(f"mnist={tmp_path}")
        if end:
            for damaged in (content[: len(content) // 2], b"no gzip", content[:20] + b"\xff" * 20 + content[40:]):
                path.write_bytes(damaged)
                assert "is damaged or no idx file" in message_of(f"mnist={tmp_path}")


class TestCIFAR:
    TITLES = ["airplane", "aquarium_fish", "lawn_mower"]

    def files(self, folder):
        pixels = np.zeros((18, 3, 32, 32), np.uint8)
        for i in range(18):
            pixels[i, i % 3] = 200 + i  # one channel each
            pixels[i, :, 1, 2] = i  # row 1, column 2
        return write_cifar10(folder, pixels.reshape(18, 3072), [i % 3 for i in range(18)], self.TITLES)

    def test_batches(self, tmp_path):
        root = self.files(tmp_path / "cifar-10-batches-py")
        for spec in (f"cifar10={tmp_path}", f"CIFAR-10={root}", str(tmp_path), str(root)):
            data = load_data(spec)
            assert (data.name, data.split, len(data)) == ("cifar10", "test", 3)
            assert data.classnames == ["airplane", "aquarium fish", "lawn mower"]
            assert data.templates == packaged_lines("cifar-templates.txt")
            assert data.labels.tolist() == [0, 1, 2]
        for i in range(3):
            image = data.images.load(i)
            assert image.size == (32, 32) and image.getpixel((2, 1)) == (15 + i,) * 3
            assert image.getpixel((1, 2)) == tuple(200 + 15 + i if channel == i else 0 for channel in range(3))
        train = load_data(f"cifar10={tmp_path}", split="train")
        assert len(train) == 15 and train.labels.tolist() == [0, 1, 2] * 5
        assert [train.images.load(i).getpixel((2, 1))[0] for i in range(15)] == list(range(15))
        assert train.classnames == data.classnames and train.fingerprint() != data.fingerprint()

    def cifar100(self, folder, labels_key="fine_labels", **changes):
        content = {"data": np.full((2, 3072), 7, np.uint8), "coarse_labels": [0, 0], labels_key: [2, 1], **changes}
        write_python2_pickle(folder / "test", content)
        write_python2_pickle(folder / "meta", {"fine_label_names": self.TITLES, "coarse_label_names": ["all"]})
        return folder

    def test_cifar100_has_fine_classes(self, tmp_path):
        root = self.cifar100(tmp_path / "cifar-100-python")
        for spec in (f"cifar100={tmp_path}", f"cifar-100={root}", str(tmp_path), str(root)):
            data = load_data(spec)
            assert (data.name, data.labels.tolist(), data.classnames[1]) == ("cifar100", [2, 1], "aquarium fish")
        assert "There is no" in message_of(f"cifar100={tmp_path}", split="train")

    def test_torchvision_reads_the_same(self, tmp_path, monkeypatch):
        """Its checksums aside, which are those of the real files."""
        self.files(tmp_path / "cifar-10-batches-py")
        monkeypatch.setattr(torchvision_datasets.CIFAR10, "_check_integrity", lambda self: True)
        monkeypatch.setattr(torchvision_datasets.CIFAR10, "_load_meta", lambda self: None)
        for split in ("train", "test"):
            theirs = torchvision_datasets.CIFAR10(str(tmp_path), train=split == "train")
            ours = load_data(f"cifar10={tmp_path}", split=split)
            assert ours.labels.tolist() == theirs.targets
            assert (ours.images.pixels == theirs.data).all()

    def test_no_files_and_no_download(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torchvision_datasets, "CIFAR10", None)
        message = message_of(f"cifar10={tmp_path}")
        assert "has no cifar-10-batches-py" in message and "--download" in message
        root = self.files(tmp_path / "cifar-10-batches-py")
        (root / "data_batch_3").unlink()
        assert "There is no" in message_of(f"cifar10={tmp_path}", split="train")
        assert len(load_data(f"cifar10={tmp_path}", download=True)) == 3

    @pytest.mark.parametrize(
        "changes,message",
        [
            ({"data": np.zeros((2, 3071), np.uint8)}, "must hold uint8 images of 32 x 32 x 3, each"),
            ({"data": np.zeros((2, 3072), np.float32)}, "not float32 of 2 x 32 x 32 x 3"),
            ({"data": np.zeros((0, 3072), np.uint8)}, "not uint8 of 0 x 32 x 32 x 3"),
            ({"data": "pixels"}, "there is something else than rows"),
            ({"fine_labels": [2]}, "not uint8 of 2 x 32 x 32 x 3 and 1 labels"),
            ({"fine_labels": [2, 3]}, "each with a label from 0 to 2"),
            ({"fine_labels": [2, "cat"]}, "each with a label from 0 to 2"),
            ({"labels_key": "labels"}, "with data and fine_labels (KeyError"),
        ],
    )
    def test_wrong_contents(self, tmp_path, changes, message):
        assert message in message_of(f"cifar100={self.cifar100(tmp_path, **changes)}")

    def test_pickles_that_are_damaged_or_would_run_code(self, tmp_path):
        root = self.cifar100(tmp_path)
        attack = pickle.dumps({"data": _Attack(str(tmp_path / "made"))}, protocol=2)
        for content in (attack, (root / "test").read_bytes()[:-99], b"", b"<html>"):
            (root / "test").write_bytes(content)
            assert "is not a pickle of arrays and plain types" in message_of(f"cifar100={root}")
        assert not (tmp_path / "made").exists()


def _rows(count, seed=0):
    """Pixels (count, 32, 32, 3) and labels that go through 0 to 9."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return pixels, np.arange(count) % 10


def _checked(spec, pixels, labels, name, classes="cifar10"):
    data = load_data(str(spec))
    assert (data.name, data.split, data.labels.tolist()) == (name, "test", labels.tolist())
    assert all((np.asarray(data.images.load(i)) == pixels[i]).all() for i in range(len(pixels)))
    assert data.classnames == packaged_lines(f"{classes}-classes.txt")
    return data


class TestOtherFormsOfCIFAR:
    @pytest.mark.parametrize("name,folder,extra", [
        ("cifar10", "cifar-10-batches-bin", 0), ("cifar100", "cifar-100-binary", 1),
    ])  # fmt: skip
    def test_binary(self, tmp_path, name, folder, extra):
        pixels, labels = _rows(20)
        coarse = np.full((20, extra), 9, np.uint8)  # comes first and is not the class
        rows = np.concatenate([coarse, labels[:, None], pixels.transpose(0, 3, 1, 2).reshape(20, -1)], axis=1)
        names = ("test_batch", "data_batch_1") if name == "cifar10" else ("test", "train")
        write_folder(tmp_path / folder, {f"{batch}.bin": rows.astype(np.uint8).tobytes() for batch in names})
        for spec in (f"{name}={tmp_path}", tmp_path, tmp_path / folder):
            _checked(spec, pixels, labels, name, name)
        path = tmp_path / folder / f"{names[0]}.bin"
        path.write_bytes(path.read_bytes()[:-1])
        assert f"{path} must hold rows of {3073 + extra} bytes" in message_of(tmp_path)
        assert "There is no" in message_of(f"cifar10={tmp_path}", split="train") or name == "cifar100"

    @pytest.mark.parametrize("protocol", range(2, 6))
    def test_keys_of_bytes(self, tmp_path, protocol):
        """As Python 3 writes again what it has read with encoding="bytes"; arrays look different in each protocol."""
        pixels, labels = _rows(10)
        content = {b"data": pixels.transpose(0, 3, 1, 2).reshape(10, -1), b"labels": labels.tolist()}
        names = [name.encode() for name in packaged_lines("cifar10-classes.txt")]
        parts = {"test_batch": content, "batches.meta": {b"label_names": names}}
        write_folder(tmp_path, {name: pickle.dumps(part, protocol) for name, part in parts.items()})
        _checked(f"cifar10={tmp_path}", pixels, labels, "cifar10")

    @pytest.mark.parametrize("numbers", [False, True])
    @pytest.mark.parametrize("name", ["cifar10", "cifar100"])
    def test_pictures_in_class_folders(self, tmp_path, name, numbers):
        classes = packaged_lines(f"{name}-classes.txt")
        folders = [str(i) if numbers else title.replace(" ", "_") for i, title in enumerate(classes)]
        for split in ("test", "train"):
            write_folder(tmp_path / split, {f"{folder}/x.png": b"%d" % i for i, folder in enumerate(folders)})
        data = load_data(f"{name}={tmp_path}")
        assert contents(data) == [(title, b"%d" % i) for i, title in enumerate(classes)]
        assert data.templates == packaged_lines("cifar-templates.txt") and data.name == name
        (tmp_path / "test" / folders[3]).rename(tmp_path / "test" / "other")
        assert f"{len(classes) - 1} of the {len(classes)} class folders of {name}" in message_of(f"{name}={tmp_path}")


class TestOtherTestSetsOfCIFAR:
    def test_cifar10_1(self, tmp_path):
        pixels, labels = _rows(10)
        for version, first in (("v4", 5), ("v6", 0)):
            np.save(tmp_path / f"cifar10.1_{version}_data.npy", pixels[first:])
            np.save(tmp_path / f"cifar10.1_{version}_labels.npy", labels[first:])
        for spec in (f"cifar10.1={tmp_path}", tmp_path):
            _checked(spec, pixels, labels, "cifar10.1")
        (tmp_path / "cifar10.1_v6_data.npy").unlink()
        assert len(load_data(f"CIFAR-10.1={tmp_path}")) == 5
        np.savez(tmp_path / "archive.npz", a=labels)
        (tmp_path / "archive.npz").rename(tmp_path / "cifar10.1_v4_data.npy")
        assert "something else than rows" in message_of(f"cifar10.1={tmp_path}")
        (tmp_path / "cifar10.1_v4_data.npy").unlink()
        assert "put them there" in message_of(f"cifar10.1={tmp_path}")

    @pytest.mark.parametrize("name,folder", [("cifar10-c", "CIFAR-10-C"), ("cifar100-c", "CIFAR-100-C")])
    def test_corruptions_and_severities(self, tmp_path, name, folder):
        root = tmp_path / folder
        root.mkdir()
        labels = np.tile(np.arange(2), 5)
        np.save(root / "labels.npy", labels)
        pixels = {corruption: _rows(10, seed)[0] for seed, corruption in enumerate(("fog", "snow"))}
        for corruption, rows in pixels.items():
            np.save(root / f"{corruption}.npy", rows)
        everything, classes = np.concatenate(list(pixels.values())), name.removesuffix("-c")
        for spec in (f"{name}={root}", f"{name}={tmp_path}", root, tmp_path):
            _checked(spec, everything, np.tile(labels, 2), name, classes)
        _checked(f"{name}={root}/snow.npy", pixels["snow"], labels, f"{name}-snow", classes)
        _checked(f"{name}={root}/snow/2", pixels["snow"][2:4], labels[2:4], f"{name}-snow-2", classes)
        third = np.concatenate([rows[4:6] for rows in pixels.values()])
        _checked(f"{name}={root}/3", third, np.tile(labels[4:6], 2), f"{name}-3", classes)
        assert load_data(f"{name}={root}/snow/2").fingerprint() != load_data(f"{name}={root}/snow/3").fingerprint()
        for wrong in ("frost", "6", "snow/fog", "2/3"):
            assert "holds the corruptions fog, snow, in severities 1 to 5" in message_of(f"{name}={root}/{wrong}")
        np.save(root / "fog.npy", everything)
        assert "must have an image for each label" in message_of(root)
        (root / "fog.npy").write_bytes(pickle.dumps(_Attack(str(tmp_path / "made"))))
        assert "cannot be read as an array" in message_of(root) and not (tmp_path / "made").exists()


class _Attack:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)
