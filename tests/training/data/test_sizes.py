"""How many samples there are: what is noted beside the shards, what a count finds, and the plan of an epoch."""

import json
import os
import re

import pytest

from training.data.sizes import changed_shards, read_sizes, write_sizes
from training.errors import UserError

from ..data_helpers import sample, train_data, val_data, write_shard, write_shards


def write_stats(folder, sizes):
    """As img2dataset leaves them beside its shards."""
    for shard, size in sizes.items():
        stats = {"count": size + 3, "successes": size, "failed_to_download": 3, "status_dict": {"success": size}}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))


def test_sizes_win_over_the_stats_of_img2dataset_and_these_over_len(tmp_path):
    pattern = write_shards(tmp_path, [8, 8], info=False)
    (tmp_path / "__len__").write_text("400\n")
    assert train_data(pattern).num_samples == 400
    with pytest.raises(UserError, match="__len__ counts 1 more shards.*give --train-num-samples"):
        train_data(f"{tmp_path}/00000.tar")
    write_stats(tmp_path, {0: 12, 1: 16})
    assert train_data(pattern).num_samples == 28
    assert train_data(f"{tmp_path}/00001.tar").num_samples == 16
    (tmp_path / "sizes.json").write_text(json.dumps({"00000.tar": 8}))
    assert train_data(pattern).num_samples == 24  # the other one is only in the stats
    (tmp_path / "sizes.json").write_text(json.dumps({"00000.tar": 8, "00001.tar": 8}))
    assert train_data(pattern).num_samples == 16


def test_a_shard_without_any_size_is_named_with_the_remedy(tmp_path):
    known, pattern = write_shards(tmp_path / "known", [8]), write_shards(tmp_path, [8] * 3, info=False)
    remedy = r"count them with open-clip-elip count-shards, or give --train-num-samples\.$"
    with pytest.raises(UserError, match=f"unknown for 3 of .*: .*00000.tar, .*no 00000_stats.json.*; {remedy}"):
        train_data(f"{known}::{pattern}")
    write_stats(tmp_path, {0: 8, 2: 8})
    with pytest.raises(UserError, match=f"unknown for 1 of .*: .*00001.tar, .*no 00001_stats.json.*; {remedy}"):
        train_data(pattern)
    (tmp_path / "sizes.json").write_text(json.dumps({"00000.tar": 8}))
    with pytest.raises(UserError, match=f"00001.tar, is not in sizes.json.*; {remedy}"):
        train_data(pattern)


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("sizes.json", "{", "not a table"),
        ("sizes.json", json.dumps({"00000.tar": 8, "00001.tar": None}), "not a table"),
        ("sizes.json", json.dumps({"00000.tar": 0, "00001.tar": 0}), "there are no samples"),
        *(("sizes.json", f'{{"00000.tar": 8, "00001.tar": {wrong}}}', "not a table")
          for wrong in ("-5", "1e30", "1.5", "true", "Infinity")),
        ("__len__", "-3", "does not hold a number"),
        ("__len__", "many", "does not hold a number"),
        ("00000_stats.json", "{", "00000_stats.json does not tell the number of 'successes'.*count-shards"),
        ("00000_stats.json", '{"count": 8}', "does not tell the number of 'successes'"),
    ],
)
def test_damaged_sizes(name, content, match, tmp_path):
    pattern = write_shards(tmp_path, [8] * 2, info=False)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=match):
        train_data(pattern)


# The plan


def test_a_source_of_weight_0_is_neither_checked_nor_counted(tmp_path):
    good = write_shards(tmp_path / "good", [8] * 2)
    (tmp_path / "bad").mkdir()
    flags = {"dataset_resampled": True, "train_data_upsampling_factors": "1::0"}
    data = train_data(f"{good}::{tmp_path}/bad/{{0..9}}.tar", **flags)
    assert data.num_samples == 16
    assert f"{tmp_path}/bad/{{0..9}}.tar: not read, its weight is 0" in data.describe()
    assert len(list(data.epoch(0))) == 4


def test_the_plan_tells_shards_for_readers(tmp_path):
    pattern = write_shards(tmp_path, [6] * 7)
    even, uneven = train_data(pattern, workers=7), train_data(pattern, workers=2, world_size=2)
    assert "7 shards for 7 readers: 1 for each" in even.describe()
    assert "7 shards for 4 readers: 1 or 2 for each" in uneven.describe()


def test_the_plan_tells_how_often_samples_come(tmp_path):
    sources = "::".join([write_shards(tmp_path / "a", [8] * 3), write_shards(tmp_path / "b", [8])])
    flags = {"dataset_resampled": True, "train_data_upsampling_factors": "1::3"}
    lines = train_data(sources, **flags).describe().splitlines()
    assert lines[1].endswith("3 shards, 24 samples, 50.0% of what is drawn: each sample 0.67 times per epoch")
    assert lines[2].endswith("1 shard, 8 samples, 50.0% of what is drawn: each sample 2.00 times per epoch")
    assert (
        "64 samples by --train-num-samples, 2.00 times the 32 that"
        in train_data(sources, train_num_samples=64).describe()
    )
    (tmp_path / "b/sizes.json").unlink()
    lines = train_data(sources, train_num_samples=64, **flags).describe().splitlines()
    assert lines[2].endswith("1 shard, 50.0% of what is drawn")
    assert lines[3].endswith("64 samples by --train-num-samples")


# sizes.json


def set_time(path, seconds):
    os.utime(path, (seconds, seconds))


def test_changed_shards_are_recognised_by_their_date(tmp_path):
    write_shards(tmp_path, [1, 2, 3], info=False)
    names = {f"{shard:05d}.tar" for shard in range(3)}
    assert changed_shards(str(tmp_path), names) == names
    for name in names:
        set_time(tmp_path / name, 1000)
    write_sizes(str(tmp_path), {"00000.tar": 1, "00001.tar": 2, "gone.tar": 9}, since=2000)
    assert changed_shards(str(tmp_path), names) == {"00002.tar"}
    set_time(tmp_path / "00001.tar", 2000)  # while the count was under way
    assert changed_shards(str(tmp_path), names) == {"00001.tar", "00002.tar"}

    # Who counts another shard now must not make the outdated entry look like a new one.
    write_sizes(str(tmp_path), {"00002.tar": 3}, since=3000)
    assert changed_shards(str(tmp_path), names) == {"00001.tar"}
    assert read_sizes(str(tmp_path / "sizes.json")) == {"00000.tar": 1, "00002.tar": 3, "gone.tar": 9}
    assert sorted(os.listdir(tmp_path)) == [*sorted(names), "sizes.json"]


@pytest.mark.parametrize("file", ["sizes.json", "00001_stats.json", "__len__"])
def test_numbers_that_are_older_than_their_shards_are_told(file, tmp_path, caplog):
    pattern = write_shards(tmp_path, [8, 8], info=False)
    contents = {"sizes.json": '{"00000.tar": 8, "00001.tar": 8}', "__len__": "16"}
    write_stats(tmp_path, {0: 8, 1: 8} if file == "00001_stats.json" else {})
    if file in contents:
        (tmp_path / file).write_text(contents[file])
    train_data(pattern)
    assert caplog.messages == []
    set_time(tmp_path / file, 1000)
    assert train_data(pattern).num_samples == 16
    train_data(pattern, rank=1, world_size=2)
    (told,) = caplog.messages
    assert re.match(f"{file} in {tmp_path} is older than [12] of its shards, the first of them 0000[01].tar: ", told)


@pytest.mark.parametrize("noted, told", [(6, True), (10, True), (8, False), (9, False)])  # 9 samples, of which 8 usable
def test_shards_of_another_size_than_noted_are_told_when_read(noted, told, tmp_path):
    pattern = write_shards(tmp_path, [9, 9], info=False)
    write_shard(tmp_path / "00001.tar", {str(n): sample(n) if n else {"jpg": b"x"} for n in range(9)})
    (tmp_path / "sizes.json").write_text(json.dumps({"00000.tar": 9, "00001.tar": noted}))
    for data in (train_data(pattern), val_data(pattern)):
        list(data.epoch(0) if data is not None and hasattr(data, "epoch") else data)
        report = data.report()
        assert ("shard of another size than noted" in report.skipped) == told
        assert not told or f"{tmp_path}/00001.tar: 8 samples, but {noted} are noted; count anew" in report.examples[1]
