"""What comes after the pre-training of a fusion model: what each task is made from."""
from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from ..data import TrainData, ValData
from ..data.build import build_list_data
from ..data.fusion_augment import MAGNITUDE, ClipRandAugment, FusionTransform
from ..data.lists import ListRows, ReadItem, read_list
from ..data.samples import Encoding
from ..data.sources import RowSource
from ..data.transforms import with_decoding
from ..distributed import Ranks
from ..errors import UserError, reason
from ..files import check_folder, written_whole
from ..models import Built
from ..options.downstream import TASKS, DownstreamOptions
from .base import Task
from .fused import ListEvaluation, ListSuite

if TYPE_CHECKING:  # transformers is imported only where such a model is used
    from open_clip_elip.fusion.tokenizer import Rules


def read_answers(file: str | None, blank: bool = False) -> list[str]:
    """The answers to choose from, of `--answers`; UserError unless they are texts. blank: these may be empty, as
    normalised ones are."""
    if file is None:
        raise UserError("--answers is missing: give the list to choose from.")
    answers = read_list(file, "--answers")
    for number, answer in enumerate(answers):
        if not isinstance(answer, str) or not (blank or answer.strip()):
            raise UserError(f"Answer {number} of {file} is {answer!r}, not a text: correct the list.")
    return answers


class Prepared(NamedTuple):
    """A task, its training data (None: it is evaluated), and what is left to do at the end (see `run.Parts`)."""

    task: Task
    train_data: TrainData | None
    finish: Callable | None = None


@dataclass
class Setting:
    """What a task is put together from. The model is filled."""

    options: DownstreamOptions
    ranks: Ranks
    built: Built

    def prepare(self) -> Prepared:
        module, function = TASKS[self.built.identity.family, self.options.task].split(".")
        return getattr(importlib.import_module(f"{__package__}.{module}"), function)(self)

    @property
    def rules(self) -> Rules:
        """How texts are cleaned and cut."""
        from open_clip_elip.fusion.tokenizer import RULES

        return RULES[self.built.identity.family]

    @property
    def place(self) -> dict[str, int]:
        return {"rank": self.ranks.rank, "world_size": self.ranks.world_size}

    def words(self, clean: Callable[[str], str], length: int | None = None) -> Callable[[list[str]], Tensor]:
        """Texts to token ids, cleaned, and cut at `length` tokens; None: only at what the model has positions for."""
        tokenizer = copy.copy(self.built.tokenizer)
        positions = self.built.identity.config["text_cfg"]["bert"].get("max_position_embeddings", 512)
        tokenizer.clean, tokenizer.context_length = clean, min(length or positions, positions)
        return tokenizer

    def transform(self, train: bool, scale: tuple[float, float] = (0.5, 1.0)) -> Callable:
        """Pictures to tensors; see `FusionTransform`, which is that of training."""
        family = self.built.identity.family
        if train and family in MAGNITUDE:
            return FusionTransform(self.built.identity.preprocess, scale, MAGNITUDE[family])
        plain = with_decoding(self.built.transform, self.options.image_decode)
        return ClipRandAugment(plain) if train else plain

    def twin(self) -> dict[str, Any]:
        """Arguments of a `DistilledTask`."""
        options = self.options
        alpha = options.twin_weight if options.trains and self.built.model.taught else 0
        return {"momentum": options.twin_momentum, "alpha": alpha, "dropout": options.twin_dropout}

    def train_data(self, read: ReadItem, encoding: Encoding) -> TrainData | None:
        return build_list_data(self.options, read, encoding, **self.place) if self.options.trains else None

    def lists(self) -> dict[str, str]:
        """What to evaluate on, by the prefix of the metrics."""
        named = {"val": self.options.val_data, "test": self.options.test_data}
        return {name: file for name, file in named.items() if file is not None}

    def rows(self, name: str, read: ReadItem) -> ListRows:
        return ListRows([self.lists()[name]], self.options.image_root, read, f"--{name}-data")

    def evaluation(self, rows: ListRows, encoding: Encoding, score: Callable, metrics: Callable) -> ListEvaluation:
        """See `ListEvaluation` for `score` and `metrics`."""
        data = ValData(RowSource(rows), encoding, self.options, **self.place, num_samples=len(rows))
        return ListEvaluation(data, score, metrics, self.ranks, self.options.precision)

    def submission(self, evaluate: Callable[[nn.Module], Any], submitted: Callable[[], list]) -> Callable | None:
        """What writes, at the end, `submitted` of the last evaluation to `--submission`; it evaluates if there was none
        (`submitted` is empty). None without the flag."""
        if self.options.submission is None:
            return None
        path = Path(self.options.submission)
        check_folder(path.parent, "--submission")
        if path.is_dir():
            raise UserError(f"--submission {path} is a folder; name a file.")

        def submit(model: nn.Module, *found: Any) -> None:
            if not (content := submitted()):
                evaluate(model)
                content = submitted()
            with self.ranks.agree():
                if self.ranks.is_main:
                    try:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        with written_whole(path) as file:
                            file.write(json.dumps(content).encode() + b"\n")
                    except OSError as error:
                        why = reason(error)
                        raise UserError(f"--submission cannot be written ({why}); name another file.") from error

        return submit

    def suite(self, evaluations: Mapping[str, Callable], best: str) -> ListSuite:
        """See `ListSuite`."""
        return ListSuite(evaluations, self.options.val_frequency if self.options.trains else 1, best)
