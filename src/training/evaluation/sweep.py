"""Choosing a regularisation on held-out rows, and which rows are held out; processes share the candidates."""
from __future__ import annotations

import datetime
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed import Ranks

LOWEST, HIGHEST = -6, 6  # decades
STEPS_PER_DECADE = 8


@dataclass(frozen=True)
class Trial:
    """A regularisation, and the top-1 (a fraction) and mean cross entropy of a classifier with it on held-out rows."""

    regularisation: float
    top1: float
    loss: float
    iterations: int


def sweep(attempt: Callable[[float], Trial], ranks: Ranks) -> tuple[Trial, list[Trial]]:
    """The best value and all trials, in ascending order of their values; the same for any number of processes.

    First every second power of ten from 1e-6 to 1e6; then the two values half as far around the best so far, again and
    again, down to 8 steps a decade (Radford et al. 2021, appendix A.3). The higher top-1 wins, then the lower loss,
    then the lower value. The candidates of a level are dealt to the processes (see `patient`). A collective call.
    """
    low, high = (STEPS_PER_DECADE * decade for decade in (LOWEST, HIGHEST))
    trials: dict[int, Trial] = {}  # by exponent, in steps
    step, wanted = 2 * STEPS_PER_DECADE, list(range(low, high + 1, 2 * STEPS_PER_DECADE))
    while True:
        mine = wanted[ranks.rank :: ranks.world_size]
        for done in ranks.gather([(exponent, attempt(10 ** (exponent / STEPS_PER_DECADE))) for exponent in mine]):
            trials |= dict(done)
        for exponent in sorted(wanted):
            trial = trials[exponent]
            logging.info(
                f"regularisation {trial.regularisation:.3g}: {trial.top1:.2%} top-1 held out, loss {trial.loss:.4f}, "
                f"{trial.iterations} iterations"
            )
        best = max(trials, key=lambda exponent: (trials[exponent].top1, -trials[exponent].loss, -exponent))
        if step == 1:
            break
        step //= 2
        wanted = [exponent for exponent in (best - step, best + step) if low <= exponent <= high]
    if best in (low, high):
        logging.warning(f"The best regularisation, {trials[best].regularisation:.0e}, is at the end of the range.")
    return trials[best], [trials[exponent] for exponent in sorted(trials)]


def patient(ranks: Ranks) -> Ranks:
    """The same processes, but `gather` and `broadcast` wait for as long as it takes, over the CPU. A collective call.

    Fits take unequally long, for hours on much data; the usual groups give up after 10 or 30 minutes.
    """
    return ranks.on_cpu(datetime.timedelta(days=30))


def stratified_sample(labels: Tensor, count: int, seed: int, leave: int = 0) -> Tensor:
    """About `count` rows (n,) int64 of labels (N,) int64, ascending, drawn so that each class keeps its share.

    Every class is among them if `count` allows it; at least `leave` rows of each class are left.
    """
    counts = torch.bincount(labels)
    most = (counts - leave).clamp(min=0)
    count = min(count, int(most.sum()))
    share = most.double() * count / max(1, int(most.sum()))
    quota = share.floor().long()
    if count >= int((most > 0).sum()):
        quota = torch.maximum(quota, most.clamp(max=1))
    generator = torch.Generator().manual_seed(seed)
    ties = torch.randperm(len(counts), generator=generator)
    while (missing := count - int(quota.sum())) != 0:
        sign = 1 if missing > 0 else -1
        possible = (quota < most) if missing > 0 else (quota > 1)
        wish = (sign * (share - quota)).masked_fill(~possible, -torch.inf)[ties]
        chosen = ties[wish.argsort(descending=True, stable=True)[: min(abs(missing), int(possible.sum()))]]
        quota[chosen] += sign
    return _draw(labels, quota, generator)


def few_shots(labels: Tensor, count: int, seed: int) -> Tensor:
    """`count` rows of each class of labels (N,) int64, or all that a class has, ascending, drawn at random."""
    return _draw(labels, torch.full((int(labels.max()) + 1,), count), torch.Generator().manual_seed(seed))


def _draw(labels: Tensor, quota: Tensor, generator: torch.Generator) -> Tensor:
    counts = torch.bincount(labels)
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    number = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]  # within the class
    return by_class[number < quota[labels[by_class]]].sort().values
