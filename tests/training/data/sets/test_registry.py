import gzip
import os
import pickle
from importlib import resources

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision import datasets as torchvision_datasets

from training.data.sets.classnames import packaged_lines
from training.data.sets.imagenet import imagenet_synsets, subset_synsets
from training.data.sets.registry import list_datasets, load_data, parse_spec
from training.errors import UserError
from training.evaluation.scores import is_imagenet

from .layout_files import (
    contents,
    encoded,
    make_folders,
    write_cifar10,
    write_devkit,
    write_folder,
    write_idx,
    write_kaggle_labels,
    write_objectnet,
    write_python2_pickle,
    write_shard,
)

NAMES = open_clip.IMAGENET_CLASSNAMES


def message_of(*args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        load_data(*map(str, args), **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


class TestSpec:
    def test_names(self):
        assert {"imagenet", "imagenet-v2", "cifar10", "folder"} <= set(list_datasets())
        assert parse_spec("ImageNet_V2=/data/x=1")[0] == "imagenet-v2"
        assert str(parse_spec("ImageNet_V2=/data/x=1")[1]) == "/data/x=1"
        assert parse_spec("CIFAR-10=/data")[0] == "cifar10"
        assert parse_spec("imagenet-1k=/data")[0] == "imagenet"
        assert parse_spec("/data/imagenet") == (None, parse_spec("imagenet=/data/imagenet")[1])
        assert [parse_spec(f"{name}=x")[0] for name in list_datasets()] == list(list_datasets())

    def test_home(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert parse_spec("mnist=~/x")[1] == tmp_path / "x"

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
        for name in list_datasets():
            assert "missing" in message_of(f"{name}=missing")
        with pytest.raises(ValueError, match="split"):
            load_data(".", split="dev")

    def test_a_folder_called_like_a_data_set(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write_folder(tmp_path / "cifar10", {"a/x.png": b""}, classnames="a")
        assert load_data("cifar10").name == "cifar10"

    def test_names_of_other_data(self, tmp_path):
        root = write_folder(tmp_path / "pets", {"val/a/x.png": b""}, classnames="a")
        assert (load_data(str(root)).name, load_data(str(root)).split) == ("pets", "val")
        write_folder(root / "val", {}, classnames="a")
        assert load_data(f"folder={root / 'val'}").name == "pets"
        assert "holds no .tar shards" in message_of(f"webdataset={root}")
        write_folder(tmp_path / "s", {}, classnames="a")
        write_shard(tmp_path / "s" / "0.tar", {"a.png": b"1", "a.cls": "0"})
        assert load_data(f"WDS={tmp_path / 's'}").name == "s"

    def test_unreadable_folders(self, tmp_path, monkeypatch):
        root = write_folder(tmp_path, {"a/x.png": b""}, classnames="a")

        def scandir(path):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(os, "scandir", scandir)
        assert "cannot be read" in message_of(root)


class TestImageNet:
    def folders(self, root):
        """One picture in three classes, whose numbers are 0, 11 and 999."""
        make_folders(root, imagenet_synsets())
        pictures = {f"{imagenet_synsets()[i]}/ILSVRC2012_val_{i:08d}.JPEG": b"%d" % i for i in (999, 0, 11)}
        return write_folder(root, pictures)

    def check(self, data, split="val", name="imagenet"):
        assert contents(data) == [(NAMES[i], b"%d" % i) for i in (0, 11, 999)]
        assert (data.name, data.split) == (name, split)
        assert data.classnames is NAMES and data.templates is open_clip.OPENAI_IMAGENET_TEMPLATES
        assert data.imagenet_classes == [[i] for i in range(1000)]
        assert is_imagenet(data)

    def test_synset_folders(self, tmp_path):
        root = self.folders(tmp_path / "val")
        write_folder(root, {"._n01440764": b"", ".DS_Store": b"", "n01440764/._ILSVRC2012_val_00000000.JPEG": b"fork"})
        for spec in (f"imagenet={root}", f"ImageNet={tmp_path}", str(root), str(tmp_path)):
            self.check(load_data(spec))
        self.check(load_data(f"imagenet={tmp_path}", split="val"))
        root.rename(tmp_path / "whatever")
        self.check(load_data(f"imagenet={tmp_path / 'whatever'}"))

    def test_numbers_of_the_classes(self):
        """Facts of the data set: the first class is the tench, the last toilet paper."""
        assert len(imagenet_synsets()) == 1000
        assert [imagenet_synsets()[i] for i in (0, 1, 207, 999)] == ["n01440764", "n01443537", "n02099601", "n15075141"]
        assert [NAMES[i] for i in (0, 1, 207)] == ["tench", "goldfish", "Golden Retriever"]

    def test_train(self, tmp_path):
        self.folders(tmp_path / "train")
        self.check(load_data(f"imagenet={tmp_path}", split="train"), "train")
        self.check(load_data(f"imagenet={tmp_path / 'train'}", split="train"), "train")
        assert "has no val split, only train" in message_of(f"imagenet={tmp_path}")
        assert "has no val split, only train" in message_of(f"imagenet={tmp_path / 'train'}")

    def test_missing_splits(self, tmp_path):
        root = self.folders(tmp_path / "data")
        assert "has no train split, only val" in message_of(f"imagenet={root}", split="train")

    def test_wrong_classes(self, tmp_path):
        root = self.folders(tmp_path / "val")
        for synset in imagenet_synsets()[20:27]:
            (root / synset).rmdir()
        (root / "n00000001").mkdir()
        message = message_of(f"imagenet={root}")
        assert f"993 of the 1000 class folders of ImageNet are in {root}" in message
        assert f"missing {', '.join(imagenet_synsets()[20:25])} and 2 more; unknown: n00000001" in message
        assert message_of(root) == message

    def test_neither_pictures_nor_folders(self, tmp_path):
        assert "neither class folders nor .tar shards" in message_of(f"imagenet={tmp_path}")
        (tmp_path / "train").mkdir()
        assert "neither class folders nor .tar shards" in message_of(f"imagenet={tmp_path}", split="train")

    def flat(self, folder, numbers=(3, 1, 2)):
        return write_folder(folder, {f"ILSVRC2012_val_{i:08d}.JPEG": b"%d" % i for i in numbers})

    def test_kaggle(self, tmp_path):
        inner = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
        self.flat(inner / "val")
        make_folders(inner / "train", imagenet_synsets())
        write_folder(inner / "train", {"n01443537/x.JPEG": b"train"})
        synsets = {3: "n15075141", 1: "n01443537", 2: "n01440764", 4: "n02099601"}
        write_kaggle_labels(tmp_path / "LOC_val_solution.csv", synsets)
        for spec in (f"imagenet={tmp_path}", str(tmp_path), f"imagenet={inner}", f"imagenet={inner / 'val'}"):
            data = load_data(spec)
            assert contents(data) == [("goldfish", b"1"), ("tench", b"2"), (NAMES[999], b"3")]
            assert (data.name, data.split) == ("imagenet", "val")
        assert contents(load_data(str(tmp_path), split="train")) == [("goldfish", b"train")]

    def test_devkit_numbers_are_not_class_numbers(self, tmp_path):
        pytest.importorskip("scipy")
        self.flat(tmp_path / "val")
        # In the kit, 1 is the kit fox (n02119789, class 278) and 1000 the dumbbell; here two more.
        synsets = {1: "n02119789", 2: "n01443537", 1000: "n03255030"}
        write_devkit(tmp_path / "ILSVRC2012_devkit_t12", synsets, [2, 1000, 1])
        for spec in (f"imagenet={tmp_path}", f"imagenet={tmp_path / 'val'}", str(tmp_path)):
            data = load_data(spec)
            assert data.labels.tolist() == [
                imagenet_synsets().index(s) for s in ("n01443537", "n03255030", "n02119789")
            ]
            assert data.labels.tolist() == [1, 543, 278]

    def test_devkit_goes_by_the_number_in_the_name(self, tmp_path):
        pytest.importorskip("scipy")
        self.flat(tmp_path / "val", numbers=(2, 4))
        write_devkit(tmp_path, {1: "n02119789", 2: "n01443537"}, [1, 2, 1, 1])
        data = load_data(f"imagenet={tmp_path}")
        assert contents(data) == [("goldfish", b"2"), (NAMES[278], b"4")]
        write_folder(tmp_path / "val", {"ILSVRC2012_val_00000005.JPEG": b""})
        assert "no class for ILSVRC2012_val_00000005.JPEG" in message_of(f"imagenet={tmp_path}")

    def test_mistakes_of_the_flat_layout(self, tmp_path):
        root = self.flat(tmp_path / "val")
        spec = f"imagenet={tmp_path}"
        assert "put LOC_val_solution.csv" in message_of(spec)
        write_kaggle_labels(tmp_path / "LOC_val_solution.csv", {1: "n01440764", 2: "n00000001", 3: "n01440764"})
        assert "names the class 'n00000001'" in message_of(spec)
        (tmp_path / "LOC_val_solution.csv").write_text("image,class\nx,y\n")
        assert "must have rows of ImageId and PredictionString" in message_of(spec)
        write_folder(root, {"cat.JPEG": b""})
        assert "cat.JPEG is not named like" in message_of(spec)

    def test_mistakes_of_the_devkit(self, tmp_path):
        pytest.importorskip("scipy")
        self.flat(tmp_path / "val")
        data = write_devkit(tmp_path, {1: "n02119789"}, [1, 1, 7]) / "data"
        assert "must hold the number of a class in meta.mat" in message_of(f"imagenet={tmp_path}")
        (data / "meta.mat").write_bytes(b"something else")
        assert "is not the meta.mat" in message_of(f"imagenet={tmp_path}")
        (data / "meta.mat").unlink()
        assert "There is no" in message_of(f"imagenet={tmp_path}")

    def test_shards(self, tmp_path):
        for name, label in (("train-0000", "0"), ("train-0001", "999"), ("validation-00", "11")):
            members = {"a_1.jpg": name.encode(), "a_1.cls": label, "a_1.json": "{}"}
            write_shard(tmp_path / f"imagenet1k-{name}.tar", members)
        data = load_data(f"imagenet={tmp_path}")
        assert contents(data) == [(NAMES[11], b"validation-00")]
        assert (data.name, data.split, data.imagenet_classes[11]) == ("imagenet", "val", [11])
        data = load_data(f"imagenet={tmp_path}", split="train")
        assert contents(data) == [(NAMES[0], b"train-0000"), (NAMES[999], b"train-0001")]
        assert f"or say imagenet={tmp_path}" in message_of(tmp_path)

    def test_shards_in_folders(self, tmp_path):
        write_shard(tmp_path / "val" / "0.tar", {"a.jpg": b"1", "a.cls": "1000"})
        assert "class 1000, but ImageNet names 1000 classes" in message_of(f"imagenet={tmp_path}")
        write_shard(tmp_path / "val" / "0.tar", {"a.jpg": b"1", "a.cls": "7"})
        for path in (tmp_path, tmp_path / "val"):
            assert contents(load_data(f"imagenet={path}")) == [(NAMES[7], b"1")]

    def test_archives_next_to_what_they_held(self, tmp_path):
        root = self.folders(tmp_path / "val")
        for archive in ("ILSVRC2012_img_val.tar", "ILSVRC2012_img_train.tar", "val/n01440764.tar"):
            write_shard(tmp_path / archive, {"x.JPEG": b"not a sample"})
        for spec in (f"imagenet={tmp_path}", f"imagenet={root}", str(tmp_path), str(root)):
            self.check(load_data(spec))

    def test_own_class_names_make_it_other_data(self, tmp_path):
        """ImageNet-100 and the like."""
        synsets = imagenet_synsets()[5:8]
        root = write_folder(tmp_path / "small", {f"{s}/x.JPEG": b"" for s in synsets}, classnames="a\nb\nc")
        assert load_data(str(root)).classnames == ["a", "b", "c"]
        assert "3 of the 1000 class folders" in message_of(f"imagenet={root}")

    def test_the_number_of_images_is_checked(self, tmp_path, caplog):
        load_data(f"imagenet={self.folders(tmp_path)}")
        assert "holds 3 images of imagenet (val), which has 50,000" in caplog.text


class TestImageNetV2:
    def folders(self, root):
        make_folders(root, range(1000))
        return write_folder(root, {f"{i}/x.jpeg": b"%d" % i for i in (2, 10, 100, 999)})

    @pytest.mark.parametrize(
        "name,inner",
        [
            ("imagenet-v2", "imagenetv2-matched-frequency-format-val"),
            ("imagenet-v2", "ImageNetV2-matched-frequency"),
            ("imagenet-v2-threshold-0.7", "imagenetv2-threshold0.7-format-val"),
            ("imagenet-v2-top-images", "imagenetv2-top-images-format-val"),
        ],
    )
    def test_folders_are_class_numbers(self, tmp_path, name, inner):
        root = self.folders(tmp_path / inner)
        for spec in (f"{name}={root}", f"{name}={tmp_path}", str(root), str(tmp_path)):
            data = load_data(spec)
            assert contents(data) == [(NAMES[i], b"%d" % i) for i in (2, 10, 100, 999)]
            assert (data.name, data.split) == (name, "test")
            assert data.classnames is NAMES and data.imagenet_classes == [[i] for i in range(1000)]
            assert is_imagenet(data)

    def test_any_other_folder(self, tmp_path):
        root = self.folders(tmp_path / "v2")
        assert load_data(str(root)).name == load_data(f"imagenet-v2={root}").name == "imagenet-v2"

    def test_another_variant(self, tmp_path):
        root = self.folders(tmp_path / "imagenetv2-top-images-format-val")
        for path in (root, tmp_path):
            assert f"say imagenet-v2-top-images={path} for it" in message_of(f"imagenet-v2={path}")
        self.folders(tmp_path / "ImageNetV2-matched-frequency")
        assert load_data(f"imagenet-v2={tmp_path}").images.root.name == "ImageNetV2-matched-frequency"
        assert load_data(f"imagenet-v2-top-images={tmp_path}").images.root == root

    def test_wrong_folders(self, tmp_path):
        root = self.folders(tmp_path)
        (root / "1000").mkdir()
        message = message_of(f"imagenet-v2={root}")
        assert "1000 of the 1000 class folders of ImageNet-V2" in message and "unknown: 1000" in message
        (root / "998").rmdir()
        assert "missing 998; unknown: 1000" in message_of(f"imagenet-v2={root}")

    def test_splits(self, tmp_path):
        assert "imagenet-v2 has no train split, only test" in message_of(f"imagenet-v2={tmp_path}", split="train")


class TestSubsets:
    @pytest.mark.parametrize("name", ["imagenet-r", "imagenet-a"])
    def test_classes_are_some_of_imagenet(self, tmp_path, name):
        synsets = subset_synsets(name)
        root = make_folders(tmp_path / name, synsets)
        write_folder(root, {f"{synsets[i]}/art_{i}.jpg": b"%d" % i for i in (199, 0, 5)})
        indices = resources.files("timm.data") / "_info" / f"{name.replace('-', '_')}_indices.txt"
        numbers = [int(line) for line in indices.read_text().split()]
        for spec in (f"{name}={root}", f"{name}={tmp_path}", str(root)):
            data = load_data(spec)
            assert data.name == name and len(data.classnames) == 200
            assert data.imagenet_classes == [[number] for number in numbers]
            assert contents(data) == [(NAMES[numbers[i]], b"%d" % i) for i in (0, 5, 199)]
            assert not is_imagenet(data)

    def test_wrong_classes(self, tmp_path):
        root = make_folders(tmp_path / "imagenet-r", [*subset_synsets("imagenet-r")[2:], "foo"])
        message = message_of(f"imagenet-r={tmp_path}")
        assert f"198 of the 200 class folders of ImageNet-R are in {root}" in message
        assert "missing n01443537, n01484850; unknown: foo" in message
        other = make_folders(tmp_path / "a", subset_synsets("imagenet-a"))
        assert "of the 200 class folders of ImageNet-R are in" in message_of(f"imagenet-r={other}")

    def test_without_timms_lists(self, tmp_path, monkeypatch):
        subset_synsets.cache_clear()
        monkeypatch.setattr(resources, "files", lambda package: tmp_path)
        assert "timm has no list of the classes of imagenet-a" in message_of(f"imagenet-a={tmp_path}")

    def test_sketch(self, tmp_path):
        make_folders(tmp_path / "sketch", imagenet_synsets())
        write_folder(tmp_path / "sketch", {f"{imagenet_synsets()[8]}/sketch_3.JPEG": b"8"})
        for path in (tmp_path, tmp_path / "sketch"):
            data = load_data(f"imagenet-sketch={path}")
            assert (data.name, data.split, contents(data)) == ("imagenet-sketch", "test", [(NAMES[8], b"8")])
            assert is_imagenet(data)


class TestObjectNet:
    FOLDERS = {"tv": "TV", "alarm_clock": "Alarm clock", "air_freshener": "Air freshener", "chair": "Chair"}
    OVERLAP = {"TV": "television, tv", "Alarm clock": "analog clock", "Chair": "folding chair; rocking chair, rocker"}

    def data(self, root, **changes):
        """ImageNet's label of class i is on line (7 i) mod 1000; 3, 250, 600 and 901 are those that overlap."""
        names = {250: "analog clock", 901: "television, tv", 600: "folding chair", 3: "rocking chair, rocker"}
        order = [7 * i % 1000 for i in range(1000)]
        lines = [""] * 1000
        for i in range(1000):
            lines[order[i]] = names.get(i, f"label {i}")
        given = {"folders": self.FOLDERS, "overlap": self.OVERLAP, "lines": lines, "order": order, **changes}
        return write_objectnet(root, **given)

    def picture(self):
        image = Image.new("RGB", (10, 8), (255, 0, 0))
        image.paste((1, 2, 3), (1, 1, 9, 7))
        return image

    def test_overlapping_classes(self, tmp_path):
        root = self.data(tmp_path / "objectnet-1.0")
        for folder in self.FOLDERS:
            self.picture().save(root / "images" / folder / "x.png")
        for spec in (f"objectnet={tmp_path}", f"objectnet={root}", str(tmp_path), str(root)):
            data = load_data(spec)
            assert (data.name, data.split) == ("objectnet", "test")
            assert data.classnames == ["alarm clock", "chair", "tv"]
            assert data.imagenet_classes == [[250], [600, 3], [901]]
            assert data.labels.tolist() == [0, 1, 2]
            names = [data.images.name(i) for i in range(3)]
            assert names == [str(root / "images" / name / "x.png") for name in ("alarm_clock", "chair", "tv")]

    def test_the_red_border_is_cut_off(self, tmp_path):
        root = self.data(tmp_path)
        self.picture().save(root / "images" / "tv" / "x.png")
        Image.new("RGB", (4, 9)).save(root / "images" / "tv" / "y.png")
        data = load_data(f"objectnet={root}")
        image = data.images.load(0)
        assert image.size == (6, 4) and (np.asarray(image) == (1, 2, 3)).all()
        with pytest.raises(ValueError, match="only 4 x 9"):
            data.images.load(1)
        part = data.subset(torch.tensor([1]))
        assert len(part) == 1 and part.images.name(0).endswith("y.png")
        assert (
            data.fingerprint() != part.fingerprint() and data.images.fingerprint() != data.images.images.fingerprint()
        )

    def test_wrong_folders(self, tmp_path):
        root = self.data(tmp_path)
        (root / "images" / "chair").rename(root / "images" / "stool")
        message = message_of(f"objectnet={root}")
        assert "3 of the 4 class folders of ObjectNet" in message and "missing chair; unknown: stool" in message

    @pytest.mark.parametrize(
        "changes,message",
        [
            ({"order": list(range(999))}, "a line number for each of ImageNet's classes 0 to 999"),
            (
                {"order": list(range(1, 1001))},
                "numbers of lines that imagenet_to_label_2012_v2, with 1000, does not have",
            ),
            ({"overlap": {"TV": "radio"}}, "names 'radio'"),
            ({"overlap": {"Radio": "analog clock"}}, "no folder for 'Radio'"),
            ({"overlap": {"TV": ["television, tv"]}}, "must be a JSON object of texts"),
            ({"lines": ["television, tv"] * 1000}, "but is that of 1000"),
        ],
    )
    def test_wrong_mappings(self, tmp_path, changes, message):
        assert message in message_of(f"objectnet={self.data(tmp_path, **changes)}")

    def test_missing_mappings(self, tmp_path):
        root = self.data(tmp_path)
        (root / "mappings" / "imagenet_to_label_2012_v2").unlink()
        assert "unpack the whole archive of ObjectNet" in message_of(f"objectnet={root}")
        (root / "mappings" / "folder_to_objectnet_label.json").write_text("{")
        assert "unpack the whole archive of ObjectNet" in message_of(f"objectnet={root}")


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

    def test_mnist(self, tmp_path, caplog):
        self.files(tmp_path, dot=".")
        data = load_data(f"MNIST={tmp_path}")
        assert data.classnames == list("0123456789") and data.templates == ['a photo of the number: "{}".']
        assert "holds 3 images of mnist (test), which has 10,000" in caplog.text

    def test_which_of_the_two(self, tmp_path):
        self.files(tmp_path / "MNIST" / "raw")
        assert load_data(str(tmp_path)).name == "mnist"
        self.files(tmp_path / "FashionMNIST" / "raw")
        assert f"say mnist={tmp_path} or fashion-mnist={tmp_path}" in message_of(tmp_path)
        self.files(tmp_path / "fashion-mnist")
        assert load_data(str(tmp_path / "fashion-mnist")).name == "fashion-mnist"

    def test_no_files_and_no_download(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torchvision_datasets, "MNIST", None)  # a call would fail
        message = message_of(f"mnist={tmp_path}")
        assert "t10k-images-idx3-ubyte" in message and "--download" in message
        self.files(tmp_path)
        assert "train-images-idx3-ubyte" in message_of(f"mnist={tmp_path}", split="train")
        assert "has no val split, only train and test" in message_of(f"mnist={tmp_path}", split="val")
        assert len(load_data(f"mnist={tmp_path}", download=True)) == 3

    def test_download(self, tmp_path, monkeypatch):
        def fetch(root, download):
            assert download
            self.files(tmp_path / "new" / "FashionMNIST" / "raw")

        monkeypatch.setattr(torchvision_datasets, "FashionMNIST", fetch)
        assert len(load_data(f"fashion-mnist={tmp_path / 'new'}", download=True)) == 3

    def test_download_that_fails(self, tmp_path, monkeypatch):
        def fail(root, download):
            raise RuntimeError("Error downloading")

        monkeypatch.setattr(torchvision_datasets, "CIFAR10", fail)
        assert "cifar10 cannot be downloaded" in message_of(f"cifar10={tmp_path}", download=True)

    @pytest.mark.parametrize(
        "change,message",
        [
            (
                lambda content: content[:-1],
                "is cut off or damaged: its sizes are 3 x 28 x 28, but it holds 2351 values",
            ),
            (lambda content: content + b"x", "is cut off or damaged"),
            (lambda content: content[:7], "is not an idx file"),
            (lambda content: b"", "starts with nothing"),
            (lambda content: b"\0\0\x0d\x03" + content[4:], "starts with 00000d03 instead of 00000803"),
            (lambda content: b"\x89PNG" + content, "starts with 89504e47"),
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

    def test_damaged_gzip(self, tmp_path):
        self.files(tmp_path, ".gz")
        path = tmp_path / "t10k-images-idx3-ubyte.gz"
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], b"no gzip", whole[:20] + b"\xff" * 20 + whole[40:]):
            path.write_bytes(content)
            assert "cannot be read" in message_of(f"mnist={tmp_path}")

    def test_labels_out_of_range(self, tmp_path):
        self.files(tmp_path, count=11)
        assert "must hold labels from 0 to 9" in message_of(f"mnist={tmp_path}")


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
        assert "has no val split, only train and test" in message_of(f"cifar10={tmp_path}", split="val")
        root = self.files(tmp_path / "cifar-10-batches-py")
        (root / "data_batch_3").unlink()
        assert "There is no" in message_of(f"cifar10={tmp_path}", split="train")
        assert len(load_data(f"cifar10={tmp_path}", download=True)) == 3

    @pytest.mark.parametrize(
        "changes,message",
        [
            ({"data": np.zeros((2, 3071), np.uint8)}, "uint8 rows of 3072"),
            ({"data": np.zeros((2, 3072), np.float32)}, "uint8 rows of 3072"),
            ({"data": np.zeros((0, 3072), np.uint8)}, "uint8 rows of 3072"),
            ({"data": "pixels"}, "has no 'data'"),
            ({"fine_labels": [2]}, "2 numbers from 0 to 2 as 'fine_labels'"),
            ({"fine_labels": [2, 3]}, "2 numbers from 0 to 2 as 'fine_labels'"),
            ({"fine_labels": [2, "cat"]}, "2 numbers from 0 to 2 as 'fine_labels'"),
            ({"labels_key": "labels"}, "has no 'fine_labels'"),
        ],
    )
    def test_wrong_contents(self, tmp_path, changes, message):
        assert message in message_of(f"cifar100={self.cifar100(tmp_path, **changes)}")

    def test_pickles_cannot_run_code(self, tmp_path):
        root = self.cifar100(tmp_path)
        (root / "test").write_bytes(pickle.dumps({"data": _Attack(str(tmp_path / "made"))}, protocol=2))
        assert "is not a pickle of arrays and plain types" in message_of(f"cifar100={root}")
        assert not (tmp_path / "made").exists()

    def test_damaged_pickles(self, tmp_path):
        root = self.cifar100(tmp_path)
        whole = (root / "test").read_bytes()
        for content in (whole[: len(whole) // 2], b"", b"<html>"):
            (root / "test").write_bytes(content)
            assert "is not a pickle of arrays and plain types" in message_of(f"cifar100={root}")


class _Attack:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_gray_and_cmyk_in_imagenet(tmp_path):
    """ImageNet has both; what the model sees is RGB."""
    root = make_folders(tmp_path / "val", imagenet_synsets())
    pictures = {"gray": encoded(77, "JPEG", "L"), "cmyk": encoded((0, 255, 255, 0), "JPEG", "CMYK")}
    write_folder(root, {f"n01440764/{name}.JPEG": content for name, content in pictures.items()})
    data = load_data(f"imagenet={tmp_path}")
    for i, color in enumerate([(255, 0, 0), (77, 77, 77)]):
        assert np.abs(np.asarray(data.images.load(i)).astype(int) - color).max() <= 3
