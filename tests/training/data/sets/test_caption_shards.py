"""Shards as image sets with captions."""

import json

import numpy as np
import pytest

from .caption_files import contents, load, picture, refused
from .layout_files import write_shard


def test_shards_with_json(tmp_path):
    members = {
        "a.jpg": picture(1), "a.json": json.dumps({"captions": ["a 1", "a\n2"], "caption": "no"}), "a.txt": "no\nno",
        "x/b.PNG": picture(2, format="PNG"), "x/b.json": json.dumps({"caption": "b", "url": "u"}), "x/b.txt": "b",
        "c.webp": picture(3, format="WEBP"), "c.json": json.dumps({"caption": ["c 1", "c 2"]}),
        "d.jpeg": picture(4, mode="L"), "d.json": "{}", "d.txt": "d",
    }  # fmt: skip
    write_shard(tmp_path / "0.tar", members)
    write_shard(tmp_path / "1.tar", {"a.jpg": picture(5), "a.txt": "another a"})
    data = load(tmp_path)
    texts = [["a 1", "a 2"], ["b"], ["c 1", "c 2"], ["d"], ["another a"]]
    assert contents(data) == list(
        zip([*(f"{tmp_path}/0.tar: {n}" for n in ("a.jpg", "x/b.PNG", "c.webp", "d.jpeg")), f"{tmp_path}/1.tar: a.jpg"],
            texts, strict=True)
    )  # fmt: skip
    pixels = [np.asarray(data.images.load(i))[0, 0].tolist() for i in range(5)]
    assert pixels == [[n] * 3 for n in range(1, 6)]
    for spec in (tmp_path / "1.tar", f"{tmp_path}/{{1..1}}.tar"):
        assert load(spec).captions == ["another a"]


def test_what_a_txt_is(tmp_path):
    """Nothing is guessed: several lines are captions only where something says so."""
    folder = tmp_path / "test"
    write_shard(folder / "0.tar", {"a.jpg": picture(1), "a.txt": "one\n\ntwo \\n lines\n", "b.jpg": picture(2)})
    refused(folder, "0.tar: a.txt has 2 lines; say with --txt-captions")
    assert load(folder, txt="lines").captions == ["one", "two lines"]
    whole = load(folder, txt="whole")
    assert whole.captions == ["one two \\n lines"]
    assert whole.left_out == {"empty_captions": 0, "images_without_caption": 1}
    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    assert load(folder).captions == load(tmp_path).captions == ["one", "two lines"]
    assert load(tmp_path).split == "test"


def test_splits_in_folders_of_shards(tmp_path):
    for split in ("train", "test"):
        write_shard(tmp_path / split / "0.tar", {"a.jpg": picture(1), "a.txt": split})
    data = load(f"mine={tmp_path}", split="train+test")
    assert (data.captions, data.name, data.split) == (["train", "test"], "mine", "train+test")
    assert load(tmp_path / "train", split="train").captions == ["train"]
    refused(tmp_path / "train", "not divided into splits", split="val")
    refused(tmp_path, "has no split 'val', only test, train", split="val")
    refused(tmp_path, "leave it out", images=tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": "a caption"}, "a has a caption and no picture"),
        ({"a.jpg": b"", "a.json": "{"}, "0.tar: a.json cannot be read"),
        ({"a.jpg": b"", "a.json": '{"captions": [1]}'}, "1 is no text"),
        ({"a.jpg": b""}, "has no caption for any of 1 images"),
        ({"readme": "x"}, "has no caption for any of 0 images"),
    ],
)
def test_mistakes_in_shards(tmp_path, members, message):
    refused(write_shard(tmp_path / "0.tar", members), message)
