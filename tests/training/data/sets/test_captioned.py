"""Captioned image sets in the layouts that people have on disk; every file here is made by the test."""

import csv
import json
import os

import pytest
import torch

from training.errors import UserError

from .caption_files import contents, load, names, refused, write_images, write_json

SPLITS = ("train", "restval", "val", "test")


COCO_FILES = {
    split: f"COCO_{'train' if split == 'train' else 'val'}2014_{i:012d}.jpg" for i, split in enumerate(SPLITS)
}


def coco_karpathy(folder, images=True):
    """One image of each split, the test image with five captions."""
    items = [
        {
            "filepath": "train2014" if split == "train" else "val2014",
            "filename": file,
            "split": split,
            "sentences": [{"raw": f"{split} {n}", "tokens": [split]} for n in range(5 if split == "test" else 2)],
            "cocoid": 1,
        }
        for split, file in COCO_FILES.items()
    ]
    write_json(folder / "dataset_coco.json", {"dataset": "coco", "images": items})
    if images:
        write_images(folder, [f"{item['filepath']}/{item['filename']}" for item in items])
    return folder


@pytest.mark.parametrize("spec", ["", "dataset_coco.json"])
def test_karpathy(tmp_path, spec):
    path = coco_karpathy(tmp_path) / spec
    data = load(f"coco={path}")
    assert (data.name, data.split, len(data)) == ("coco", "test", 1)
    assert contents(data) == [(f"{tmp_path}/val2014/{COCO_FILES['test']}", [f"test {n}" for n in range(5)])]
    assert data.image_of.dtype == torch.int64 and data.image_of.tolist() == [0] * 5
    assert data.left_out == {"empty_captions": 0, "images_without_caption": 0}
    assert names(load(path, split="val"), tmp_path) == [f"val2014/{COCO_FILES['val']}"]
    training = load(path, split="train+restval")
    assert training.split == "train+restval" and training.name == "coco"
    assert names(training, tmp_path) == [f"train2014/{COCO_FILES['train']}", f"val2014/{COCO_FILES['restval']}"]
    refused(path, "has no split 'dev', only train, restval, val, test; choose with --split", split="dev")


def test_pictures_of_coco_2017(tmp_path):
    coco_karpathy(tmp_path, images=False)
    write_images(tmp_path, ["train2017/000000000001.jpg", "val2017/000000000003.jpg", "train2017/000000000000.jpg"])
    assert names(load(tmp_path), tmp_path) == ["val2017/000000000003.jpg"]
    training = load(tmp_path, split="train+restval")
    assert names(training, tmp_path) == ["train2017/000000000000.jpg", "train2017/000000000001.jpg"]


def test_pictures_elsewhere(tmp_path):
    captions = coco_karpathy(tmp_path / "captions", images=False) / "dataset_coco.json"
    write_images(tmp_path / "pictures", [f"val2014/{COCO_FILES['test']}"])
    refused(captions, "1 of the 1 images")
    assert names(load(captions, images=tmp_path / "pictures"), tmp_path) == [f"pictures/val2014/{COCO_FILES['test']}"]
    flat = tmp_path / "pictures" / "val2014"
    assert names(load(captions, images=flat), flat) == [COCO_FILES["test"]]
    refused(captions, "There is no folder", images=tmp_path / "nowhere")


def test_missing_pictures_are_counted_and_named(tmp_path):
    """Listed before anything is encoded; an empty folder and a picture under another name do not count."""
    items = [{"image": f"flickr30k-images/{n}.jpg", "caption": ["a", "b"]} for n in range(5)]
    write_json(tmp_path / "flickr30k_test.json", items)
    write_images(tmp_path, ["flickr30k-images/0.jpg", "flickr30k-images/3.jpg", "flickr30k-images/1.JPG"])
    message = f"3 of the 5 images of {tmp_path} are not in {tmp_path}, the first of them flickr30k-images/1.jpg"
    refused(tmp_path, message)


def test_same_file_name_in_several_folders(tmp_path):
    """Two pictures must not become one because a folder is left out of the search."""
    file = write_json(tmp_path / "set.json", [{"image": f"{n}/x.jpg", "caption": n} for n in "ab"])
    write_images(tmp_path, ["pictures/x.jpg"])
    refused(file, "2 of the 2 images", images=tmp_path / "pictures")
    write_images(tmp_path, ["a/x.jpg", "b/x.jpg"])
    assert contents(load(file)) == [(f"{tmp_path}/{n}/x.jpg", [n]) for n in "ab"]


def test_two_sets_in_one_folder(tmp_path):
    for name in ("coco", "flickr30k"):
        items = [
            {"filename": f"{name}.jpg", "split": "test", "sentences": [{"raw": name}, {"tokens": ["two", "dogs"]}]}
        ]
        write_json(tmp_path / f"dataset_{name}.json", {"images": items})
        write_images(tmp_path / "images", [f"{name}.jpg"])
    refused(tmp_path, "holds the captions of coco and flickr30k; say which with --data coco=...")
    assert load(f"flickr30k={tmp_path}").captions == ["flickr30k", "two dogs"]  # tokens where there is no raw


def albef(folder):
    """One caption an entry in the training split, where the pictures come again, not in one piece."""
    one, two, three = "val2014/COCO_val2014_1.jpg", "val2014/COCO_val2014_2.jpg", "train2014/COCO_train2014_3.jpg"
    write_images(folder, [one, two, three])
    write_json(folder / "coco_test.json", [{"image": two, "caption": ["2", "2 b"]}, {"image": one, "caption": ["1"]}])
    train = [(three, "3"), (one, "1"), (three, "3 again")]
    write_json(folder / "coco_train.json", [{"caption": c, "image": i, "image_id": "coco_3"} for i, c in train])
    return folder


def test_albef_lists(tmp_path):
    data = load(f"coco={albef(tmp_path)}")
    assert (data.name, data.split) == ("coco", "test")
    assert [texts for _, texts in contents(data)] == [["2", "2 b"], ["1"]]
    assert names(data, tmp_path) == ["val2014/COCO_val2014_2.jpg", "val2014/COCO_val2014_1.jpg"]
    assert data.image_of.tolist() == [0, 0, 1]
    refused(tmp_path, "has no split 'val', only test, train", split="val")
    data = load(tmp_path, split="train")  # repeated images are grouped
    assert [texts for _, texts in contents(data)] == [["3", "3 again"], ["1"]]
    assert names(data, tmp_path) == ["train2014/COCO_train2014_3.jpg", "val2014/COCO_val2014_1.jpg"]


def test_a_list_by_its_name(tmp_path):
    data = load(albef(tmp_path) / "coco_test.json")
    assert (data.name, data.split) == ("coco", "test")
    refused(tmp_path / "coco_test.json", "holds the split test: there is no 'val' in it", split="val")
    (tmp_path / "coco_test.json").rename(tmp_path / "mine.json")
    data = load(tmp_path / "mine.json")
    assert (data.name, data.split) == ("mine", "all")
    refused(tmp_path / "mine.json", "is not divided into splits", split="val")


@pytest.mark.parametrize("folder", ["val2017", "images/val2017"])
def test_coco_annotations(tmp_path, folder, caplog):
    images = [{"id": n, "file_name": f"{n:012d}.jpg", "coco_url": "u"} for n in (139, 7, 285)]
    captions = [{"image_id": n, "id": i, "caption": f"of {n}, {i}"} for i, n in enumerate([7, 139, 7, 139, 139])]
    path = tmp_path / "annotations" / "captions_val2017.json"
    file = write_json(path, {"info": {}, "licenses": [], "images": images, "annotations": captions})
    write_images(tmp_path / folder, [f"{n:012d}.jpg" for n in (139, 7)])
    for data in (load(f"coco={tmp_path}", split="val2017"), load(file)):
        assert (data.name, data.split) == ("coco", "val2017")
        assert contents(data) == [
            (f"{tmp_path}/{folder}/000000000139.jpg", ["of 139, 1", "of 139, 3", "of 139, 4"]),
            (f"{tmp_path}/{folder}/000000000007.jpg", ["of 7, 0", "of 7, 2"]),
        ]
    assert "1 images without" in caplog.text
    refused(tmp_path, "has no split 'test', only val2017")


def test_files_of_clip_benchmark(tmp_path):
    coco = {
        "images": [{"id": 1, "file_name": "COCO_val2014_000000000001.jpg"}],
        "annotations": [{"image_id": 1, "caption": "c"}],
    }
    write_json(tmp_path / "coco" / "coco_test_karpathy.json", coco)
    write_images(tmp_path / "coco" / "val2014", ["COCO_val2014_000000000001.jpg"])
    assert names(load(tmp_path / "coco"), tmp_path) == ["coco/val2014/COCO_val2014_000000000001.jpg"]

    lines = 'image,caption\n10.jpg,A man, smiling , waves .\n9.jpg,"quoted", not closed\n10.jpg,Again .\n'
    (tmp_path / "flickr30k_test_karpathy.txt").write_text(lines)
    write_images(tmp_path, ["9.jpg", "10.jpg"])
    data = load(f"flickr30k={tmp_path}")
    assert [texts for _, texts in contents(data)] == [["A man, smiling , waves .", "Again ."], ['"quoted", not closed']]
    assert names(data, tmp_path) == ["10.jpg", "9.jpg"]


TWO = [["a 1", "a, 2"], ["b"]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("set.json", {"a.jpg": ["a 1", "a, 2"], "/export/coco/b.jpg": "b"}),  # a path of another machine
        ("set.json", [{"image": "a.jpg", "captions": ["a 1", "a, 2"]}, {"image": "b.jpg", "captions": "b"}]),
        ("set.jsonl", [{"image": "a.jpg", "caption": ["a 1", "a, 2"]}, {"image": "b.jpg", "captions": ["b"]}]),
        ("set.token", "a.jpg#0\ta 1\na.jpg#1\ta, 2\nb.jpg#0\tb\n"),
        ("Flickr8k.token.txt", "a.jpg#0\ta 1\r\na.jpg#1\ta, 2\r\nb.jpg#0\tb\r\n"),
        ("captions.txt", 'image,caption\na.jpg,a 1\na.jpg,"a, 2"\nb.jpg,b\n'),
        ("captions.txt", "image,caption\na.jpg,a 1\na.jpg,a, 2\nb.jpg,b\n"),
        ("captions.txt", 'image_name,comment_number,comment\na.jpg,0,a 1\na.jpg,1,"a, 2"\nb.jpg,0,b\n'),
        ("results.csv", "image_name| comment_number| comment\na.jpg| 0| a 1\na.jpg| 1   a, 2\nb.jpg| 0| b\n"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("folder", ["", "images", "Images", "Flicker8k_Dataset", "flickr30k_images"])
def test_other_forms(tmp_path, name, content, folder):
    write_images(tmp_path / folder, ["a.jpg", "b.jpg"])
    lines = "\n".join(map(json.dumps, content)) if name.endswith("jsonl") else json.dumps(content)
    (tmp_path / name).write_text(content if isinstance(content, str) else lines)
    data = load(tmp_path / name)
    assert [texts for _, texts in contents(data)] == TWO and data.split == "all"
    assert names(data, tmp_path / folder) == ["a.jpg", "b.jpg"]
    if name in ("captions.txt", "Flickr8k.token.txt", "results.csv"):
        assert load(f"flickr8k={tmp_path}").captions == data.captions
        write_json(tmp_path / "flickr8k_test.json", [{"image": "a.jpg", "caption": "x"}])  # says more, so comes first
        assert load(tmp_path).captions == ["x"]


@pytest.mark.parametrize(
    ("line", "caption"),
    [
        ('1.jpg,"Two dogs, ""Max"" and one more, run"', 'Two dogs, "Max" and one more, run'),
        ('1.jpg,"quoted", not closed', '"quoted", not closed'),
        ('1.jpg,"A" is no "B"', '"A" is no "B"'),
        ('1.jpg,He said: "no", and went', 'He said: "no", and went'),
    ],
)
@pytest.mark.parametrize("others", ["2.jpg,plain", "2.jpg,a, b"])
def test_quotes_in_lines(tmp_path, line, caption, others):
    """A field that is quoted as a whole is CSV; all other quotes are the caption's own."""
    write_images(tmp_path, ["1.jpg", "2.jpg"])
    (tmp_path / "captions.txt").write_text(f"image,caption\n{line}\n{others}\n")
    assert load(tmp_path / "captions.txt").captions == [caption, others[6:]]


def test_splits_of_flickr8k(tmp_path):
    write_images(tmp_path / "Flicker8k_Dataset", ["a.jpg", "b.jpg", "c.jpg"])
    (tmp_path / "Flickr8k.token.txt").write_text("".join(f"{n}.jpg#{k}\t{n} {k}\n" for n in "abc" for k in range(2)))
    for word, image in (("train", "a"), ("dev", "b"), ("test", "c")):
        (tmp_path / f"Flickr_8k.{word}Images.txt").write_text(f"{image}.jpg\n")
    for spec in (tmp_path, tmp_path / "Flickr8k.token.txt"):
        assert (load(spec).captions, load(spec, split="val").captions) == (["c 0", "c 1"], ["b 0", "b 1"])


def albef_of(folder, captions, **options):
    """A set with one image for each entry of `captions`."""
    write_images(folder, [f"{n}.jpg" for n in range(len(captions))])
    entries = [{"image": f"{n}.jpg", "caption": texts} for n, texts in enumerate(captions)]
    return load(write_json(folder / "set.json", entries), **options)


def test_whitespace_and_unicode(tmp_path):
    texts = ["Ein Hund läuft über die Straße", "一只狗 在跑", "🐕 run"]
    data = albef_of(tmp_path, [["A dog\nruns.", " two\r\n\n  lines\t", "no\u00a0break\u2028line"], "one\n", texts])
    assert data.captions == ["A dog runs.", "two lines", "no break line", "one", *texts]
    assert data.image_of.tolist() == [0, 0, 0, 1, 2, 2, 2]
    data = albef_of(tmp_path, [["a dog", "a dog", "A  Dog"], ["a cat", "a dog"], ["caf\u00e9"], ["Cafe\u0301"]])
    assert data.captions == ["a dog", "a dog", "A Dog", "a cat", "a dog", "caf\u00e9", "Cafe\u0301"]  # as they are
    assert data.same_text().tolist() == [0, 0, 0, 1, 0, 2, 2]


def test_empty_captions_and_images_without(tmp_path, caplog):
    data = albef_of(tmp_path, [["a", "", " \n"], [], [""], ["b"]])
    assert data.captions == ["a", "b"]
    assert names(data, tmp_path) == ["0.jpg", "3.jpg"]
    assert data.left_out == {"empty_captions": 3, "images_without_caption": 2}
    assert "left out 3 empty captions and 2 images without one" in caplog.text
    assert albef_of(tmp_path, [["", "a", "b", "c"], ["d"]], per_image=2).captions == ["a", "b", "d"]
    with pytest.raises(UserError, match="has no caption for any of 2 images"):
        albef_of(tmp_path, [[""], []])


def test_fingerprint(tmp_path):
    def fingerprint(folder, captions):
        data = albef_of(tmp_path / folder, captions)
        for path in (tmp_path / folder).iterdir():
            os.utime(path, ns=(2_000_000_000, 2_000_000_000))
        return data.fingerprint()

    first = fingerprint("a", [["a", "b"], ["c"]])
    assert first == fingerprint("b", [["a", "b"], ["c"]])
    for other in ([["a"], ["b", "c"]], [["a", "b"], ["d"]], [["b", "a"], ["c"]], [["a", "b"], ["c"], ["d"]]):
        assert fingerprint("c", other) != first
    os.utime(tmp_path / "b" / "0.jpg", ns=(2_000_000_001, 2_000_000_001))  # another picture under the same name
    assert load(tmp_path / "b" / "set.json").fingerprint() != first


@pytest.mark.parametrize(("name", "separator"), [("table.csv", "\t"), ("table.csv", ","), ("table.tsv", "\t")])
def test_csv(tmp_path, name, separator):
    write_images(tmp_path, ["pictures/a.jpg", "pictures/b.jpg"])
    rows = [("pictures/b.jpg", "b, first"), ("pictures/a.jpg", 'an "a"\nwith a break'), ("pictures/b.jpg", "b again")]
    rows.append((str(tmp_path / "pictures" / "a.jpg"), ""))
    with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows([("filepath", "title"), *rows])
    data = load(tmp_path / name)
    assert [texts for _, texts in contents(data)] == [["b, first", "b again"], ['an "a" with a break']]
    assert names(data, tmp_path) == ["pictures/b.jpg", "pictures/a.jpg"]
    assert (data.name, data.split, data.left_out["empty_captions"]) == ("table", "all", 1)
    refused(tmp_path / name, "has no column 'text'", csv_caption_column="text")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ('{"a": 1}', "'images' is missing"),
        ("3", "'images' is missing in 3"),
        ('[{"image": "x.jpg", "text": "x"}]', "'caption' is missing"),
        ('[{"image": "x.jpg", "caption": 3}]', "3 is no text"),
        ('{"images": [{"filename": "x", "split": "test"}]}', "'sentences' is missing"),
        ('{"images": [{"filename": "x", "split": "test", "sentences": [{"sentid": 1}]}]}', "'raw' is missing"),
        ('{"images": [{"id": 1, "file_name": "x"}], "annotations": [{"bbox": 1}]}', "'image_id' is missing"),
        ('{"images": [], "annotations": [{"image_id": 1, "caption": ""}]}', "a caption for image 1, but no such image"),
        ('{"images": [{"id": 1, "file_name": "x"}], "annotations": []}', "has no caption for any of 1 images"),
    ],
)
def test_files_of_unknown_shape(tmp_path, content, message):
    (tmp_path / "set.json").write_text(content)
    refused(tmp_path / "set.json", message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg,the first\na.jpg,the second\n", "its first line is 'a.jpg,the first', not 'image,caption'"),
        ("image_name,comment_number,comment\na.jpg,0,a, b\n", "a row without quotes around its commas"),
        ("", "its first line is ''"),
    ],
)
def test_text_whose_columns_are_not_known(tmp_path, text, message):
    """The first line would be lost, or a number get into the captions."""
    (tmp_path / "captions.txt").write_text(text)
    refused(tmp_path / "captions.txt", message)


def test_nothing_there(tmp_path):
    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path / "nowhere.json", "There is no file")
    refused(tmp_path / "nowhere.tar", "do not exist")
    refused(tmp_path / "nowhere.csv", "cannot be read (No such file")
    (tmp_path / "notes.md").write_text("")
    refused(tmp_path / "notes.md", "is no folder, JSON, CSV, tar or Arrow file")
    refused(tmp_path, "holds no captions")
    (tmp_path / "set.json").write_bytes('["façade"]'.encode("latin-1"))
    refused(tmp_path / "set.json", "is not UTF-8")
