from __future__ import annotations

import logging
import os

import numpy as np
import pytest
import torch

from training.data.sets.folders import find_splits
from training.data.sets.registry import load_data
from training.errors import UserError

from .layout_files import contents, encoded, make_folders, message_of, write_folder, write_shard


def load_named(folder, split="test", **options):
    return load_data(f"folder={folder}", split=split, **options)


def same_time(root, time=2_000_000_000):
    for path in root.rglob("*"):
        os.utime(path, ns=(time, time))


class TestFolders:
    def test_names_in_the_order_of_the_folders(self, tmp_path):
        pictures = {"zebra/x.png": b"z", "ant/deep/y.JPG": b"y", "ant/a.webp": b"w"}
        data = load_named(write_folder(tmp_path / "a", pictures, classnames="an ant\na zebra\n\n"))
        assert data.classnames == ["an ant", "a zebra"]
        assert data.templates == ("a photo of a {}.",)
        assert contents(data) == [("an ant", b"w"), ("an ant", b"y"), ("a zebra", b"z")]
        assert data.labels.dtype == torch.int64 and data.imagenet_classes is None
        pictures = {f"{i}/x.png": b"picture %d" % i for i in range(12)}  # all numbers: 10 after 2
        root = write_folder(tmp_path / "b", pictures, classnames="\n".join(f"name {i}" for i in range(12)))
        assert contents(load_named(root)) == [(f"name {i}", b"picture %d" % i) for i in range(12)]

    def test_hidden_and_other_files_are_no_pictures_and_links_are_followed(self, tmp_path):
        pictures = {
            "a/x.png": b"1", "a/._x.png": b"2", "a/notes.md": b"3", ".cache/x.png": b"4", "x.png": b"5",
            "a/.thumbs/x.png": b"6", "a/b.png/y.png": b"7",
        }  # fmt: skip
        root = write_folder(tmp_path / "data", pictures, classnames="\ufeffonly")
        write_folder(tmp_path / "elsewhere", {"deep/z.png": b"8"})
        os.symlink(tmp_path / "elsewhere", root / "a" / "link")
        assert contents(load_named(root)) == [("only", b"7"), ("only", b"8"), ("only", b"1")]

    def test_templates(self, tmp_path):
        """Also CLIP_benchmark's, under its own name; what is called templates.txt comes first."""
        theirs = {"zeroshot_classification_templates": "an emoji of {c}\n{c}, a kind of {c}"}
        root = write_folder(tmp_path, {"a/x.png": b""}, classnames="a", **theirs)
        templates = [template.format("cat") for template in load_named(root).templates]
        assert templates == ["an emoji of cat", "cat, a kind of cat"]
        write_folder(root, {}, templates="a {}.\n\n")
        assert load_named(root).templates == ["a {}."]

    def test_without_classnames_the_folders_are_the_names(self, tmp_path, caplog):
        root = write_folder(tmp_path / "pets", {"a_cat/x.png": b"1", "dog/x.png": b"2"})
        with caplog.at_level(logging.INFO):
            assert contents(load_data(str(root))) == [("a_cat", b"1"), ("dog", b"2")]
        assert "the classes are called as their folders are, a_cat, dog" in caplog.text
        assert "all pictures lie in folders" not in caplog.text
        write_folder(tmp_path / "corrupted", {"1/cat/x.png": b"1", "1/dog/x.png": b"2"})
        assert load_data(str(tmp_path / "corrupted")).classnames == ["1"]
        assert "all pictures lie in folders within its 1 class folders, the first in 1/cat; if those" in caplog.text
        (root / "train").mkdir()  # a class, or what is left of splits?
        assert "has no classnames.txt" in message_of(root)

    def test_given_names(self, tmp_path, caplog):
        """`classnames=` means what classnames.txt means, whatever there is, and also where that is missing or wrong."""
        root = write_folder(tmp_path / "pets", {"b/x.png": b"2", "a/x.png": b"1"}, classnames="wrong")
        write_folder(tmp_path, {}, lines="one\ntwo", tabs="b\ttwo\na\tone", more="a\tone\nc\ttwo")
        for names in ("lines", "tabs"):
            data = load_data(str(root), classnames=tmp_path / f"{names}.txt")
            assert contents(data) == [("one", b"1"), ("two", b"2")]
        assert "missing c; unknown: b" in message_of(root, classnames=tmp_path / "more.txt")
        assert "There is no file" in message_of(root, classnames=tmp_path / "none.txt")
        (root / "classnames.txt").unlink()
        assert load_data(str(root), classnames=tmp_path / "tabs.txt").classnames == ["one", "two"]
        assert caplog.text == ""
        write_shard(tmp_path / "shards" / "0.tar", {"a.png": b"1", "a.cls": "1", "b.png": b"2", "b.cls": "0"})
        data = load_data(str(tmp_path / "shards"), classnames=tmp_path / "lines.txt")
        assert contents(data) == [("two", b"1"), ("one", b"2")]
        message = message_of(tmp_path / "shards", classnames=tmp_path / "tabs.txt")
        assert "has tabs" in message and "one name a line" in message

    @pytest.mark.parametrize(
        "names", ["n01 one\nn02 two", "n01  one\nn02\ttwo", "n01,one\nn02,two", "n01: one\nn02: two", "0 one\n1 two"]
    )
    def test_ids_and_a_space(self, tmp_path, names):
        root = write_folder(tmp_path, {"n01/x.png": b"1", "n02/x.png": b"2"}, classnames=names)
        assert "folder<TAB>name" in message_of(f"folder={root}")

    @pytest.mark.parametrize(
        "ending,kind",
        [("gif", "GIF"), ("JFIF", "JPEG"), ("jpe", "JPEG"), ("jp2", "JPEG2000"), ("avif", "AVIF"), ("tga", "TGA")],
    )
    def test_what_can_be_decoded_is_a_picture(self, tmp_path, ending, kind):
        picture = encoded((200, 0, 0), kind, size=(16, 16))
        write_folder(tmp_path / "files", {f"a/x.{ending}": picture}, classnames="a")
        write_folder(tmp_path / "shards", {}, classnames="a")
        write_shard(tmp_path / "shards" / "0.tar", {f"a.{ending}": picture, "a.cls": "0"})
        for folder in ("files", "shards"):
            image = load_data(str(tmp_path / folder)).images.load(0)
            assert np.abs(np.asarray(image).astype(int) - (200, 0, 0)).max() <= 30

    def test_the_rest_is_named_and_counted(self, tmp_path, caplog):
        pictures = {"a/x.png": b"1", "a/named": encoded("red"), "a/y.raw": b"2", "b/z.raw": b"3"}
        pictures |= {"b/without": b"4", "b/w.pdf": b"5"}
        root = write_folder(tmp_path, pictures, classnames="two\ntwo")
        assert load_named(root).images.paths.tolist() == ["a/named", "a/x.png"]
        assert "left out 4 file(s) whose endings (.pdf, .raw, no ending) are not" in caplog.text
        assert "classnames.txt has 'two' for two classes" in caplog.text
        assert "the first of them a/y.raw" in caplog.text and "no picture of 1 of its 2 classes: two" in caplog.text
        (root / "a/x.png").unlink(), (root / "a/named").unlink()
        assert "hold no images, only 4 file(s) whose endings (.pdf, .raw" in message_of(f"folder={root}")

    @pytest.mark.parametrize(
        "texts,message",
        [
            ({"classnames": "one\ntwo\nthree"}, "classnames.txt names 3 classes; pets has 2 class folders"),
            ({"classnames": "one\n\ntwo"}, "nothing on line 2"),
            ({"classnames": " \n"}, "is empty"),
            ({"classnames": "a\tone\nc\ttwo"}, "missing c; unknown: b"),
            ({"classnames": "a\tone\nb"}, "but 'b' is none"),
            ({"classnames": "a\tone\na\ttwo"}, "names the folder a twice"),
            ({"classnames": "a\tone\tuno\nb\ttwo"}, "lines of folder<TAB>name, but"),
            ({"classnames": "b\na"}, "in another order than theirs, which starts with a"),
            ({"classnames": "a\tone\nb\ttwo\nc\tthree\nd\tfour"}, "2 of the 4 class folders of classnames.txt are in"),
            ({"classnames": "one\ntwo", "templates": "a photo"}, "'a photo' must have {}"),
            ({"classnames": "one\ntwo", "templates": "a {"}, "'a {' must have {}"),
            ({"classnames": "one\ntwo", "templates": '"a {}",'}, "is code; write prompts as they are"),
            ({"classnames": "one\ntwo", "templates": "lambda c: f'a {c}'"}, "is code; write prompts as they are"),
        ],
    )
    def test_mistakes(self, tmp_path, texts, message):
        root = write_folder(tmp_path / "pets", {"a/x.png": b"", "b/x.png": b""}, **texts)
        assert message in message_of(f"folder={root}")

    def test_no_folder_no_classes_no_images(self, tmp_path):
        assert "There is no folder" in message_of(f"folder={tmp_path / 'missing'}")
        assert "neither class folders nor .tar shards" in message_of(f"folder={tmp_path}")
        write_folder(tmp_path, {"a/x.txt": b"", "classnames.txt": b"a"})
        assert "hold no images" in message_of(f"folder={tmp_path}")
        write_folder(tmp_path, {"a/x.png": b"", "classnames.txt": "façade".encode("latin-1")})
        assert "UTF-8" in message_of(f"folder={tmp_path}")

    def test_the_order_and_the_fingerprint_do_not_depend_on_the_disk(self, tmp_path):
        names = [f"{folder}/{i}.png" for folder in "ab" for i in range(20)]
        for root, order in (("1", names), ("2", names[::-1])):
            write_folder(tmp_path / root, {name: name.encode() for name in order}, classnames="a\nb")
            same_time(tmp_path / root)
        first, second = load_named(tmp_path / "1"), load_named(tmp_path / "2")
        assert contents(first) == contents(second) and first.fingerprint() == second.fingerprint()
        (tmp_path / "2" / "b" / "7.png").rename(tmp_path / "2" / "a" / "7b.png")
        assert load_named(tmp_path / "2").fingerprint() != first.fingerprint()

    @pytest.mark.parametrize("kind", ["files", "shards"])
    def test_fingerprint_is_of_the_contents(self, tmp_path, kind):
        """Two folders with the same names and other pictures differ."""

        def data(name, first, second):
            root = write_folder(tmp_path / name, {}, classnames="a")
            if kind == "files":
                write_folder(root, {"a/x.png": first, "a/y.png": second})
            else:
                write_shard(root / "0.tar", {"x.png": first, "x.cls": "0", "y.png": second, "y.cls": "0"})
            same_time(root)
            return load_named(root)

        first, copy = data("1", b"1", b"22"), data("2", b"1", b"22")
        assert first.fingerprint() == copy.fingerprint() and first.same_pictures(copy)
        assert data("3", b"1", b"333").fingerprint() != first.fingerprint()
        other = data("4", b"1", b"44")
        assert other.fingerprint() != first.fingerprint()  # the same sizes at the same times
        same_time(tmp_path / "2", 2_000_000_001)
        assert first.fingerprint() != copy.fingerprint()
        assert first.fingerprint(times=False) == copy.fingerprint(times=False) != other.fingerprint(times=False)
        assert first.same_pictures(copy) and not first.same_pictures(other)
        assert not first.same_pictures(first.subset(torch.tensor([0])))


class TestSplits:
    def divided(self, root):
        pictures = {f"{split}/{name}/x.png": f"{split} {name}".encode() for split in ("train", "val") for name in "ab"}
        return write_folder(root, pictures, classnames="an a\na b")

    def test_the_one_asked_for_or_val_where_there_is_no_test(self, tmp_path):
        root = self.divided(tmp_path)
        data = load_named(root, "train")
        assert data.split == "train" and contents(data) == [("an a", b"train a"), ("a b", b"train b")]
        assert contents(load_named(root, "val")) == [("an a", b"val a"), ("a b", b"val b")]
        assert load_named(root).split == "val"
        write_folder(root / "test", {"a/x.png": b"1", "b/x.png": b"2"})
        assert load_named(root).split == "test" and contents(load_named(root)) == [("an a", b"1"), ("a b", b"2")]

    def test_names_of_the_split_come_first(self, tmp_path):
        root = self.divided(tmp_path)
        write_folder(root / "val", {}, classnames="b\tother b\na\tother a", templates="the {}")
        assert load_named(root, "val").classnames == ["other a", "other b"]
        assert load_named(root, "val").templates == ["the {}"]
        assert load_named(root, "train").classnames == ["an a", "a b"]
        (root / "classnames.txt").unlink()
        assert load_named(root, "val").classnames == ["other a", "other b"]
        assert "has no classnames.txt" in message_of(f"folder={root}", split="train")

    def test_a_class_may_be_called_train(self, tmp_path):
        """As one of CIFAR-100's is: then not all of the folders are splits."""
        root = write_folder(tmp_path, {"train/x.png": b"1", "tram/x.png": b"2"}, classnames="train\ntram")
        assert contents(load_named(root)) == [("train", b"1"), ("tram", b"2")]

    def test_other_words_and_spellings(self, tmp_path):
        make_folders(tmp_path, ["Training", "validation", ".git"])
        splits = {split: place.folder.name for split, place in find_splits(tmp_path).items()}
        assert splits == {"train": "Training", "val": "validation"}
        (tmp_path / "val").mkdir()
        with pytest.raises(UserError, match="has both val and validation"):
            find_splits(tmp_path)

    def test_a_folder_called_after_its_split(self, tmp_path):
        root = self.divided(tmp_path)
        for split in ("train", "val"):
            write_folder(root / split, {}, classnames="an a\na b")
            assert contents(load_named(root / split, split)) == contents(load_named(root, split))
        message = message_of(f"folder={root / 'train'}", split="test")
        assert f"{root / 'train'} has no test split, only train;" in message

    def test_missing_ones(self, tmp_path):
        root = write_folder(tmp_path / "pets", {"a/x.png": b"1"}, classnames="a")
        write_shard(root.parent / "pets.tar", {"a/x.png": b"the archive next to what it held"})
        message = message_of(f"folder={root}", split="train")
        assert f"{root} has no train split, only test;" in message and str(root / "train") in message
        divided = self.divided(tmp_path / "divided")
        (divided / "test").mkdir()
        (divided / "val").rename(tmp_path / "elsewhere")
        assert "has no val split, only train and test" in message_of(f"folder={divided}", split="val")

    def test_splits_with_other_classes(self, tmp_path):
        """The names are by place: b would be called as c is in the other split."""
        pictures = dict.fromkeys(("train/a/x.png", "train/c/x.png", "val/a/x.png", "val/b/x.png"), b"")
        root = write_folder(tmp_path, pictures, classnames="a\nb")
        message = message_of(f"folder={root}", split="val")
        assert "1 of the 2 class folders of the val split" in message and "missing b; unknown: c" in message

    def test_shards(self, tmp_path):
        for folder in (tmp_path / "folders", tmp_path / "names"):
            write_folder(folder, {}, classnames="zero\none")
        write_shard(tmp_path / "folders" / "train" / "0.tar", {"a.png": b"1", "a.cls": "0"})
        write_shard(tmp_path / "folders" / "test" / "0.tar", {"a.png": b"2", "a.cls": "1"})
        assert contents(load_named(tmp_path / "folders", "train")) == [("zero", b"1")]
        assert contents(load_named(tmp_path / "folders")) == [("one", b"2")]
        root = tmp_path / "names"
        for name in ("set1k-train-0001", "set1k-train-0000", "set1k-validation-00"):
            write_shard(root / f"{name}.tar", {"a.png": name.encode(), "a.cls": "0"})
        data = load_named(root, "train")
        assert [content for _, content in contents(data)] == [b"set1k-train-0000", b"set1k-train-0001"]
        assert [content for _, content in contents(load_named(root))] == [b"set1k-validation-00"]
        assert load_named(root).split == "val"
        write_shard(root / "more.tar", {"a.png": b"", "a.cls": "0"})
        assert "but more.tar names none" in message_of(f"folder={root}")


class TestShards:
    def test_samples(self, tmp_path):
        write_folder(tmp_path, {"._00000.tar": b"resource fork"}, classnames="zero\none\ntwo", templates="{}")
        write_shard(tmp_path / "00000.tar", {"a.png": b"1", "a.cls": "2", "a.json": "", "b.cls": "0\n", "b.jpg": b"2"})
        write_shard(tmp_path / "00001.tar", {"x/a.cls": "1", "x/a.WEBP": b"333", "y/a.jpeg": b"4", "y/a.cls": "0"})
        data = load_named(tmp_path)
        assert contents(data) == [("two", b"1"), ("zero", b"2"), ("one", b"333"), ("zero", b"4")]
        assert (data.classnames, data.templates) == (["zero", "one", "two"], ["{}"])
        assert data.images.name(2) == f"{tmp_path / '00001.tar'}: x/a.WEBP"

    @pytest.mark.parametrize(
        "members,message",
        [
            ({"a.png": b"1", "a.cls": "3"}, "a.png is of class 3, but classnames.txt names 3 classes"),
            ({"a.png": b"1", "a.cls": "-1"}, "class -1, but classnames.txt names 3 classes"),
            ({"a.png": b"1", "a.cls": "cat"}, "a.cls must hold a class number, but holds b'cat'"),
            ({"a.png": b"1"}, "0.tar: a needs a .cls file and an image"),
            ({"a.raw": b"1", "a.cls": "0"}, "0.tar: a needs a .cls file and an image, but has .raw, .cls"),
            ({}, "hold no sample"),
        ],
    )
    def test_mistakes(self, tmp_path, members, message):
        write_folder(tmp_path, {}, classnames="zero\none\ntwo")
        write_shard(tmp_path / "0.tar", members)
        assert message in message_of(f"folder={tmp_path}")

    def test_not_a_tar_and_no_classnames(self, tmp_path, caplog):
        write_shard(tmp_path / "0.tar", {"a.png": b"1", "a.cls": "0"})
        assert "has no classnames.txt" in message_of(f"folder={tmp_path}")
        write_folder(tmp_path, {}, classnames="zero")
        assert len(load_named(tmp_path)) == 1 and caplog.text == ""
        write_folder(tmp_path, {"0.tar": b"\x1f\x8b something else" * 100})
        assert "0.tar is not a readable tar file" in message_of(f"folder={tmp_path}")

    # Each member takes 1024 bytes: cut between samples, in a header, between cls and image, and in the image.
    @pytest.mark.parametrize("size,readable", [(4096, 2), (4300, 2), (5120, 2), (5632, 2), (5640, 2), (6144, 3)])
    def test_cut_off_shard_gives_what_is_left_and_a_warning(self, tmp_path, caplog, size, readable):
        write_folder(tmp_path, {}, classnames="zero\none\ntwo")
        members = {f"{key}.{kind}": value for key in "abc" for kind, value in (("cls", "1"), ("png", b"1" * 300))}
        shard = write_shard(tmp_path / "0.tar", members)
        shard.write_bytes(shard.read_bytes()[:size])
        assert [label for label, _ in contents(load_named(tmp_path))] == ["one"] * readable
        assert "0.tar is cut off or damaged" in caplog.text


def test_clip_benchmark_reads_the_same(tmp_path):
    """Its own reader of the layout that it exports: pictures, classes, names and prompts."""
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    members = {}
    for i, kind in enumerate(("png", "jpg", "webp", "png", "jpeg")):
        format = {"jpg": "JPEG", "jpeg": "JPEG"}.get(kind, kind.upper())
        members |= {f"s{i:07d}.{kind}": encoded((50 * i, 9, 200), format), f"s{i:07d}.cls": str(i % 3)}
    write_shard(tmp_path / "test" / "0.tar", members)
    write_folder(tmp_path / "test", {}, nshards="1\n")
    prompts = {"zeroshot_classification_templates": "an emoji of {c}\na {c} thing\n"}
    write_folder(tmp_path, {}, classnames="red\ngreen\nblue\n", **prompts)
    theirs = builder.build_wds_dataset("x", lambda image: image.convert("RGB"), split="test", data_dir=str(tmp_path))
    ours = load_data(str(tmp_path))
    assert ours.classnames == theirs.classes
    assert [t.format("x") for t in ours.templates] == [t.format(c="x") for t in theirs.templates]
    pictures, labels = zip(*theirs, strict=True)
    assert ours.labels.tolist() == list(labels)
    assert all((np.asarray(ours.images.load(i)) == np.asarray(picture)).all() for i, picture in enumerate(pictures))


def test_pictures_are_rgb_and_broken_ones_raise_when_loaded(tmp_path):
    """Shards and files give the same; which kinds there are is the matter of test_image_decode.py."""
    whole = encoded((0, 255, 255, 0), "JPEG", "CMYK", size=(64, 64))
    kinds = {"cmyk.jpg": whole, "gray.jpeg": encoded(77, "JPEG", "L"), "half.jpg": whole[: len(whole) // 2]}
    kinds |= {"nothing.jpg": b"", "page.png": b"<html>"}
    files = load_named(write_folder(tmp_path / "f", {f"a/{k}": v for k, v in kinds.items()}, classnames="a"))
    write_folder(tmp_path / "s", {}, classnames="a")
    labels = {f"{name.split('.')[0]}.cls": "0" for name in kinds}
    write_shard(tmp_path / "s" / "0.tar", dict(sorted((kinds | labels).items())))
    for data in (files, load_named(tmp_path / "s"), files.subset(torch.arange(5))):
        for i, color in enumerate([(255, 0, 0), (77, 77, 77)]):
            image = data.images.load(i)
            assert image.mode == "RGB" and np.abs(np.asarray(image).astype(int) - color).max() <= 3
        for i in (2, 3, 4):
            with pytest.raises(Exception):  # noqa: B017  PIL raises almost anything
                data.images.load(i)
    assert files.images.name(4) == str(tmp_path / "f" / "a" / "page.png")
