"""What comes after the pre-training of a fusion model: its options, the table of tasks, and what each is made from."""
from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from open_clip_elip.identity import family_of

from ..data import TrainData, ValData
from ..data.build import build_list_data
from ..data.fusion_augment import MAGNITUDE, ClipRandAugment, FusionTransform
from ..data.lists import ListRows, ReadItem, read_list
from ..data.samples import Encoding
from ..data.sources import RowSource
from ..data.transforms import with_decoding
from ..distributed import Ranks
from ..errors import UserError, reason
from ..evaluation.results import check_folder
from ..files import written_whole
from ..models import Built
from ..options import TrainingOptions
from ..options.data import IMAGE_DECODE
from ..options.fusion import NO_FSDP, ListOptions, QueueOptions, RegularizationOptions, TwinOptions
from ..options.kinds import COUNT, POSITIVE_COUNT, one_of
from ..options.model import AdapterOptions, ImageOptions, ModelOptions, TokenReductionOptions
from ..options.parser import Section, forbid, option
from .base import Task
from .fused import ListEvaluation, ListSuite

if TYPE_CHECKING:  # transformers is imported only where such a model is used
    from open_clip_elip.fusion.tokenizer import Rules

# Family and task to the module and function here that puts it together from a `Setting`.
TASKS = {
    ("albef", "retrieval"): "retrieval.prepare",
    ("albef", "entailment"): "entailment.prepare",
    ("albef", "vqa"): "vqa.prepare",
    ("albef", "nlvr2"): "nlvr2.prepare",
    ("albef", "assignment"): "nlvr2.prepare_assignment",
    ("blip", "retrieval"): "retrieval.prepare",
    ("blip", "captioning"): "captioning.prepare",
    ("blip", "vqa"): "vqa.prepare",
    ("blip", "nlvr2"): "nlvr2.prepare",
    ("meter", "retrieval"): "meter_retrieval.prepare",
    ("meter", "entailment"): "entailment.prepare",
    ("meter", "vqa"): "meter_vqa.prepare",
    ("meter", "nlvr2"): "nlvr2.prepare",
}
# What a task may start from, beside pre-training and itself.
STARTS = {"nlvr2": "assignment"}


@dataclass
class TaskOptions(Section, title="task"):
    task: str | None = option(
        None, "What is learnt: image-text retrieval, visual entailment (SNLI-VE), answers to questions (VQA), NLVR2, "
        "text assignment, a step between pre-training and NLVR2, or to write captions.",
        one_of(*dict.fromkeys(task for _, task in TASKS)))
    evaluate: bool = option(
        False, "Train nothing: evaluate the checkpoint of --resume, or the fine-tuned weights in --pretrained.")
    val_frequency: int = option(1, "Evaluate every N epochs and after the last; 0: never.", COUNT)
    image_decode: str = option("fast", "How images are decoded, one of the ways of training.main.", IMAGE_DECODE)
    vision_guided_reduction: bool = option(
        False, "Reduce the image tokens here too, in training and evaluation: guided by the sentence or question; in "
        "retrieval, where ALBEF and BLIP encode an image without its captions, by the image alone.")
    shortlist: int = option(
        128, "How many candidates by cosine are ranked again by the fusion layers.", POSITIVE_COUNT,
        needs="the_task=retrieval")
    all_rank_negatives: bool = option(
        False, "A BLIP model's negatives come from the batches of all processes (its recipe for COCO).",
        needs="the_task=retrieval")
    answers: str | None = option(
        None, "JSON list of the answers to choose from.", metavar="FILE.json", path=True, needs="the_task=vqa")
    vqa_best: int = option(
        128, "Of how many answers, by their first word piece, the rest is looked at.", POSITIVE_COUNT,
        needs="the_task=vqa")
    generate: bool = option(
        False, "A BLIP model writes its answers instead of choosing them.", needs="the_task=vqa")
    count_first_once: bool = option(
        False, "Rank an ALBEF model's answers by their own probability. Without it that of the first word piece counts "
        "twice, as in its released program and numbers.", needs="the_task=vqa")
    submission: str | None = option(
        None, "Where the final answers to --test-data (--val-data without it) go, as VQA's server takes them; or the "
        "captions, as COCO's does.", metavar="FILE.json", path=True, needs="the_task=vqa|captioning")


@dataclass
class DownstreamOptions(
    TaskOptions, ListOptions, ModelOptions, AdapterOptions, TokenReductionOptions, TwinOptions, QueueOptions,
    RegularizationOptions, ImageOptions, TrainingOptions,
    command="training.downstream",
):  # fmt: skip
    model: str | None = None

    @property
    def trains(self) -> bool:
        return not self.evaluate

    @property
    def the_task(self) -> str:
        """With --resume, not known before the checkpoint is read: any."""
        return self.task or ",".join(task for _, task in TASKS)

    @property
    def meter_models(self) -> bool:
        return self.model is not None and family_of(self.model) == "meter"

    @property
    def momentum_twin(self) -> bool:
        return not self.meter_models

    def check(self) -> None:
        lists, loads = bool(self.val_data or self.test_data), self.resume is not None and self.evaluate
        assigns, reduces = self.task == "assignment", self.vision_guided_reduction
        chooses = self.task == "vqa" and not self.generate
        checkpoint = "the checkpoint of pre-training, or with --evaluate that of the task"
        for wrong, sentence in (
            (self.task is None and not loads, "--task is missing: say which task the model is to learn."),
            (self.model is None and not loads, "--model is missing: give its name, as in --model ALBEF-B-16."),
            (self.trains and not self.train_data, "--train-data is missing: give lists to train on, or --evaluate."),
            (assigns and lists | self.evaluate, "--task assignment is not evaluated: leave out --evaluate and lists."),
            (not lists and bool(self.evaluate or self.submission), "There is nothing to evaluate on: give --val-data."),
            (not self.pretrained and not loads, f"--pretrained is missing: give {checkpoint}."),
            (chooses and lists and not self.answers, "--answers is missing: give the list to choose from."),
            (self.task == "captioning" and reduces, "Nothing guides captioning: leave out --vision-guided-reduction."),
            (assigns and reduces, "--task assignment compares whole images: leave out --vision-guided-reduction."),
            (bool(self.token_reduction) and not reduces, "--token-reduction needs --vision-guided-reduction here."),
            (self.fsdp, NO_FSDP),
        ):
            forbid(wrong, sentence)


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
