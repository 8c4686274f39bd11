"""The options of methods: plain types in and out, as in a model's JSON, which check themselves."""
from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class ReductionConfig:
    """Base of the methods' options; one that is out of its range, or contradicts another, is a ValueError.

    Attributes:
        alternatives: options that say the same thing in several ways.
    """

    alternatives = frozenset()

    @classmethod
    def from_dict(cls, options: dict) -> ReductionConfig:
        """Builds the configuration from plain types; an unknown key is a ValueError."""
        known = [f.name for f in fields(cls)]
        for key in options:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known) or 'none'}."
                raise ValueError(f"Unknown token_reduction option {key!r}; {hint}")
        return cls(**options)

    def to_dict(self) -> dict:
        """Plain types (lists, numbers, strings), without what is None; `from_dict` reads it back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v is not None}

    def _or_target(self, name: str, default: object) -> bool:
        """Whether the option `name` counts, not `target_rrt`; sets it if neither is given, and checks the latter."""
        if getattr(self, name) is not None and self.target_rrt is not None:
            raise ValueError(f"Give either {name} or target_rrt, not both.")
        if self.target_rrt is not None:
            check_number("target_rrt", self.target_rrt, 0, 0.95, "a number from 0 to 0.95")
        elif getattr(self, name) is None:
            object.__setattr__(self, name, default)
        return self.target_rrt is None


def check_number(name: str, value: object, low: float, high: float, meaning: str, whole: bool = False) -> None:
    """Raises ValueError unless `value` is a number in [low, high]."""
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise ValueError(f"{name} must be {meaning}; got {value!r}.")


def check_switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false; got {value!r}.")
