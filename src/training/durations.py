"""A length of training in steps, epochs, samples or percent of the run."""
from __future__ import annotations

import math
import re
from dataclasses import dataclass

_SUFFIXES = {"step": "steps", "ep": "epochs", "epoch": "epochs", "sample": "samples", "%": "%", "percent": "%"}


@dataclass(frozen=True)
class Duration:
    """So much of a unit. `str` of it is a text that `parse` reads back.

    Attributes:
        amount: finite and not negative; whole for steps and samples, at most 100 for percent.
        unit: "steps", "epochs", "samples" or "%".
    """

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str, default_unit: str) -> Duration:
        """Reads "10000" (in `default_unit`), "10000steps", "3ep", "2.5e6samples" or "5%"; else ValueError."""
        match = re.fullmatch(r"\s*((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z%]*)\s*", text.lower())
        suffix = match[2] if match else ""
        unit = _SUFFIXES.get(suffix.removesuffix("s")) if suffix else default_unit
        if match is None or unit is None or not math.isfinite(amount := float(match[1])):
            raise ValueError(
                f"{text!r} is not a duration: write a number of at least 0 with steps, epochs (or ep), samples or % "
                "behind it, such as 10000steps, 3ep, 2.5e6samples or 5%."
            )
        if unit in ("steps", "samples") and not amount.is_integer():
            raise ValueError(f"{text!r} is not a duration: the number of {unit} must be whole.")
        if unit == "%" and amount > 100:
            raise ValueError(f"{text!r} is more than the whole run: write at most 100%.")
        return cls(amount, unit)

    def steps(self, steps_per_epoch: int, global_batch: int, total_steps: int | None = None) -> int:
        """Optimizer steps, rounded to the nearest; at least 1, unless the amount is 0.

        Args:
            steps_per_epoch: optimizer steps in an epoch.
            global_batch: samples of one optimizer step, over all processes.
            total_steps: length of the run, which a percentage is of; without one it raises ValueError.
        """
        if self.unit == "%" and total_steps is None:
            raise ValueError(f"{self} is a share of the run, whose length must be given in another unit.")
        factors = {"epochs": (steps_per_epoch, 1), "samples": (1, global_batch), "%": (total_steps, 100)}
        times, by = factors.get(self.unit, (1, 1))
        return max(math.floor(self.amount * times / by + 0.5), int(self.amount > 0))

    def __str__(self) -> str:
        return f"{int(self.amount) if self.amount.is_integer() else self.amount!r}{self.unit}"
