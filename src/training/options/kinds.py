"""What an option may be: from the words of a command line, or of a config file, to a value."""
from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Kind:
    convert: Callable[[str], Any] = str
    phrase: str = ""  # what a word must be
    metavar: str = "TEXT"  # a word, on the help page
    allowed: Callable[[Any], Any] = lambda value: True
    gather: Callable[[list], Any] = list  # from the values of several words to that of an option that takes several

    def __call__(self, word: str) -> Any:
        """The value; ValueError if it is none."""
        try:
            word.replace("\0", "\udcff").encode()  # a file name, or the log, could not hold it
            value = self.convert(word)
            if self.allowed(value):
                return value
        except (ValueError, KeyError):
            pass
        raise ValueError(f"must be {self.phrase or 'plain text'}, not {word!r}")


# No more than the counting of samples can bear, and of numbers what float32 holds.
COUNT = Kind(int, "a whole number from 0 to 10**15", "N", lambda v: 0 <= v <= 10**15)
POSITIVE_COUNT = Kind(int, "a whole number from 1 to 10**15", "N", lambda v: 1 <= v <= 10**15)
SEED = Kind(int, "a whole number from 0 to 2**32 - 1", "N", lambda v: 0 <= v < 2**32)
NUMBER = Kind(float, "a number", "X", lambda v: abs(v) < 1e38)
NOT_NEGATIVE = Kind(float, "a number of at least 0", "X", lambda v: 0 <= v < 1e38)
POSITIVE = Kind(float, "a number above 0", "X", lambda v: 1e-38 < v < 1e38)
FRACTION = Kind(float, "a number from 0 to 1", "X", lambda v: 0 <= v <= 1)
FRACTION_BELOW_1 = Kind(float, "a number from 0 to 1, below 1", "X", lambda v: 0 <= v < 1)
SHARE = Kind(float, "a number from 0 to 1, above 0", "X", lambda v: 0 < v <= 1)
TEXT, NAME, FILE = Kind(), Kind(metavar="NAME"), Kind(Path, metavar="FILE")
DEVICE = Kind(
    str, "cpu, cuda, mps, npu, xpu or hpu, with or without a number (cuda:1)", "NAME",
    lambda value: re.fullmatch(r"(cpu|cuda|mps|npu|xpu|hpu)(:\d+)?", value))  # fmt: skip

_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
SWITCH = Kind(lambda word: _TRUTH[word.lower()], "true or false")  # --x and --no-x


def one_of(*names: str) -> Kind:
    return Kind(str, f"one of {', '.join(names)}", "{" + ",".join(names) + "}", names.__contains__)


def literal(text: str) -> Any:
    """A Python literal if the text is one, or true or false; else the text itself, so that words need no quotes.

    A tuple becomes a list: `1,.9` is one, and a config file can hold it. In lists, texts are read likewise.
    """
    try:
        value = text == "true" if text in ("true", "false") else json.loads(json.dumps(ast.literal_eval(text)))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text
    return [literal(item) if isinstance(item, str) else item for item in value] if isinstance(value, list) else value


def key_value(word: str) -> tuple[str, Any]:
    """`a=[2, 3]` as ("a", [2, 3])."""
    key, equals, value = word.partition("=")
    if not (key and equals):
        raise ValueError
    return key, literal(value)


KEY_VALUES = Kind(key_value, "given as key=value", "KEY=VALUE", gather=dict)
