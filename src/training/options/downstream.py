"""Options of what comes after the pre-training of a fusion model, and the table of its tasks."""
from __future__ import annotations

from dataclasses import dataclass

from .data import IMAGE_DECODE
from .fusion import NO_FSDP, ListOptions, QueueOptions, RegularizationOptions, TwinOptions
from .kinds import COUNT, POSITIVE_COUNT, one_of
from .model import AdapterOptions, ImageOptions, ModelOptions, TokenReductionOptions
from .parser import Section, forbid, option
from .run import TrainingOptions

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
        None, "JSON list of the answers to choose from.", metavar="FILE.json", path=True,
        needs="the_task=vqa !generate")
    vqa_best: int = option(
        128, "Of how many answers, by their first word piece, the rest is looked at.", POSITIVE_COUNT,
        needs="the_task=vqa !generate")
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
