"""A length of training in steps, epochs, samples or percent of the run."""
from __future__ import annotations

import math
import re

_UNITS = {"step": "steps", "ep": "epochs", "epoch": "epochs", "sample": "samples", "%": "%", "percent": "%"}


def parse(text: str, default_unit: str = "steps") -> tuple[float, str]:
    """Reads "10000" (in `default_unit`), "10000steps", "3ep", "2.5e6samples" or "5%" as amount and unit.

    The units are "steps", "epochs", "samples" and "%". ValueError: it is no length.
    """
    match = re.fullmatch(r"\s*((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z%]*)\s*", text.lower())
    suffix = match[2] if match else ""
    unit = _UNITS.get(suffix.removesuffix("s")) if suffix else default_unit
    if match is None or unit is None or not math.isfinite(amount := float(match[1])):
        raise ValueError(
            f"{text!r} is not a duration: write a number of at least 0 with steps, epochs (or ep), samples or % "
            "behind it, such as 10000steps, 3ep, 2.5e6samples or 5%."
        )
    if unit in ("steps", "samples") and not amount.is_integer():
        raise ValueError(f"{text!r} is not a duration: the number of {unit} must be whole.")
    if unit == "%" and amount > 100:
        raise ValueError(f"{text!r} is more than the whole run: write at most 100%.")
    return amount, unit


def steps(text: str, default_unit: str, steps_per_epoch: int, global_batch: int, total_steps: int | None) -> int:
    """Optimizer steps, rounded to the nearest; at least 1, unless the amount is 0.

    ValueError: it is no length, or a share of the run where its length (`total_steps`) is None.
    """
    amount, unit = parse(text, default_unit)
    if unit == "%" and total_steps is None:
        raise ValueError(f"{text} is a share of the run, whose length must be given in another unit.")
    factors = {"steps": (1, 1), "epochs": (steps_per_epoch, 1), "samples": (1, global_batch), "%": (total_steps, 100)}
    times, by = factors[unit]
    return max(math.floor(amount * times / by + 0.5), int(amount > 0))
