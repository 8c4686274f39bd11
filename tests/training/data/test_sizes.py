"""How many samples there are: what is noted beside the shards, what a count finds, and the plan of an epoch."""

import json
import os

import pytest

from training.data.sizes import changed_shards, read_sizes, write_sizes
from training.errors import UserError

from ..data_helpers import train_data, write_shards


def write_stats(folder, sizes):
    """As img2dataset leaves them beside its shards."""
    for shard, size in sizes.items():
        stats = {"count": size + 3, "successes": size, "failed_to_download": 3, "status_dict": {"success": size}}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))


# img2dataset's statistics


def test_the_stats_of_img2dataset_are_understood(tmp_path):
    pattern = write_shards(tmp_path, [8, 8, 16], info=False)
    write_stats(tmp_path, {0: 8, 1: 8, 2: 16})
    assert train_data(pattern).num_samples == 32
    assert train_data(f"{tmp_path}/{{00001..00002}}.tar").num_samples == 24


def test_sizes_win_over_stats_and_stats_over_len(tmp_path):
    pattern = write_shards(tmp_path, [8, 8], info=False)
    (tmp_path / "__len__").write_text("400")
    write_stats(tmp_path, {0: 12, 1: 12})
    assert train_data(pattern).num_samples == 24
    (tmp_path / "sizes.json").write_text(json.dumps({"00000.tar": 8}))
    assert train_data(pattern).num_samples == 20  # the other one is only in the stats
    (tmp_path / "sizes.json").write_text(json.dumps({"00000.tar": 8, "00001.tar": 8}))
    assert train_data(pattern).num_samples == 16


def test_a_shard_without_any_size_is_named_with_the_remedy(tmp_path):
    pattern = write_shards(tmp_path, [8] * 3, info=False)
    remedy = r"count them with scripts/count_shards.py, or give --train-num-samples\.$"
    with pytest.raises(UserError, match=f"{tmp_path} .*no 00000_stats.json for 00000.tar.*{remedy}"):
        train_data(pattern)
    write_stats(tmp_path, {0: 8, 2: 8})
    with pytest.raises(UserError, match=rf"{tmp_path}/00001.tar \(no 00001_stats.json; 1 shards lack one\): {remedy}"):
        train_data(pattern)
    (tmp_path / "sizes.json").write_text(json.dumps({"00000.tar": 8}))
    with pytest.raises(UserError, match=rf"sizes.json has no entry for 00001.tar .*: {remedy}"):
        train_data(pattern)


def test_a_source_of_weight_0_is_neither_checked_nor_counted(tmp_path):
    good = write_shards(tmp_path / "good", [8] * 2)
    (tmp_path / "bad").mkdir()
    flags = {"dataset_resampled": True, "train_data_upsampling_factors": "1::0"}
    data = train_data(f"{good}::{tmp_path}/bad/{{0..9}}.tar", **flags)
    assert data.num_samples == 16
    assert f"{tmp_path}/bad/{{0..9}}.tar: not read, its weight is 0" in data.describe()
    assert len(list(data.epoch(0))) == 4


# The plan


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


# Counting


# sizes.json


def set_time(path, seconds):
    os.utime(path, (seconds, seconds))


def test_sizes_are_merged(tmp_path):
    write_shards(tmp_path, [1, 2, 3], info=False)
    for shard in tmp_path.iterdir():
        set_time(shard, 1000)
    write_sizes(str(tmp_path), {"00000.tar": 1, "00001.tar": 2, "gone.tar": 9}, since=2000)
    write_sizes(str(tmp_path), {"00002.tar": 3, "00001.tar": 7}, since=3000)
    assert read_sizes(str(tmp_path / "sizes.json")) == {
        "00000.tar": 1,
        "00001.tar": 7,
        "00002.tar": 3,
        "gone.tar": 9,
    }
    assert sorted(os.listdir(tmp_path)) == ["00000.tar", "00001.tar", "00002.tar", "sizes.json"]


def test_changed_shards_are_recognised_by_their_date(tmp_path):
    write_shards(tmp_path, [1, 2, 3], info=False)
    names = {f"{shard:05d}.tar" for shard in range(3)}
    assert changed_shards(str(tmp_path), names) == names
    for name in names:
        set_time(tmp_path / name, 1000)
    write_sizes(str(tmp_path), {"00000.tar": 1, "00001.tar": 2}, since=2000)
    assert changed_shards(str(tmp_path), names) == {"00002.tar"}
    set_time(tmp_path / "00001.tar", 2000)  # while the count was under way
    assert changed_shards(str(tmp_path), names) == {"00001.tar", "00002.tar"}

    # Who counts another shard now must not make the outdated entry look like a new one.
    write_sizes(str(tmp_path), {"00002.tar": 3}, since=3000)
    assert changed_shards(str(tmp_path), names) == {"00001.tar"}

