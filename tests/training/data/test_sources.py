"""What is read from shards, tables and pictures, what is left out of them, and what is refused from the start."""

import logging
from collections import Counter

import numpy
import pytest
import torch
from PIL import Image

from training.data import DataReport, build_val_data
from training.data.images import load_rgb
from training.data.pixels import picture_to_tensor, stack, to_device
from training.data.sizes import count_shard
from training.errors import UserError

from ..data_helpers import (
    BROKEN_IMAGE,
    DAMAGE,
    NoisyTransform,
    assert_same_batches,
    data_args,
    encode,
    key_of,
    keys,
    sample,
    train_data,
    val_data,
    write_csv,
    write_damaged_shards,
    write_shard,
    write_shards,
)  # fmt: skip
from .sets import layout_files

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


# Pictures


def palette() -> Image.Image:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 40, 50, 60])
    return image


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (Image.new("RGBA", (2, 2), (10, 20, 30, 0)), {}, (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (10, 20, 30, 0)), {"format": "webp", "lossless": True}, (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (10, 20, 30, 255)), {}, (10, 20, 30)),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 102)), {}, (153, 153, 153)),
        (Image.new("LA", (2, 2), (7, 0)), {}, (255, 255, 255)),
        (Image.new("RGB", (2, 2), (1, 2, 3)), {"transparency": (1, 2, 3)}, (255, 255, 255)),
        (palette(), {}, (40, 50, 60)),
        (palette(), {"transparency": 1}, (255, 255, 255)),
        (Image.new("L", (2, 2), 77), {}, (77, 77, 77)),
        (Image.new("1", (2, 2), 1), {}, (255, 255, 255)),
        (Image.fromarray(numpy.full((2, 2), 0x80FF, dtype=numpy.uint16)), {}, (128, 128, 128)),
        (Image.fromarray(numpy.full((2, 2), 77, dtype=numpy.uint16)), {}, (77, 77, 77)),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {"format": "jpeg", "quality": 100}, (255, 0, 0)),
    ],
)
def test_pictures_become_rgb_on_white(image, options, expected):
    loaded = load_rgb(layout_files.encode(image, **{"format": "png"} | options))
    assert (loaded.mode, loaded.size) == ("RGB", image.size)
    assert loaded.getpixel((1, 1)) == expected


# Shards


def test_a_shard_is_read_in_its_order(tmp_path):
    files = {
        "00/a": {"json": b"{}", "png": encode(1, "png"), "txt": "été".encode()},
        "00/b": {"txt": b"text first", "JPEG": encode(2)},
        "c": {"webp": encode(3, "webp"), "txt": b"caption", "seg.png": b"no picture of ours"},
    }
    write_shard(tmp_path / "x.tar", files)
    (batch,) = val_data(str(tmp_path / "x.tar"))
    assert batch["key"] == ["00/a", "00/b", "c"]
    assert batch["image"].pixels.shape == (3, 3, 4, 4) and batch["image"].pixels.dtype == torch.float32
    assert batch["text"].dtype == torch.long
    assert bytes(batch["text"][0].tolist()).decode().strip() == "été"


def test_samples_that_cannot_be_used_are_counted_with_examples(tmp_path):
    data = val_data(write_damaged_shards(tmp_path))
    good = {0: range(7), 1: (0, 1, 3), 2: range(7), 3: range(4), 4: (1,), 5: range(7)}
    assert keys(data) == [key_of(shard, n) for shard, numbers in good.items() for n in numbers]
    report = data.report()
    assert report.skipped == DAMAGE
    url = f"{tmp_path}/00001.tar"
    assert f"{url}: {key_of(1, 2)}: not an image" in report.examples
    assert f"{url}: {key_of(1, 4)}: no caption" in report.examples
    assert len(report.examples) == 5
    assert report.sentence().startswith("Skipped or damaged in the data: 1 x broken shard, 1 x empty caption, 1 x no ")

    list(data)
    assert data.report() == report  # of one iteration, not of all


def test_training_reports_by_epoch(tmp_path):
    data = train_data(write_damaged_shards(tmp_path), train_num_samples=29, batch_size=29)  # 29 are good
    for epoch in range(2):
        batches = data.epoch(epoch)
        assert data.report().skipped == {}
        assert len(set(keys(batches))) == 29
        assert data.report().skipped.items() >= DAMAGE.items() - {("unreadable image", 2)}


# The plan


@pytest.mark.parametrize("workers, world_size, batches", [(0, 1, 9), (1, 1, 9), (2, 1, 10), (2, 3, 4), (3, 2, 6)])
def test_batches_are_rounded_up_to_equally_many_for_each_worker(workers, world_size, batches, tmp_path):
    data = train_data(write_shards(tmp_path, [6] * 6), batch_size=4, workers=workers, world_size=world_size)
    assert data.num_batches == batches
    assert data.num_samples == batches * 4 * world_size
    assert f"{data.num_samples} samples per epoch" in data.describe()
    assert f"{data.num_samples - 36} more than that" in data.describe()
    assert len(list(data.epoch(0))) == batches


# Tables


def test_csv_paths_are_tried_as_given_then_beside_the_table(tmp_path, monkeypatch):
    path = write_csv(tmp_path / "here", 4)
    data = train_data(path)
    beside = list(data.epoch(0))
    assert beside[0]["image"].pixels.shape == (4, 3, 4, 4) and data.report().skipped == {}
    write_csv(tmp_path / "there", 4, broken=(0, 1, 2, 3))
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(UserError, match="not one usable sample"):
        list(data.epoch(0))
    monkeypatch.chdir(tmp_path / "here")
    assert_same_batches(list(data.epoch(0)), beside)


@pytest.mark.parametrize("separator", [",", "\t"])
def test_csv_columns_separator_and_missing_files(tmp_path, separator):
    """A comma table need not be told: the default is a tab, as in OpenCLIP, and its header has none."""
    write_csv(tmp_path, 5)
    lines = ["text,id,file", *(f"NA,{n},{tmp_path}/images/{n:03d}.png" for n in range(5)), "gone,5,gone.png"]
    (tmp_path / "t.txt").write_text("\n".join(lines))
    flags = {"csv_separator": separator, "csv_img_key": "file", "csv_caption_key": "text", "dataset_type": "csv"}
    data = train_data(str(tmp_path / "t.txt"), batch_size=3, **flags)
    batches = list(data.epoch(0))
    assert len(batches) == data.num_batches == 2
    assert all(bytes(text.tolist()).decode().strip() == "NA" for batch in batches for text in batch["text"])
    assert set(data.report().skipped) == {"unreadable image"}
    assert "gone.png" in data.report().examples[0]


def test_csv_rows_without_caption_are_left_out_and_counted(tmp_path, caplog):
    path = write_csv(tmp_path, 10)
    lines = (tmp_path / "table.csv").read_text().splitlines()
    lines[3], lines[5] = lines[3].split("\t")[0] + "\t", lines[5].split("\t")[0] + "\t  "
    (tmp_path / "table.csv").write_text("\n".join(lines))
    caplog.set_level(logging.INFO, "training.data")
    data = train_data(path)
    assert caplog.messages == [f"{path}: 2 of 10 rows have no caption and are left out."]
    assert data.num_batches == 2
    assert sorted(keys(data.epoch(0))) == [f"images/{n:03d}.png" for n in range(10) if n not in (2, 4)]
    assert "8 rows (2 more have no caption)" in data.describe()
    assert "0 of them, others in each epoch, are left out" in data.describe()
    assert torch.cat([batch["index"] for batch in val_data(path)]).tolist() == [0, 1, 3, 5, 6, 7, 8, 9]


def test_synthetic_samples():
    data = train_data(None, dataset_type="synthetic", train_num_samples=20)
    batches = list(data.epoch(0))
    assert (data.num_batches, data.num_samples, len(set(keys(batches)))) == (5, 20, 20)
    assert len({tuple(text.tolist()) for batch in batches for text in batch["text"]}) > 5
    with pytest.raises(UserError, match="gone.csv"):  # what is validated on is never made up
        val_data("gone.csv", dataset_type="synthetic", train_num_samples=20)


def test_text_of_a_table_that_would_get_lost_is_refused_with_its_line(tmp_path):
    write_csv(tmp_path, 8)
    lines = (tmp_path / "table.csv").read_text().splitlines()

    def build(*changed, separator="\t"):
        changes = dict(changed)
        table = [changes.get(number, line) for number, line in enumerate(lines, start=1)]
        (tmp_path / "t.csv").write_text("\n".join(table).replace("\t", separator))
        return train_data(f"{tmp_path}/t.csv", csv_separator=separator)

    for separator in "\t,":
        for last in ('images/006.png\t"six', 'images/006.png\tsix"'):
            with pytest.raises(UserError, match="line 4 of .*t.csv has a quotation mark that takes in all up to"):
                build((4, 'images/002.png\t"two'), (8, last), separator=separator)
        with pytest.raises(UserError, match="line 5 of .*t.csv has more columns than the header"):
            build((5, "images/003.png\ta man\tand a horse"), separator=separator)
        two, man = (4, 'images/002.png\t"Two" of them'), (5, 'images/003.png\t"a man,\nand ""a horse"""\t')
        good = build(two, man, separator=separator)
        captions = [good.source.rows[row].fields["caption"] for row in (2, 3)]
        assert len(good.source.rows) == 8 and captions == ["Two of them", 'a man,\nand "a horse"']


def test_pictures_of_a_table_are_tried_before_any_work(tmp_path):
    path = write_csv(tmp_path, 60, broken=tuple(range(59)))
    with pytest.raises(UserError, match=r"not one picture of .*.csv can be read \(20 x unreadable image .* folder of"):
        train_data(path)
    write_csv(tmp_path, 60, broken=tuple(range(57)))
    assert val_data(path).num_samples == 60


def test_text_that_is_not_utf8_is_counted_with_an_example(tmp_path):
    captions = ["café".encode("latin-1"), "café \ufffd".encode(), b"\xef\xbb\xbfplain"]
    path = write_shard(tmp_path / "x.tar", {str(n): {"jpg": encode(n), "txt": text} for n, text in enumerate(captions)})
    data = val_data(str(path))
    (batch,) = data
    assert bytes(batch["text"][2].tolist()).strip() == b"plain"
    assert data.report() == DataReport({"text that is not UTF-8": 1}, [f"{path}: 0.txt: caf\ufffd"])
    assert count_shard(str(path))[:2] == (3, {"text that is not UTF-8": 1})


def test_endings_with_two_parts_by_flag(tmp_path):
    samples = {str(n): {"input.JPG": encode(n), "outputs.txt": b"x", "jpg": BROKEN_IMAGE} for n in range(2)}
    path = str(write_shard(tmp_path / "x.tar", samples))
    data = val_data(path, shard_img_key=".input.jpg", shard_caption_key="outputs.txt")
    assert keys(data) == ["0", "1"] and data.report().skipped == {}


# Validation


@pytest.mark.parametrize("sizes", [[5, 3], [9], [1, 2, 3, 4, 5, 6, 7]])
@pytest.mark.parametrize("world_size, workers", [(1, 0), (2, 0), (1, 3), (3, 2)])
def test_validation_gives_every_sample_exactly_once(sizes, world_size, workers, tmp_path):
    pattern = write_shards(tmp_path, sizes)
    ranks = [
        val_data(pattern, rank=rank, world_size=world_size, workers=workers, batch_size=2) for rank in range(world_size)
    ]
    batches = [batch for data in ranks for batch in data]
    expected = {key_of(shard, n): (shard << 32) + n for shard, size in enumerate(sizes) for n in range(size)}
    indices = torch.cat([batch["index"] for batch in batches])
    assert indices.dtype == torch.long
    assert len(indices) == len(expected)
    assert dict(zip(keys(batches), indices.tolist(), strict=True)) == expected
    assert {data.num_samples for data in ranks} == {sum(sizes)}


@pytest.mark.parametrize("world_size, workers", [(1, 0), (2, 2), (5, 2)])
def test_validation_counts_what_is_skipped_once_over_all_readers(world_size, workers, tmp_path):
    pattern = write_damaged_shards(tmp_path)
    ranks = [val_data(pattern, rank=rank, world_size=world_size, workers=workers) for rank in range(world_size)]
    seen = [key for data in ranks for key in keys(data)]
    assert len(seen) == len(set(seen)) == 29
    assert sum((Counter(data.report().skipped) for data in ranks), Counter()) == DAMAGE


@pytest.mark.parametrize("world_size, workers", [(1, 0), (2, 3), (3, 1)])
def test_validation_on_a_table(world_size, workers, tmp_path):
    path = write_csv(tmp_path, 10, broken=(9,))
    ranks = [val_data(path, rank=rank, world_size=world_size, workers=workers) for rank in range(world_size)]
    batches = [batch for data in ranks for batch in data]
    found = dict(zip(torch.cat([batch["index"] for batch in batches]).tolist(), keys(batches), strict=True))
    assert found == {n: f"images/{n:03d}.png" for n in range(9)}
    assert len(keys(batches)) == 9
    assert sum(data.report().skipped.get("unreadable image", 0) for data in ranks) == 1
    assert ranks[0].num_samples == 10


def test_validation_size_may_be_unknown(tmp_path):
    pattern = write_shards(tmp_path, [3], info=False)
    assert val_data(pattern).num_samples is None
    assert val_data(pattern, val_num_samples=3).num_samples == 3
    (tmp_path / "sizes.json").write_text("{}")
    assert val_data(pattern).num_samples is None


# What is refused


REFUSED = {
    "{t}/{{00000..00004}}.tar": r"2 of the 5 shards .* in {flag} .*/00003.tar: correct",
    "{t}/nowhere/x.tar": r"1 of the 1 shards .*/nowhere/x.tar: correct",
    "": "{flag} '' does not end in .tar",
    "{t}/00000.tar::": "A source in {flag} .* is empty: remove",
    "{t}/00000.tar:: ::{t}/00000.tar": "A source in {flag} .* is empty: remove",
    "{t}/{{00000..00004.tar": "braces of .* in {flag}",
    "folder/": "{flag} .*--dataset-type",
    "data.parquet": "{flag} .*--dataset-type",
    "nowhere.csv": r"{flag}: nowhere.csv cannot be read \(No such file or directory\)",
    "{t}/empty.csv": "{flag}: .*empty.csv cannot be read .*; give one table with a header",
    "{t}/odd.csv": "{flag}: .*odd.csv cannot be read",
    "a.csv::b.csv": "cannot be read .*; give one table with a header",
    "{t}/latin.csv": "{flag}: .*latin.csv cannot be read .*; save it as UTF-8",
    "{t}/twice.csv": "{flag}: .*twice.csv has more than one column 'title'",
    "{t}/dots.tar": "has not one usable sample .no names that make samples; its files are .hidden, picture, ...",
    "{t}/none.tar": "has not one usable sample .it is empty",
    "{t}/comma.csv": r"no column 'title', only \['filepath', 'caption'\].*--csv-separator \(now ','\)",
    "{t}/column.csv": r"no column 'title', only \['filepath', 'caption'\].*--csv-caption-key",
    "{t}/blank.csv": "Not one of the 3 rows",
}


@pytest.mark.parametrize("build, flag", [(train_data, "--train-data"), (val_data, "--val-data")])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_work(name, build, flag, tmp_path):
    write_shards(tmp_path, [2] * 3)
    (tmp_path / "empty.csv").touch()
    (tmp_path / "odd.csv").write_text('filepath\ttitle\na\t"b\n')
    (tmp_path / "comma.csv").write_text("filepath,caption\na.png,b\n")
    (tmp_path / "column.csv").write_text("filepath\tcaption\na.png\tb\n")
    (tmp_path / "latin.csv").write_bytes("filepath,title\na.png,café\n".encode("latin-1"))
    (tmp_path / "twice.csv").write_text("filepath,title,title\na.png,b,c\n")
    layout_files.write_shard(tmp_path / "dots.tar", {".hidden": b"x", "picture": b"x"})
    layout_files.write_shard(tmp_path / "none.tar", {})
    (tmp_path / "blank.csv").write_text("filepath\ttitle\na.png\t\nb.png\t \nc.png\n")
    with pytest.raises(UserError, match=REFUSED[name].replace("{flag}", flag)):
        build(name.replace("{t}", str(tmp_path)).replace("{{", "{").replace("}}", "}"))


def test_fewer_shards_than_readers(tmp_path):
    pattern = write_shards(tmp_path, [8] * 5)
    train_data(pattern, workers=5)
    readers = r"5 shards .* 3 workers on each of 2 ranks \(6 readers\): use fewer --workers, add --dataset-resampled"
    with pytest.raises(UserError, match=readers):
        train_data(pattern, workers=3, world_size=2)
    train_data(pattern, workers=3, world_size=2, dataset_resampled=True)


@pytest.mark.parametrize(
    "flags, problem",
    [
        ({"train_data_upsampling_factors": "1::2"}, "needs --dataset-resampled"),
        ({"dataset_type": "synthetic"}, "--train-num-samples"),
        ({"dataset_type": "csv", "world_size": 2}, "only 7 usable samples.*2 ranks.*--batch-size"),
    ],
)
def test_refused_flags(flags, problem, tmp_path):
    with pytest.raises(UserError, match=problem):
        train_data(write_csv(tmp_path, 7), **flags)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resampled", [False, True])
def test_nothing_usable_ends_in_one_sentence(workers, resampled, tmp_path):
    flags = {"train_num_samples": 8, "workers": workers, "dataset_resampled": resampled}
    data = train_data(write_shards(tmp_path, [1, 1]), **flags)
    for shard in range(2):
        write_shard(tmp_path / f"0000{shard}.tar", {"a": {"jpg": BROKEN_IMAGE, "txt": b"x"}, "b": {"jpg": encode(0)}})
    with pytest.raises(UserError, match="^Worker .* not one usable sample .* x no caption, .* x unreadable image"):
        list(data.epoch(0))


def test_data_that_become_unusable_during_an_epoch(tmp_path):
    pattern = write_shards(tmp_path, [8])
    data, resumed = (train_data(pattern, train_num_samples=40) for _ in range(2))
    batches = data.epoch(0)
    next(batches)
    resumed.load_state_dict(data.state_dict() | {"places": []})  # with one it would be seen that the shard has changed
    write_shard(tmp_path / "00000.tar", {"a": {"jpg": encode(0)}})
    with pytest.raises(UserError, match="not one usable sample"):
        list(resumed.epoch(0))
    (tmp_path / "00000.tar").unlink()
    assert len(next(batches)["key"]) == 4  # was in the shuffle buffer
    with pytest.raises(UserError, match="No such file or directory"):
        list(batches)


# Samples of other kinds


class Question:
    """Two pictures and a question, which is asked of both."""

    def encode(self, sample):
        return [picture_to_tensor(image, NoisyTransform()) for image in sample.images], sample.fields["question"]

    def collate(self, encoded):
        return {"pictures": [stack(images, NoisyTransform) for images, _ in encoded], "asked": [q for _, q in encoded]}


def read_question(key, files):
    if "q.txt" not in files:
        return "no question"
    return (files["left.jpg"], files["right.jpg"]), {"question": files["q.txt"].decode()}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_task_says_what_a_sample_is(workers, tmp_path):
    files = {"left.jpg": encode(1), "right.jpg": encode(2), "q.txt": b"alike?"}
    samples = {"a": files, "b": files | {"right.jpg": BROKEN_IMAGE}, "c": {"left.jpg": encode(1)}, "d": files}
    args = data_args(val_data=str(write_shard(tmp_path / "x.tar", samples)), workers=workers)
    data = build_val_data(args, Question(), rank=0, world_size=1, read=read_question)
    (batch,) = data
    assert batch["key"] == ["a", "d"] and batch["asked"] == ["alike?"] * 2 and batch["index"].tolist() == [0, 3]
    assert to_device(batch, torch.device("cpu"))["pictures"][1].shape == (2, 3, 4, 4)
    assert data.report().skipped == {"unreadable image": 1, "no question": 1}
    write_shard(tmp_path / "x.tar", {"a": sample(1)})
    with pytest.raises(UserError, match=r"not one usable sample \(1 x no question .*; its files are a.jpg, .*: give"):
        build_val_data(args, Question(), rank=0, world_size=1, read=read_question)
