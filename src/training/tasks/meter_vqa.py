"""METER's visual question answering: a class for each of a list of answers, with soft scores."""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip_elip.fusion.meter import MeterClassifier

from ..data.lists import Item
from ..errors import UserError
from . import vqa
from .base import Batch, Progress
from .downstream import Prepared, Setting, read_answers
from .fused import FusedEncoding
from .momentum import DistilledTask

SCORES = 0.0, 0.3, 0.6, 0.9, 1.0  # of an answer that so many people gave, or more


def read_item(
    item: Item, known: Mapping[str, int] | None = None
) -> tuple[Sequence[str], dict[str, Any]] | str | None:
    """As `vqa.read_item`, with soft scores of the "answers" that people gave. With `known` answers, a question to which
    people gave none of them is left out."""
    found = vqa.read_item(item)
    if isinstance(found, str):
        return found
    pictures, fields = found
    counts = Counter(one for one in fields["people"] if one.strip())
    scores = {answer: SCORES[min(count, len(SCORES) - 1)] for answer, count in counts.items()}
    if known is not None and known.keys().isdisjoint(scores):
        return None
    return pictures, fields | {"answers": scores}


class ScoresEncoding(FusedEncoding):
    """Batches with "targets" (B, answers), see `soft_targets`.

    Args:
        answers: each with its number.
        others: see `FusedEncoding`.
    """

    def __init__(self, *args: Any, answers: Mapping[str, int]):
        super().__init__(*args, text="text")
        self.answers = answers

    def collate(self, encoded: list[tuple[list[Tensor], dict[str, Any]]]) -> dict[str, Any]:
        given = [fields["answers"] for _, fields in encoded]
        return super().collate(encoded) | {"targets": soft_targets(given, self.answers)}


def soft_targets(given: Sequence[Mapping[str, float]], answers: Mapping[str, int]) -> Tensor:
    """(B, answers): how right each of the answers is, of those that people gave to B questions, with their scores."""
    targets = torch.zeros(len(given), len(answers))
    for row, scores in enumerate(given):
        for answer in scores.keys() & answers.keys():
            targets[row, answers[answer]] = scores[answer]
    return targets


def soft_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy with `targets` (B, answers): the sum over answers, the mean over the batch."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(targets)


class AnswersTask(DistilledTask):
    """`soft_loss`; there is no twin.

    Args:
        reduce: remove tokens of the images, guided by the questions.
    """

    def __init__(self, model: MeterClassifier, reduce: bool = False):
        super().__init__(model, alpha=0)
        self.reduce = reduce

    def losses(self, model: nn.Module, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        logits = model(batch["image"], batch["text"], reduce=self.reduce)
        return {"loss": soft_loss(logits.float(), batch["targets"])}


class Choosing(vqa.Ranking):
    """Evaluation: the answer with the largest logit; how right it is is its soft score."""

    def __init__(self, answers: Sequence[str], people: Sequence[Mapping[str, float]], reduce: bool):
        super().__init__(answers, torch.empty(0), people, 0, reduce=reduce)

    def rows(self, model: MeterClassifier, batch: Mapping[str, Any]) -> Tensor:
        return model(batch["image"], batch["text"], reduce=self.reduce).argmax(dim=1, keepdim=True)

    @staticmethod
    def right(said: str, people: Mapping[str, float]) -> float:
        return people.get(said, 0.0)


def prepare(setting: Setting) -> Prepared:
    options, rules = setting.options, setting.rules
    if options.generate:
        raise UserError("--generate is for BLIP models: leave it out.")
    answers = read_answers(options.answers)
    numbers = {answer: number for number, answer in enumerate(answers)}
    if len(numbers) < len(answers):
        raise UserError(f"--answers {options.answers} has an answer twice: give each once.")
    task = AnswersTask(setting.built.model, options.vision_guided_reduction)
    words = setting.words(rules.question, rules.longest_question)
    test = FusedEncoding(setting.transform(False), words, "text")
    task.suite, finish = vqa.evaluated(
        setting, read_item, test, lambda fields: Choosing(answers, [one["answers"] for one in fields], task.reduce)
    )
    train = ScoresEncoding(setting.transform(True), words, answers=numbers)
    return Prepared(task, setting.train_data(partial(read_item, known=numbers), train), finish)
