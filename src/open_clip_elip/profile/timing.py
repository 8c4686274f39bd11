"""Seconds of several things in turn, so that what disturbs the machine disturbs all of them alike."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median, quantiles
from typing import NamedTuple

import torch


class Spread(NamedTuple):
    """Of repeated measurements: median, first and third quartile, and how many there were."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median(values), low, high, len(values))

    def to_dict(self) -> dict[str, float]:
        return self._asdict()


def in_turn(
    functions: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    rounds: int,
    warmup: int = 1,
    repeat: int = 1,
    seconds: float | None = None,
    least: int = 2,
) -> dict[str, list[float]]:
    """Seconds a call of each function, one entry a round; every other round runs them in reverse order.

    Args:
        device: is waited for before and after each measurement.
        rounds: measurements of each function.
        warmup: rounds before that, which are not told.
        repeat: calls in one measurement.
        seconds: begin no round that is not likely to end within these, warm-up included; None: no limit.
        least: rounds there are in any case.
    """
    begin = time.perf_counter()
    longest, found = 0.0, {name: [] for name in functions}
    for i in range(warmup + rounds):
        start = time.perf_counter()
        if seconds is not None and i >= warmup + least and start - begin + longest > seconds:
            break
        for name in list(functions)[:: 1 if i % 2 == 0 else -1]:
            taken = _seconds(functions[name], device, repeat)
            if i >= warmup:
                found[name].append(taken)
        longest = max(longest, time.perf_counter() - start)
    return found


def ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """value / reference of each round: what both met in it cancels."""
    return [value / base for value, base in zip(values, reference, strict=True)]


def count_rounds(spreads: Iterable[Mapping[str, float]]) -> str:
    """How many measurements there were, of several `Spread`s as dicts: "5 rounds", or "3 to 5 rounds"."""
    counts = {spread["count"] for spread in spreads}
    return f"{min(counts)} rounds" if len(counts) == 1 else f"{min(counts)} to {max(counts)} rounds"


def _seconds(function: Callable[[], object], device: torch.device, repeat: int) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    wait(device)
    begin = time.perf_counter()
    for _ in range(repeat):
        function()
    wait(device)
    return (time.perf_counter() - begin) / repeat
