import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from training.distributed import Ranks
from training.evaluation.sweep import Trial, stratified_sample, sweep

ONE = Ranks(torch.device("cpu"))


def run(top1, loss=lambda x: 0.0):
    """Sweeps functions of the exponent; the best exponent, and those tried in the order of the trials."""
    tried = []

    def attempt(value):
        exponent = math.log10(value)
        tried.append(round(exponent * 8))
        return Trial(value, top1(exponent), loss(exponent), 1)

    best, trials = sweep(attempt, ONE)
    assert [trial.regularisation for trial in trials] == sorted(10 ** (eighths / 8) for eighths in tried)
    return math.log10(best.regularisation), tried


def test_halves_around_the_peak():
    best, tried = run(lambda x: -abs(x - 1.4))
    assert tried[:7] == [-48, -32, -16, 0, 16, 32, 48]
    assert tried[7:] == [8, 24, 4, 12, 10, 14, 11, 13]
    assert best == pytest.approx(11 / 8)  # the nearest of the 8 steps a decade


@pytest.mark.parametrize(("peak", "expected"), [(-9, -6), (9, 6)])
def test_stays_in_the_range(caplog, peak, expected):
    best, tried = run(lambda x: -abs(x - peak))
    assert best == pytest.approx(expected)
    assert min(tried) >= -48 and max(tried) <= 48 and len(tried) == 11
    assert "at the end of the range" in caplog.text


def test_ties():
    """The lower loss wins, then the stronger regularisation."""
    assert run(lambda x: 0.5, lambda x: abs(x - 2))[0] == pytest.approx(2)
    assert run(lambda x: 0.5)[0] == pytest.approx(-6)


def test_processes_share_the_candidates():
    """What three processes (threads here) try together is what one tries, each value once."""

    def score(tried, value):
        tried.append(round(math.log10(value) * 8))
        return Trial(value, 1 / (1 + abs(tried[-1] - 13)), 0.0, 1)

    alone, shares, slots, barrier = [], [[], [], []], [None] * 3, threading.Barrier(3)
    expected = sweep(lambda value: score(alone, value), ONE)

    class Threads(Ranks):
        def gather(self, value):
            slots[self.rank] = value
            barrier.wait(10)
            everyones = list(slots)
            barrier.wait(10)
            return everyones

    def work(rank):
        ranks = Threads(torch.device("cpu"), rank, rank, 3)
        return sweep(lambda value: score(shares[rank], value), ranks)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [expected] * 3
    assert sorted(sum(shares, [])) == sorted(alone)
    assert [len(share) for share in shares] == [3 + 4, 2 + 4, 2]  # 7 candidates, then 2 on each of 4 levels


# --- samples ---

ORDER = torch.randperm(100, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0] * 60 + [1] * 30 + [2] * 9 + [3] * 1)[ORDER]


def counts(rows):
    assert rows.tolist() == sorted(set(rows.tolist()))
    return torch.bincount(LABELS[rows], minlength=4).tolist()


def test_classes_keep_their_shares():
    assert counts(stratified_sample(LABELS, 50, 0)) == [30, 15, 4, 1]
    assert counts(stratified_sample(LABELS, 10, 0)) == [5, 3, 1, 1]  # each is there
    assert sum(counts(stratified_sample(LABELS, 3, 0))) == 3
    assert counts(stratified_sample(LABELS, 1000, 0)) == [60, 30, 9, 1]
    assert counts(stratified_sample(LABELS, 0, 0)) == [0, 0, 0, 0]


def test_held_out_rows_leave_something_of_each_class():
    assert counts(stratified_sample(LABELS, 10, 0, leave=1)) == [6, 3, 1, 0]
    assert counts(stratified_sample(LABELS, 100, 0, leave=1)) == [59, 29, 8, 0]
    assert counts(stratified_sample(LABELS, 1, 0, leave=60)) == [0, 0, 0, 0]
    for count in range(101):  # every count is met
        assert sum(counts(stratified_sample(LABELS, count, count))) == count
        assert sum(counts(stratified_sample(LABELS, count, count, leave=1))) == min(count, 96)
