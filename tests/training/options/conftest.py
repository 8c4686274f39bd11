"""What the tests of options share."""
from __future__ import annotations

import pytest

from training.errors import UserError
from training.options import Section, parse
from training.options.main import PretrainingOptions

SYNTHETIC = ["--dataset-type", "synthetic"]  # the shortest command line that has something to do


@pytest.fixture
def config(tmp_path):
    """Writes a config file; returns the words that name it."""

    def write(text: str, name: str = "run.yaml") -> list[str]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return ["--config", str(path)]

    return write


def parse_args(argv: list[str]) -> PretrainingOptions:
    return parse(PretrainingOptions, argv)


def complaint(argv: list[str], options: type[Section] = PretrainingOptions) -> str:
    with pytest.raises(UserError) as error:
        parse(options, argv)
    return str(error.value)
