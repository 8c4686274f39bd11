"""The order of training data, and continuing in it at any position."""

import itertools
import json
import multiprocessing
import pickle
import random
from collections import Counter
from itertools import islice

import numpy
import open_clip
import pytest
import torch
from open_clip.transform import image_transform

from training.data import build_train_data, pixels, sources
from training.data.randomness import stable_seed
from training.data.samples import DataReport, PairEncoding, Reader, Sample
from training.data.sources import ShardSource, shuffled
from training.errors import UserError

from ..data_helpers import (
    assert_same_batches,
    data_args,
    keys,
    train_data,
    write_csv,
    write_damaged_shards,
    write_shards,
)

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

KINDS = ["shards", "resampled", "csv", "synthetic"]


def make(kind: str, folder, **flags):
    """Data with everything in it that can be skipped; flags as for `train_data`. Needs at least 10 batches of 4."""
    if kind == "shards":
        return train_data(write_damaged_shards(folder), train_num_samples=45, **flags)
    if kind == "resampled":
        factors = {"dataset_resampled": True, "train_data_upsampling_factors": "1::3"}
        sources = f"{write_damaged_shards(folder / 'a')}::{write_shards(folder / 'b', [5, 9], first=30)}"
        return train_data(sources, train_num_samples=45, **factors, **flags)
    if kind == "csv":
        return train_data(write_csv(folder, 47, broken=(3, 4, 20, 21, 22, 23, 40)), **flags)
    return train_data(None, dataset_type="synthetic", train_num_samples=47, **flags)


@pytest.fixture
def decoded(monkeypatch):
    """Counts decoded images, in worker processes too."""
    count, load_rgb = multiprocessing.Value("i", 0), pixels.load_rgb

    def counting(image):
        with count.get_lock():
            count.value += 1
        return load_rgb(image)

    monkeypatch.setattr(pixels, "load_rgb", counting)
    return count


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_is_a_function_of_seed_epoch_and_rank(kind, tmp_path):
    def batches(epoch=1, **flags):
        return list(make(kind, tmp_path, **flags).epoch(epoch))

    first = batches()
    assert_same_batches(first, batches())
    assert keys(first) != keys(batches(epoch=2))
    assert keys(first) != keys(batches(seed=1))
    assert keys(batches(rank=0, world_size=2)) != keys(batches(rank=1, world_size=2))


@pytest.mark.parametrize(
    "kind, workers, done",
    [*itertools.product(KINDS, (0, 1, 3), (5,)), *itertools.product(["csv"], (0, 2), (0, 1, 8, 10))],
)
def test_resume_gives_exactly_the_remaining_batches(kind, workers, done, tmp_path, decoded):
    data, started, resumed = (make(kind, tmp_path, workers=workers) for _ in range(3))
    assert data.num_batches >= 10
    full = list(data.epoch(2))
    full_report, end = data.report(), data.state_dict()

    batches = started.epoch(2)
    begun = list(islice(batches, done))
    state = json.loads(json.dumps(started.state_dict()))
    skipped_before = started.report().skipped.get("unreadable image", 0)
    batches.close()

    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    decoded.value = 0
    rest = list(resumed.epoch(2))
    assert_same_batches(begun + rest, full)
    assert resumed.report() == full_report and resumed.state_dict() == end
    assert decoded.value == 4 * len(rest) + full_report.skipped.get("unreadable image", 0) - skipped_before
    assert kind != "csv" or full_report.skipped["unreadable image"] > 0  # the damage is really on the way
    assert_same_batches(list(resumed.epoch(2)), full)  # the position was for once
    resumed.load_state_dict(state)
    assert keys(resumed.epoch(3)) == keys(data.epoch(3))  # and for its epoch alone


@pytest.mark.parametrize(
    "change, named",
    [
        ({"workers": 2}, "workers 1 (now 2)"),
        ({"world_size": 2}, "world_size 1 (now 2), batches per epoch 8 (now 4)"),
        ({"train_num_samples": 9}, "batches per epoch 8 (now 3)"),
        ({"dataset_resampled": True}, "resampled False (now True)"),
        ({"batch_size": 2, "seed": 3}, "batch_size 4 (now 2), seed 0 (now 3), batches per epoch 8 (now 16)"),
    ],
)
def test_another_order_is_refused_within_an_epoch_but_not_after_it(change, named, tmp_path):
    pattern = write_shards(tmp_path, [8] * 4)
    data, same, changed, fresh = (train_data(pattern, **flags) for flags in ({}, {}, change, change))
    batches = data.epoch(1)
    next(batches)
    begun = data.state_dict()
    with pytest.raises(UserError, match="middle of epoch 1") as error:
        changed.load_state_dict(begun)
    assert named in str(error.value)
    list(batches)
    same.load_state_dict(data.state_dict())
    with pytest.raises(UserError, match="sources"):
        train_data(write_shards(tmp_path / "other", [8] * 4), **change).load_state_dict(begun)
    changed.load_state_dict(data.state_dict())
    assert list(changed.epoch(1)) == []
    assert_same_batches(list(changed.epoch(2)), list(fresh.epoch(2)))


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("done", [0, 1, 5, 8, 99])
def test_skipping_by_count_is_exact_where_nothing_is_broken_or_changed(done, workers, tmp_path, decoded):
    pattern = write_shards(tmp_path, [8] * 4)
    data = train_data(pattern, workers=workers)
    full = list(data.epoch(2))
    skipped = train_data(pattern, workers=workers)
    skipped.skip_to(2, done)
    decoded.value = 0
    rest = list(skipped.epoch(2))
    assert_same_batches(rest, full[done:])
    assert decoded.value == 4 * len(rest)
    assert_same_batches(list(skipped.epoch(2)), full)  # the position was for once


def test_an_epoch_goes_on_with_another_batch_size_and_more_ranks(tmp_path):
    pattern = write_shards(tmp_path, [8] * 8)
    data = train_data(pattern, workers=2)
    begun = keys(islice(data.epoch(0), 8))  # of 16: half of the epoch
    ranks = [train_data(pattern, batch_size=2, workers=3, rank=rank, world_size=2) for rank in range(2)]
    rest = []
    for rank in ranks:
        assert rank.num_batches == 18  # 16, rounded up to batches for three workers
        rank.skip_to(0, len(begun) // (2 * 2))
        assert rank.state_dict()["positions"] == [2 * 3, 2 * 3, 2 * 2]
        rest.append(keys(rank.epoch(0)))
    assert [len(part) for part in rest] == [2 * (18 - 8)] * 2
    resumed = train_data(pattern, batch_size=2, workers=3, rank=1, world_size=2)  # from there on it is exact again
    ranks[1].skip_to(0, 8)
    list(islice(ranks[1].epoch(0), 3))
    resumed.load_state_dict(ranks[1].state_dict())
    assert keys(resumed.epoch(0)) == rest[1][2 * 3 :]


def test_one_worker_is_this_process_and_for_tables_all_numbers_are_alike(tmp_path):
    pattern = write_shards(tmp_path, [8] * 4)
    here, there = train_data(pattern, workers=0), train_data(pattern, workers=1)
    assert_same_batches(list(here.epoch(0)), list(there.epoch(0)))
    path = write_csv(tmp_path, 23)
    one, *others = (keys(train_data(path, workers=workers, batch_size=2).epoch(0)) for workers in (0, 1, 2, 3))
    assert others == [one] * 3


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_state_is_left_alone(workers, tmp_path):
    data = make("shards", tmp_path, workers=workers)
    before = random.getstate(), pickle.dumps(numpy.random.get_state()), torch.get_rng_state()
    for _ in data.epoch(0):
        assert random.getstate() == before[0]
        assert pickle.dumps(numpy.random.get_state()) == before[1]
        assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_augmentation_differs_between_epochs_and_samples(tmp_path):
    path = write_csv(tmp_path, 1)
    data = train_data(path, batch_size=1)
    first, second = (next(data.epoch(epoch))["image"].pixels for epoch in (0, 1))
    assert keys(data.epoch(0)) == keys(data.epoch(1))
    assert not torch.equal(first, second)

    same_picture = train_data(write_shards(tmp_path, [1]), train_num_samples=2, batch_size=2)
    images = next(same_picture.epoch(0))["image"].pixels
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("write, size, batches", [(write_shards, [8] * 4, 4), (write_csv, 30, 3)])  # floor(30 / 8)
def test_every_sample_comes_once_from_shards_and_at_most_once_from_tables(write, size, batches, workers, tmp_path):
    path = write(tmp_path, size)
    ranks = [train_data(path, rank=rank, world_size=2, workers=workers) for rank in range(2)]
    assert [data.num_batches for data in ranks] == [batches] * 2
    seen = [key for data in ranks for key in keys(data.epoch(3))]
    assert len(seen) == len(set(seen)) == 8 * batches


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_rows_are_replaced_first_by_the_rows_left_over_and_then_by_others_again(workers, tmp_path):
    seen = keys(train_data(write_csv(tmp_path, 11, broken=(2, 5, 8)), workers=workers).epoch(0))
    assert sorted(seen) == [f"images/{n:03d}.png" for n in range(11) if n not in (2, 5, 8)]
    seen = keys(train_data(write_csv(tmp_path, 8, broken=tuple(range(6)))).epoch(0))
    assert Counter(seen) == {"images/006.png": 4, "images/007.png": 4}


def test_a_second_pass_begins_when_the_shards_are_used_up(tmp_path):
    data = train_data(write_shards(tmp_path, [5, 7]), train_num_samples=24)
    seen = keys(data.epoch(0))
    assert sorted(seen[:12]) == sorted(seen[12:]) == sorted(set(seen))
    assert seen[:12] != seen[12:]


def test_resampled_shards_follow_the_upsampling_factors(tmp_path):
    sources = f"{write_shards(tmp_path / 'a', [5] * 2)}::{write_shards(tmp_path / 'b', [5] * 2, first=10)}"
    flags = {"dataset_resampled": True, "train_num_samples": 600, "batch_size": 100}
    few = keys(train_data(sources, train_data_upsampling_factors="1::9", **flags).epoch(0))
    assert 0 < sum(key < "10" for key in few) < 180
    none = keys(train_data(sources, train_data_upsampling_factors="0::1", **flags).epoch(0))
    assert all(key >= "10" for key in none)
    even = keys(train_data(sources, **flags).epoch(0))
    assert 180 < sum(key < "10" for key in even) < 420


def test_resampled_shards_may_be_fewer_than_readers(tmp_path):
    pattern = write_shards(tmp_path, [8])
    ranks = [train_data(pattern, rank=rank, world_size=2, workers=2, dataset_resampled=True) for rank in range(2)]
    first, second = (keys(data.epoch(0)) for data in ranks)
    assert len(first) == len(second) == 2 * 4
    assert first != second


def test_shuffle_buffer():
    out = list(shuffled(range(100), random.Random(0), size=20, initial=10))
    assert sorted(out) == list(range(100))
    assert out != sorted(out)
    # The sample that is n-th to come out was among the first 10 + 2n or 20 + n read.
    assert all(value < min(10 + 2 * (n + 1), 20 + n + 1) for n, value in enumerate(out))
    assert list(shuffled([], random.Random(0))) == []


def rank_correlation(first, second) -> float:
    ranks = [numpy.argsort(numpy.argsort(numpy.asarray(values))) for values in (first, second)]
    return float(numpy.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("resampled", [False, True])
def test_of_the_order_of_the_shards_nothing_is_left_in_an_epoch_or_between_epochs(resampled, monkeypatch):
    shards, each = 300, 10

    def read_shard(url, *_, **__):
        return (Sample(f"{url}-{n}", (b"",), {}, url, n) for n in range(each))

    monkeypatch.setattr(sources, "read_shard", read_shard)
    weights = [1.0] * shards if resampled else None
    source = ShardSource([str(shard) for shard in range(shards)], seed=0, weights=weights)
    places = []
    for epoch in range(4):
        samples = next(source.train(epoch, Reader(0, 1, 0, 1, DataReport(), print)))
        order = [int(sample.origin) for sample in samples]
        assert len(order) == shards * each
        assert abs(rank_correlation(range(len(order)), order)) < 0.1
        if not resampled:
            places.append(numpy.argsort(numpy.argsort(order, kind="stable").reshape(shards, each).mean(axis=1)))
    for first, second in zip(places, places[1:], strict=False):
        assert abs(rank_correlation(first, second)) < 0.15


def test_seeds_never_change():
    assert stable_seed(0, "samples", 3, 1) == 7606693410919346054
    assert len({stable_seed(*parts) for parts in [(1, 2), (2, 1), (12,), ("1", 2), (1, 2, 0)]}) == 5


def test_real_transform_and_tokenizer_also_after_pickling(tmp_path):
    """Where worker processes are not forked, all of it is pickled."""
    args = data_args(train_data=write_shards(tmp_path, [8] * 2), workers=2)
    transform = image_transform(16, is_train=True, mean=None, std=None)
    data = build_train_data(args, PairEncoding(transform, open_clip.get_tokenizer("ViT-B-32")), rank=0, world_size=1)
    batches = list(data.epoch(0))
    assert [batch["image"].pixels.shape for batch in batches] == [(4, 3, 16, 16)] * 4
    assert [batch["text"].shape for batch in batches] == [(4, 77)] * 4
    assert_same_batches(list(pickle.loads(pickle.dumps(data)).epoch(0)), batches)
