"""METER's visual question answering: a class for each of a list of answers, with soft scores."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip_elip.fusion.meter import MeterClassifier

from ..errors import UserError
from . import vqa
from .base import Batch, Progress
from .downstream import Prepared, Setting, read_answers
from .fused import FusedEncoding
from .momentum import DistilledTask


class ScoresEncoding(FusedEncoding):
    """Batches with "targets" (B, answers), see `soft_targets`.

    Args:
        answers: how many there are.
        others: see `FusedEncoding`.
    """

    def __init__(self, *args: Any, answers: int):
        super().__init__(*args, text="text")
        self.answers = answers

    def collate(self, encoded: list[tuple[list[Tensor], dict[str, Any]]]) -> dict[str, Any]:
        labels = [fields["labels"] for _, fields in encoded]
        return super().collate(encoded) | {"targets": soft_targets(labels, self.answers)}


def soft_targets(labels: Sequence[Mapping[int, float]], answers: int) -> Tensor:
    """(B, answers): how right each answer is to B questions, whose `labels` have its number if it is at all."""
    targets = torch.zeros(len(labels), answers)
    for row, scores in enumerate(labels):
        for number, score in scores.items():
            targets[row, number] = score
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

    def __init__(self, answers: Sequence[str], labels: Sequence[Mapping[int, float]], reduce: bool):
        people = [{answers[number]: score for number, score in scores.items()} for scores in labels]
        super().__init__(answers, torch.empty(0), people, 0, reduce=reduce)

    def rows(self, model: MeterClassifier, batch: Mapping[str, Any]) -> Tensor:
        return model(batch["image"], batch["text"], reduce=self.reduce).argmax(dim=1, keepdim=True)


def prepare(setting: Setting) -> Prepared:
    options, rules = setting.options, setting.rules
    if options.generate:
        raise UserError("--generate is for BLIP models: leave it out.")
    answers = read_answers(options.answers, blank=True)
    numbers = {answer: number for number, answer in enumerate(answers)}
    if len(numbers) < len(answers):
        raise UserError(f"--answers {options.answers} has an answer twice: give each once.")
    task = AnswersTask(setting.built.model, options.vision_guided_reduction)
    words, read = setting.words(rules.question, rules.longest_question), partial(vqa.read_labels, numbers=numbers)
    test = FusedEncoding(setting.transform(False), words, "text")
    task.suite, finish = vqa.evaluated(
        setting, read, test, lambda fields: Choosing(answers, [one["labels"] for one in fields], task.reduce)
    )
    train = ScoresEncoding(setting.transform(True), words, answers=len(answers))
    return Prepared(task, setting.train_data(partial(read, train=True), train), finish)
