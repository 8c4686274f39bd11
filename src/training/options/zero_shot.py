"""Options of zero-shot classification."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .evaluation import EvaluationOptions
from .kinds import FILE, one_of
from .parser import option


@dataclass
class ZeroShotOptions(EvaluationOptions, title="classes and prompts", command="training.zero_shot"):
    split: str = option("test", "Split of the data.", one_of("train", "val", "test"))
    templates: str | None = option(
        None, "Prompts: OpenAI's 80 for ImageNet, its 7 best, or one a line with {} for the name. Without it: those of "
        "the data.", metavar="openai|simple|FILE")
    classnames: Path | None = option(
        None, "Class names instead of the data's own: a file as classnames.txt.", FILE, path=True)
