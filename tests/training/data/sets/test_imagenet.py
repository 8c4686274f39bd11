from __future__ import annotations

from importlib import resources

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from training.data.sets.imagenet import imagenet_synsets, subset_synsets
from training.data.sets.labelled import ImageFiles
from training.data.sets.registry import load_data
from training.evaluation.scores import is_imagenet

from .layout_files import (
    contents,
    make_folders,
    message_of,
    write_devkit,
    write_folder,
    write_kaggle_labels,
    write_objectnet,
    write_shard,
)

NAMES = open_clip.IMAGENET_CLASSNAMES


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

    def test_train_and_missing_splits(self, tmp_path):
        assert "neither class folders nor .tar shards" in message_of(f"imagenet={tmp_path}")
        self.folders(tmp_path / "train")
        for root in (tmp_path, tmp_path / "train"):
            self.check(load_data(f"imagenet={root}", split="train"), "train")
            assert "has no val split, only train" in message_of(f"imagenet={root}")
        root = self.folders(tmp_path / "data")
        assert "has no train split, only val" in message_of(f"imagenet={root}", split="train")
        (root / "train").mkdir()
        assert "neither class folders nor .tar shards" in message_of(f"imagenet={root}", split="train")

    def test_wrong_classes(self, tmp_path):
        root = self.folders(tmp_path / "val")
        for synset in imagenet_synsets()[20:27]:
            (root / synset).rmdir()
        (root / "n00000001").mkdir()
        message = message_of(f"imagenet={root}")
        assert f"993 of the 1000 class folders of ImageNet are in {root}" in message
        assert f"missing {', '.join(imagenet_synsets()[20:25])} and 2 more; unknown: n00000001" in message
        assert message_of(root) == message
        assert "of the 200 class folders of ImageNet-R are in" in message_of(f"imagenet-r={root}")

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
        write_devkit(tmp_path / "ILSVRC2012_devkit_t12", synsets, [2, 1000, 1, 2])
        for spec in (f"imagenet={tmp_path}", f"imagenet={tmp_path / 'val'}", str(tmp_path)):
            assert load_data(spec).labels.tolist() == [1, 543, 278]
        write_folder(tmp_path / "val", {"ILSVRC2012_val_00000004_n01443537.JPEG": b""})
        (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").unlink()  # labels go by the numbers in the names
        assert load_data(str(tmp_path)).labels.tolist() == [543, 278, 1]
        write_folder(tmp_path / "val", {"ILSVRC2012_val_00000005.JPEG": b""})
        assert "none of the 1000 classes for ILSVRC2012_val_00000005.JPEG" in message_of(f"imagenet={tmp_path}")
        meta = tmp_path / "ILSVRC2012_devkit_t12" / "data" / "meta.mat"
        meta.write_bytes(b"something else")
        assert "get the whole kit" in message_of(f"imagenet={tmp_path}")
        meta.unlink()
        assert "FileNotFoundError" in message_of(f"imagenet={tmp_path}")

    def test_mistakes_of_the_flat_layout(self, tmp_path):
        root = self.flat(tmp_path / "val")
        spec = f"imagenet={tmp_path}"
        assert "put LOC_val_solution.csv" in message_of(spec)
        write_kaggle_labels(tmp_path / "LOC_val_solution.csv", {1: "n01440764", 2: "n00000001", 3: "n01440764"})
        assert "none of the 1000 classes for ILSVRC2012_val_00000002.JPEG" in message_of(spec)
        (tmp_path / "LOC_val_solution.csv").write_text("image,class\nx,y\n")
        assert "must have rows of ImageId and PredictionString" in message_of(spec)
        write_kaggle_labels(tmp_path / "LOC_val_solution.csv", dict.fromkeys((1, 2, 3), "n01440764"))
        write_folder(root, {"cat.JPEG": b""})
        assert "none of the 1000 classes for cat.JPEG" in message_of(spec)

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
        write_shard(tmp_path / "in" / "val" / "0.tar", {"a.jpg": b"1", "a.cls": "7"})
        for path in (tmp_path / "in", tmp_path / "in" / "val"):
            assert contents(load_data(f"imagenet={path}")) == [(NAMES[7], b"1")]
        write_shard(tmp_path / "in" / "val" / "0.tar", {"a.jpg": b"1", "a.cls": "1000"})
        assert "class 1000, but ImageNet names 1000 classes" in message_of(f"imagenet={tmp_path / 'in'}")

    def test_archives_next_to_what_they_held(self, tmp_path):
        root = self.folders(tmp_path / "val")
        for archive in ("ILSVRC2012_img_val.tar", "ILSVRC2012_img_train.tar", "val/n01440764.tar"):
            write_shard(tmp_path / archive, {"x.JPEG": b"not a sample"})
        for spec in (f"imagenet={tmp_path}", f"imagenet={root}", str(tmp_path), str(root)):
            self.check(load_data(spec))

    @pytest.mark.parametrize("inner", ["", "val/"])
    def test_some_of_the_classes(self, tmp_path, caplog, inner):
        """ImageNet-100 and the like: ImageNet's names and numbers, unless there are names of their own."""
        synsets, root = imagenet_synsets()[5:9:3], tmp_path / "small"
        write_folder(root, {f"{inner}{s}/x.JPEG": s.encode() for s in synsets})
        data = load_data(str(root))
        assert contents(data) == [(NAMES[i], imagenet_synsets()[i].encode()) for i in (5, 8)]
        assert data.templates is open_clip.OPENAI_IMAGENET_TEMPLATES and data.imagenet_classes == [[5], [8]]
        assert (data.name, data.split) == ("small", "val" if inner else "test")
        assert "2 of ImageNet's 1000 classes" in caplog.text
        message = message_of(f"imagenet={root}")
        assert "2 of the 1000 class folders" in message and f"say folder={root}" in message
        write_folder(root, {}, classnames="a\nb")
        assert load_data(str(root)).classnames == ["a", "b"]

    def test_given_names_go_by_synset(self, tmp_path):
        self.folders(tmp_path / "val")
        lines = [f"{synset}\tname {i}" for i, synset in enumerate(imagenet_synsets())]
        write_folder(tmp_path, {}, names="\n".join(lines[::-1]))
        data = load_data(f"imagenet={tmp_path}", classnames=tmp_path / "names.txt")
        assert [name for name, _ in contents(data)] == ["name 0", "name 11", "name 999"]


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

    def test_another_variant_or_other_folders(self, tmp_path):
        root = self.folders(tmp_path / "imagenetv2-top-images-format-val")
        for path in (root, tmp_path):
            assert f"say imagenet-v2-top-images={path} for it" in message_of(f"imagenet-v2={path}")
        self.folders(tmp_path / "ImageNetV2-matched-frequency")
        assert load_data(f"imagenet-v2={tmp_path}").images.root.name == "ImageNetV2-matched-frequency"
        assert load_data(f"imagenet-v2-top-images={tmp_path}").images.root == root
        root = self.folders(tmp_path / "v2")  # called after none of them
        assert load_data(str(root)).name == load_data(f"imagenet-v2={root}").name == "imagenet-v2"
        (root / "1000").mkdir()
        (root / "998").rmdir()
        message = message_of(f"imagenet-v2={root}")
        assert "999 of the 1000 class folders of ImageNet-V2" in message and "missing 998; unknown: 1000" in message


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
        lines = [names.get(order.index(line), f"label {line}") for line in range(1000)]
        given = {"folders": self.FOLDERS, "overlap": self.OVERLAP, "lines": lines, "order": order, **changes}
        return write_objectnet(root, **given)

    def test_overlapping_classes_without_the_red_border(self, tmp_path):
        root = self.data(tmp_path / "objectnet-1.0")
        picture = Image.new("RGB", (10, 8), (255, 0, 0))
        picture.paste((1, 2, 3), (1, 1, 9, 7))
        for folder in self.FOLDERS:
            picture.save(root / "images" / folder / "x.png")
        Image.new("RGB", (4, 9)).save(root / "images" / "tv" / "y.png")
        for spec in (f"objectnet={tmp_path}", f"objectnet={root}", str(tmp_path), str(root)):
            data = load_data(spec)
            assert (data.name, data.split) == ("objectnet", "test")
            assert data.classnames == ["alarm clock", "chair", "tv"]
            assert data.imagenet_classes == [[250], [600, 3], [901]]
            assert data.labels.tolist() == [0, 1, 2, 2]
            names = [data.images.name(i) for i in range(3)]
            assert names == [str(root / "images" / name / "x.png") for name in ("alarm_clock", "chair", "tv")]
        image = data.images.load(0)
        assert image.size == (6, 4) and (np.asarray(image) == (1, 2, 3)).all()
        part = data.subset(torch.tensor([3]))
        with pytest.raises(ValueError, match="y.png is only 4 x 9"):
            part.images.load(0)
        assert data.images.fingerprint() != ImageFiles(data.images.root, data.images.paths).fingerprint()
        (root / "images" / "chair").rename(root / "images" / "stool")
        message = message_of(f"objectnet={root}")
        assert "3 of the 4 class folders of ObjectNet" in message and "missing chair; unknown: stool" in message

    @pytest.mark.parametrize(
        "changes,message",
        [
            ({"order": list(range(999))}, "KeyError: '999'"),
            ({"overlap": {"TV": "radio"}}, "KeyError: 'radio'"),
            ({"overlap": {"Radio": "analog clock"}}, "no folder for some of the labels"),
            ({"overlap": {"TV": ["television, tv"]}}, "'list' object has no attribute"),
            ({"lines": ["television, tv"] * 1000}, "is not as published"),
        ],
    )
    def test_wrong_mappings(self, tmp_path, changes, message):
        root = self.data(tmp_path, **changes)
        assert message in message_of(f"objectnet={root}")
        (root / "mappings" / "imagenet_to_label_2012_v2").unlink()
        assert "unpack the whole archive of ObjectNet" in message_of(f"objectnet={root}")


class TestTinyImageNet:
    SYNSETS = ("n02124075", "n01443537", "n00000002")  # a cat, the goldfish, and none of ImageNet's 1000

    def files(self, root):
        train = {f"train/{s}/images/{s}_0.JPEG": s.encode() for s in self.SYNSETS}
        boxes = {f"train/{s}/{s}_boxes.txt": b"" for s in self.SYNSETS}
        write_folder(root, train | boxes | {f"val/images/val_{i}.JPEG": b"%d" % i for i in (0, 1)})
        write_folder(root / "val", {}, val_annotations="val_0.JPEG\tn00000002\t0\t0\nval_1.JPEG\tn01443537\t0\t0\n")
        words = "n00000002\tthe thing, it\nn01443537\tfish\n"
        return write_folder(root, {}, wnids="\n".join(self.SYNSETS), words=words)

    def test_both_splits(self, tmp_path, caplog):
        root = self.files(tmp_path / "tiny-imagenet-200")
        for spec in (f"tiny-imagenet={tmp_path}", f"TinyImageNet={root}", str(root), str(tmp_path)):
            data = load_data(spec)
            assert (data.name, data.split) == ("tiny-imagenet", "val")
            assert contents(data) == [("the thing", b"0"), ("goldfish", b"1")]
        train = load_data(str(root), split="train")
        assert [name for name, _ in contents(train)] == ["the thing", "goldfish", NAMES[285]] == train.classnames
        assert train.imagenet_classes is None and train.folders == sorted(self.SYNSETS)
        assert "left out" not in caplog.text
        write_folder(root, {"val/images/val_7.JPEG": b""})
        assert "val_annotations.txt has none of the 3 classes for images/val_7.JPEG" in message_of(root)
        (root / "words.txt").unlink()
        assert "unpack the whole archive" in message_of(f"tiny-imagenet={root}")
