"""Tar files of samples: what is in them by three ways of reading, which agree, and where they break off."""

import gzip
import tarfile

import pytest

from training.data.samples import DataReport
from training.data.shards import read_shard
from training.data.sizes import count_shard
from training.data.streams import walk
from training.errors import UserError

from ..data_helpers import encode, key_of, keys, sample, truncate, val_data, write_shard, write_shards
from .sets import layout_files


def read(path) -> tuple[list[str], dict[str, int]]:
    """Keys of the usable samples and what was skipped: as a file and as a stream. Counting must find as many."""
    found = []
    for url in (str(path), f"pipe:cat {path}"):
        report = DataReport()
        found.append(([sample.key for sample in read_shard(url, report)], report.skipped))
    assert found[0] == found[1]
    count = count_shard(str(path))
    broken = {"broken shard": 1} if count.broken else {}
    assert (count.samples, count.skipped | broken) == (len(found[0][0]), report.skipped)
    return found[0]


@pytest.mark.parametrize("file_of_sample", ["image", "caption"])
@pytest.mark.parametrize("place", ["before", "header", "data"])
@pytest.mark.parametrize("keep", [0, 6])
def test_a_shard_that_breaks_off_keeps_what_is_before(keep, place, file_of_sample, tmp_path):
    write_shards(tmp_path, [7])
    truncate(tmp_path / "00000.tar", keep, file_of_sample, place)
    assert read(tmp_path / "00000.tar") == ([key_of(0, n) for n in range(keep)], {"broken shard": 1})


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    write_shards(tmp_path, [40])
    with tarfile.open(tmp_path / "00000.tar") as tar:
        header = tar.getmembers()[10].offset
    for damage in (b"\x07" * 512, bytes(1024)):
        with open(tmp_path / "00000.tar", "r+b") as file:
            file.seek(header)
            file.write(damage)
        assert read(tmp_path / "00000.tar") == ([key_of(0, n) for n in range(5)], {"broken shard": 1})


def test_a_compressed_shard(tmp_path):
    write_shards(tmp_path, [3])
    content = gzip.compress((tmp_path / "00000.tar").read_bytes())
    (tmp_path / "x.tar.gz").write_bytes(content)
    assert read(tmp_path / "x.tar.gz") == ([key_of(0, n) for n in range(3)], {})
    assert len(keys(val_data(str(tmp_path / "x.tar.gz"), dataset_type="webdataset"))) == 3
    (tmp_path / "x.tar.gz").write_bytes(content[:-200])
    assert read(tmp_path / "x.tar.gz")[1] == {"broken shard": 1}


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, encode(0)])
def test_what_is_no_tar_holds_nothing(content, tmp_path):
    (tmp_path / "x.tar").write_bytes(content)
    assert read(tmp_path / "x.tar") == ([], {"broken shard": 1})
    with pytest.raises(UserError, match=f"{tmp_path}/x.tar in --val-data cannot be read .*: give webdataset shards"):
        val_data(str(tmp_path / "x.tar"))
    with pytest.raises(FileNotFoundError):
        count_shard(str(tmp_path / "y.tar"))


def test_names_make_samples(tmp_path):
    members = [(f"same.{kind}", content) for n in (1, 2) for kind, content in sample(n).items()]  # a key comes again
    members += [(name, b"") for name in ("no_extension", ".hidden", "__meta__/x.jpg", "b.png", "b.txt")]
    layout_files.write_shard(tmp_path / "x.tar", members)
    assert read(tmp_path / "x.tar") == (["same", "same"], {"empty caption": 1})
    (batch,) = val_data(str(tmp_path / "x.tar"))
    assert [bytes(text.tolist()).decode().strip() for text in batch["text"]] == ["caption 1", "caption 2"]
    long = f"{'folder' * 30}/{'é' * 120}"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = {f"{long}.{kind}": content for kind, content in sample(1).items()}
        assert read(layout_files.write_shard(tmp_path / "long.tar", members, form)) == ([long], {})


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_can_be_entered_at_any_sample(form, tmp_path):
    long = "" if form == tarfile.USTAR_FORMAT else f"{'folder' * 30}/{'é' * 120}"
    members = [(f"{long}{n}.{kind}", content) for n in range(5) for kind, content in sample(n).items()]
    path = str(layout_files.write_shard(tmp_path / "x.tar", members, form))
    found = list(read_shard(path, DataReport()))
    assert [one.index for one in found] == list(range(5)) and found[0].entry == 0
    for url in (path, f"pipe:cat {path}"):
        entries = [one.entry if url == path else -1 for one in found]
        runs = [(1, entries[1], 1), (3, entries[3], None)]
        again = list(read_shard(url, DataReport(), runs=runs))
        assert [one[:3] + one[4:5] for one in again] == [one[:3] + one[4:5] for one in (found[1], *found[3:])]


def test_only_what_is_wanted_is_read(tmp_path):
    content = sample(1)
    write_shard(tmp_path / "x.tar", {"a/b": {"seg.PNG": b"12", **content}})
    failures = []
    ((key, members),) = walk(str(tmp_path / "x.tar"), failures, {"txt"})
    assert key == "a/b" and list(members) == ["seg.png", "jpg", "txt"] and not failures
    assert members["txt"].content == content["txt"] and members["jpg"].content is None
    _, _, offset, size, *_ = members["jpg"]
    assert (tmp_path / "x.tar").read_bytes()[offset : offset + size] == content["jpg"]
