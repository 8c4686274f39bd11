"""Resuming from a saved place: the same batches, from the shards in which the shuffle buffer lies and no others."""

import gzip
import io
import json
import os
import random
import shutil
from functools import partial
from itertools import islice
from pathlib import Path

import fsspec
import pytest
import torch

from training.data import sources, streams
from training.data.samples import DataReport, Reader, Sample
from training.data.sources import ShardSource, shuffled
from training.errors import UserError

from ..data_helpers import (
    assert_same_batches,
    key_of,
    keys,
    sample,
    train_data,
    write_csv,
    write_damaged_shards,
    write_shard,
    write_shards,
)

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    monkeypatch.setattr(sources, "shuffled", partial(shuffled, size=8, initial=4))


@pytest.fixture
def opened(monkeypatch):
    """The shards that are opened, in this process."""
    urls, open_stream = [], streams.open_stream
    monkeypatch.setattr(streams, "open_stream", lambda url: urls.append(url) or open_stream(url))
    return urls


def plain(folder: Path, pattern: str) -> str:
    return pattern


def compressed(folder: Path, pattern: str) -> str:
    for path in folder.glob("*.tar"):
        Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return pattern + ".gz"


def command(folder: Path, pattern: str) -> str:
    return f"pipe:cat {pattern}"


def remote(folder: Path, pattern: str) -> str:
    fsspec.filesystem("memory").put(f"{folder}/", "/places/", recursive=True)
    return f"memory://places/{Path(pattern).name}"


def stopped(data, batches: int) -> dict:
    """The position after so many batches of epoch 2, as it comes out of a file."""
    begun = data.epoch(2)
    list(islice(begun, batches))
    state = json.loads(json.dumps(data.state_dict()))
    begun.close()
    return state


@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.parametrize("form", [plain, compressed, command, remote])
def test_a_resume_opens_only_the_shards_of_its_buffer(form, resampled, tmp_path, opened):
    pattern = form(tmp_path, write_shards(tmp_path, [10] * 12))
    flags = {"train_num_samples": 120, "dataset_resampled": resampled, "dataset_type": "webdataset"}
    data, resumed = train_data(pattern, **flags), train_data(pattern, **flags)
    full = list(data.epoch(2))
    state = stopped(data, 20)
    resumed.load_state_dict(state)
    opened.clear()
    batches = resumed.epoch(2)
    rest = [next(batches)]
    needed = set(json.loads(state["places"][0])["shards"])
    assert len(needed) < 6 and len(set(opened)) <= len(needed) + 1  # the next one may have its turn
    assert_same_batches([*rest, *batches], full[20:])
    assert len(opened) < 12 + 3


@pytest.mark.parametrize("resampled, samples", [(False, 45), (False, 90), (True, 45)])
def test_every_position_among_damaged_shards_and_in_later_passes(resampled, samples, tmp_path):
    pattern = write_damaged_shards(tmp_path)
    build = partial(train_data, pattern, train_num_samples=samples, dataset_resampled=resampled)
    data = build()
    full = list(data.epoch(2))
    report, end = data.report(), data.state_dict()
    assert report.skipped["unreadable image"] and report.skipped["no caption"] and report.skipped["broken shard"]
    for done in range(len(full)):
        resumed = build()
        resumed.load_state_dict(stopped(data, done))
        assert_same_batches(list(resumed.epoch(2)), full[done:])
        assert resumed.report() == report and resumed.state_dict() == end
    before = stopped(data, 6)
    del before["places"]  # of a checkpoint from before places were noted
    resumed.load_state_dict(before)
    assert_same_batches(list(resumed.epoch(2)), full[6:])


def another(path: Path, count: int, first: int = 0) -> None:
    write_shard(path, {key_of(9, n): sample(n) for n in range(first, first + count)})


CHANGES = {
    "another size": lambda path: path.write_bytes(path.read_bytes() + bytes(512)),
    "another date": lambda path: os.utime(path, (1, 1)),
    "gone": Path.unlink,
    "fewer samples": lambda path: another(path, 1),
    "other samples": lambda path: another(path, 10, first=1),
}


@pytest.mark.parametrize("form", [plain, command])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_changed_in_between_ends_in_a_sentence(workers, change, form, tmp_path):
    write_shards(tmp_path, [10] * 6)
    pattern = form(tmp_path, f"{tmp_path}/{{00000..00005}}.tar")
    flags = {"workers": workers, "train_num_samples": 60, "dataset_type": "webdataset"}
    data, resumed = train_data(pattern, **flags), train_data(pattern, **flags)
    full = list(data.epoch(2))
    resumed.load_state_dict(stopped(data, 7))
    for path in tmp_path.glob("*.tar"):
        CHANGES[change](path)
    if form is command and change in ("another size", "another date"):  # of what a command gives only this is known
        assert keys(resumed.epoch(2)) == keys(full[7:])
        return
    with pytest.raises(UserError, match=r"tar.* cannot be read as before the checkpoint.*: put it back as it was"):
        list(resumed.epoch(2))


def test_shards_that_the_buffer_does_not_need_may_be_gone(tmp_path):
    pattern = write_shards(tmp_path, [10] * 12)
    data, resumed = train_data(pattern), train_data(pattern)
    full = list(data.epoch(2))
    state = stopped(data, 25)
    ahead = {f"{tmp_path}/{key[:2]:0>5}.tar" for key in keys(full[25:])}
    needed = set(json.loads(state["places"][0])["shards"]) | ahead
    behind = [path for path in tmp_path.glob("*.tar") if str(path) not in needed]
    assert len(behind) > 3
    for path in behind:
        shutil.move(path, tmp_path / "moved")
    resumed.load_state_dict(state)
    assert_same_batches(list(resumed.epoch(2)), full[25:])


def test_a_place_is_small_and_a_checkpoint_of_weights_may_hold_it(monkeypatch):
    def read_shard(url, *_, **__):
        return (Sample(f"{n:09d}", (b"",), {}, url, n, 1 << 33) for n in range(9_000))

    monkeypatch.setattr(sources, "read_shard", read_shard)
    monkeypatch.setattr(sources, "shuffled", shuffled)
    samples = next(ShardSource([f"a/{n:06d}.tar" for n in range(5)]).train(0, Reader(0, 1, 0, 1, DataReport(), print)))
    list(islice(samples, 20_000))
    file = io.BytesIO()
    torch.save(samples.place(20_000), file)
    assert file.tell() < 200_000
    place = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert json.loads(place)["position"] == 20_000
    assert samples.place(20_000 + 5000 // 8 - 1) is None and samples.place(20_000 + 5000 // 8)


def test_the_draws_of_a_shuffle_are_those_of_ever():
    assert list(shuffled(range(12), random.Random(3), size=6, initial=3)) == [1, 5, 6, 4, 2, 8, 3, 11, 0, 10, 7, 9]


def test_rows_that_were_used_are_not_asked_for_again(tmp_path):
    path = write_csv(tmp_path, 47)
    data, resumed = train_data(path), train_data(path)
    full = list(data.epoch(2))
    state = stopped(data, 8)
    asked, rows = [], resumed.source.rows

    class Rows:
        def __getitem__(self, row):
            asked.append(row)
            return rows[row]

        def __len__(self):
            return len(rows)

    resumed.source.rows = Rows()
    resumed.load_state_dict(state)
    assert_same_batches(list(resumed.epoch(2)), full[8:])
    assert len(asked) == 4 * (len(full) - 8)
