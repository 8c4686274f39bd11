"""What the tasks after pre-training have in common: samples of JSON lists, evaluation on lists, accuracy."""
from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from open_clip import get_input_dtype
from torch import Tensor, nn

from ..data import ValData
from ..data.pixels import picture_to_tensor, stack, to_device
from ..data.samples import DataReport, Sample
from ..distributed import Ranks
from ..errors import UserError
from ..evaluation.passes import evaluation_mode, gather_rows, run_pass
from ..plan import is_due

if TYPE_CHECKING:  # transformers is imported only where such a model is used
    from open_clip_elip.fusion.tokenizer import WordPieces


class FusedEncoding:
    """Batches {"image": `Images`, "text": (B, L) long, and one tensor for each of `numbers`} of pictures with a text.

    Of several pictures a sample, all first ones come first.

    Args:
        transform: from an RGB picture to (3, H, W).
        tokenizer: of a list of texts.
        text: the field that holds the text, or texts of which one is drawn.
        numbers: fields that hold a number.
    """

    def __init__(
        self, transform: Callable, tokenizer: WordPieces, text: str, numbers: Sequence[str] = ()
    ):
        self.transform, self.tokenizer, self.text, self.numbers = transform, tokenizer, text, numbers

    def encode(self, sample: Sample) -> tuple[list[Tensor], dict[str, Any]]:
        text = sample.fields[self.text]
        fields = sample.fields | {self.text: random.choice(text) if isinstance(text, list) else text}
        return [picture_to_tensor(picture, self.transform) for picture in sample.images], fields

    def collate(self, encoded: list[tuple[list[Tensor], dict[str, Any]]]) -> dict[str, Any]:
        pictures, fields = zip(*encoded, strict=True)
        batch = {
            "image": stack([one for place in zip(*pictures, strict=True) for one in place], self.transform),
            "text": trimmed(self.tokenizer([one[self.text] for one in fields]), self.tokenizer.pad),
        }
        return batch | {name: torch.tensor([one[name] for one in fields]) for name in self.numbers}


def trimmed(text: Tensor, pad: int) -> Tensor:
    """(B, L) without the columns that are padding in all rows."""
    return text[:, : max(1, int((text != pad).sum(dim=1).max()))]


class ListEvaluation:
    """Evaluates a model on a list, every sample once over all processes.

    Args:
        data: this process's batches.
        rows: of a batch on the device, with the model in evaluation: (B, ...) whatever `metrics` takes.
        metrics: of the rows of all samples, in order, and their places in the list.
    """

    def __init__(
        self, data: ValData, rows: Callable[[nn.Module, Mapping[str, Any]], Tensor],
        metrics: Callable[[Tensor, Tensor], dict[str, float]], ranks: Ranks, precision: str,
    ):  # fmt: skip
        self.data, self.rows, self.metrics, self.ranks, self.precision = data, rows, metrics, ranks, precision

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The same on every process; collective. UserError if not one sample is readable."""
        current: dict[str, Any] = {}

        def batches() -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
            for batch in self.data:
                current.clear()
                current.update(to_device(batch, self.ranks.device, get_input_dtype(self.precision)))
                yield batch["index"], (torch.arange(len(batch["index"])),)

        def name(place: int) -> str:
            return f"the answer to sample {place}"

        def rows(which: Tensor) -> Tensor:
            if len(which) < len(current["index"]):  # of what did not fit
                raise UserError("A batch to evaluate does not fit into the memory; lower --batch-size.")
            return self.rows(bare, current)

        with evaluation_mode(model) as bare:
            passed = run_pass(rows, batches(), ranks=self.ranks, precision=self.precision, name=name)
            places, rows = gather_rows(passed, self.ranks)
        skipped = DataReport()
        for report in self.ranks.gather(self.data.report()):
            skipped.merge(report)
        if skipped.skipped and self.ranks.is_main:
            name = getattr(getattr(self.data.source, "rows", None), "name", "the shards")
            logging.warning(f"Evaluated without some samples of {name}: {skipped.summary()}.")
        if rows is None:
            raise UserError("Not one sample of the list to evaluate on is readable; check its pictures.")
        return self.metrics(rows, places) | {"num_samples": float(len(rows))}


def accuracy(rows: Tensor, places: Tensor) -> dict[str, float]:
    """Of rows (n, 1 + C): a label, and the logits of all classes."""
    return {"accuracy": (rows[:, 1:].argmax(dim=1) == rows[:, 0].long()).double().mean().item()}


@dataclass
class ListSuite:
    """What a task is evaluated on as it goes, by the prefix of the metrics; "val" says which checkpoint is best.

    frequency: in epochs. best: the metric that says it.
    """

    evaluations: Mapping[str, Callable[[nn.Module], dict[str, float]]]
    frequency: int
    best: str

    def __call__(self, model: nn.Module, epoch: int, last: bool) -> dict[str, float]:
        """What is due after `epoch`; see `Task.evaluate`."""
        due = self.evaluations if is_due(epoch, self.frequency, last) else {}
        found = {name: evaluate(model) for name, evaluate in due.items()}
        return {f"{name}-{metric}": value for name, metrics in found.items() for metric, value in metrics.items()}

    def score(self, metrics: dict[str, float]) -> float | None:
        """The better one of the weights and their average."""
        name = f"val-{self.best}"
        return max((metrics[key] for key in (name, f"ema/{name}") if key in metrics), default=None)
