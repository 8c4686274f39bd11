"""How many samples there are: what is noted beside the shards, what a count finds, and the plan of an epoch."""

import gzip
import io
import json
import os
import tarfile

import pytest

from training.data.report import DataReport
from training.data.shards import read_shard
from training.data.sizes import changed_shards, count_shard, read_sizes, write_sizes
from training.errors import UserError

from ..data_helpers import (
    encode,
    key_of,
    sample,
    train_data,
    truncate,
    write_damaged_shards,
    write_shard,
    write_shards,
)


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


@pytest.mark.parametrize("content", ["{", "[]", '{"count": 8}', '{"successes": null}'])
def test_damaged_stats(content, tmp_path):
    pattern = write_shards(tmp_path, [8], info=False)
    (tmp_path / "00000_stats.json").write_text(content)
    with pytest.raises(UserError, match="00000_stats.json does not tell the number of 'successes'.*count_shards.py"):
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


def found_by_training(path) -> tuple[int, dict[str, int]]:
    report = DataReport()
    samples = len(list(read_shard(str(path), report)))
    return samples, report.skipped


def assert_counted_as_in_training(path) -> None:
    count = count_shard(str(path))
    skipped = count.skipped | ({"broken shard": 1} if count.broken else {})
    assert (count.samples, skipped) == found_by_training(path)


@pytest.mark.parametrize("file_of_sample", ["image", "caption"])
@pytest.mark.parametrize("place", ["before", "header", "data"])
@pytest.mark.parametrize("keep", [0, 1, 6])
def test_a_broken_shard_counts_up_to_the_break(keep, place, file_of_sample, tmp_path):
    write_shards(tmp_path, [7])
    truncate(tmp_path / "00000.tar", keep, file_of_sample, place)
    count = count_shard(str(tmp_path / "00000.tar"))
    assert count.samples == keep and count.broken
    assert_counted_as_in_training(tmp_path / "00000.tar")


def test_the_count_is_what_training_finds(tmp_path):
    write_damaged_shards(tmp_path)
    write_shard(tmp_path / "00000.tar", {key_of(0, n): sample(n) | {"json": b"{}"} for n in range(4)})
    write_shard(tmp_path / "00005.tar", {"a": sample(1), "__meta__": sample(2), "b": {"png": b"", "txt": b""}})
    for shard in (0, 3, 4, 5):
        assert_counted_as_in_training(tmp_path / f"{shard:05d}.tar")
    # That a caption is blank is not in the headers.
    assert count_shard(str(tmp_path / "00001.tar")).samples == found_by_training(tmp_path / "00001.tar")[0] + 1


def test_decoding_leaves_out_what_cannot_be_decoded(tmp_path):
    write_damaged_shards(tmp_path)
    count = count_shard(str(tmp_path / "00001.tar"), decode=True)
    assert (count.samples, count.broken) == (3, None)
    assert count.skipped == {"unreadable image": 1, "no caption": 1, "empty caption": 1, "no image": 1}
    assert count_shard(str(tmp_path / "00003.tar"), decode=True).samples == 4


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, encode(0)])
def test_what_is_no_tar_counts_nothing(content, tmp_path):
    (tmp_path / "x.tar").write_bytes(content)
    count = count_shard(str(tmp_path / "x.tar"))
    assert count.samples == 0 and count.broken
    assert_counted_as_in_training(tmp_path / "x.tar")


def test_damage_in_the_middle_ends_the_count(tmp_path):
    write_shards(tmp_path, [40])
    with tarfile.open(tmp_path / "00000.tar") as tar:
        header = tar.getmembers()[10].offset
    with open(tmp_path / "00000.tar", "r+b") as file:
        file.seek(header)
        file.write(b"\x07" * 512)
    assert count_shard(str(tmp_path / "00000.tar")).samples == 5
    assert_counted_as_in_training(tmp_path / "00000.tar")


def test_a_compressed_shard_and_long_names(tmp_path):
    write_shards(tmp_path, [3])
    (tmp_path / "x.tar").write_bytes(gzip.compress((tmp_path / "00000.tar").read_bytes()))
    assert_counted_as_in_training(tmp_path / "x.tar")
    assert count_shard(str(tmp_path / "x.tar")).samples == 3

    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "long.tar", "w", format=form) as tar:
            for extension, content in sample(1).items():
                info = tarfile.TarInfo(f"{'folder' * 30}/{'é' * 120}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        assert_counted_as_in_training(tmp_path / "long.tar")
        assert count_shard(str(tmp_path / "long.tar")).samples == 1


def test_a_shard_that_is_not_there_cannot_be_counted(tmp_path):
    with pytest.raises(FileNotFoundError):
        count_shard(str(tmp_path / "x.tar"))


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


def test_nothing_is_left_behind_when_sizes_cannot_be_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    write_sizes(str(tmp_path), {"00000.tar": 1}, since=1000)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_sizes(str(tmp_path), {"00000.tar": 2}, since=2000)
    assert os.listdir(tmp_path) == ["sizes.json"]
    assert read_sizes(str(tmp_path / "sizes.json")) == {"00000.tar": 1}
