"""What had to be left out of the data, and why."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

MAX_EXAMPLES = 5


@dataclass
class DataReport:
    """Counts of what was skipped.

    skipped: reason -> how often, such as {"unreadable image": 2, "broken shard": 1}
    examples: the first few cases as "shard: key: error"
    """

    skipped: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def add(self, reason: str, example: str) -> None:
        self.merge({reason: 1}, [example])

    def merge(self, skipped: Mapping[str, int], examples: Iterable[str]) -> None:
        for reason, count in skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
        self.examples = [*self.examples, *examples][:MAX_EXAMPLES]

    def clear(self) -> None:
        self.skipped, self.examples = {}, []

    def sentence(self) -> str:
        """One line for the log; empty when nothing was skipped."""
        return f"Skipped in the data: {self.summary()}." if self.skipped else ""

    def summary(self) -> str:
        counts = ", ".join(f"{count} x {reason}" for reason, count in sorted(self.skipped.items()))
        return f"{counts} (for example {'; '.join(self.examples[:2])})" if self.examples else counts
