"""The work of `training.downstream`."""
from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from open_clip_elip import identity as identities
from open_clip_elip import weights

from .. import checkpoint, run_folder
from ..distributed import Ranks, seed_everything
from ..errors import UserError
from ..models import Built, build_model, check_reduces, check_words, checkpoint_identity, told
from ..options import parse
from ..options.downstream import STARTS, TASKS, DownstreamOptions
from ..options.model import reduction_of
from ..run import Parts, run
from ..tasks.downstream import Setting, read_answers

if TYPE_CHECKING:  # transformers is imported only where such a model is used
    from open_clip_elip.fusion.start import Start

# What a model of a task is. With --evaluate --resume, what is not given of it is as in the checkpoint.
_OF_MODEL = ("task", "model", "vision_guided_reduction", "ema_decay", "adapter", "adapter_rank", *identities.CHANGES)


def work(options: DownstreamOptions, ranks: Ranks, argv: Sequence[str]) -> None:
    """Trains, or evaluates; `argv`: the command line of the options."""
    with ranks.agree():
        if options.evaluate and options.resume is not None:
            options = _of_checkpoint(options, argv)
            options.divide_global_batch(ranks.world_size)
    run(replace(options, logs="none") if options.evaluate else options, ranks, downstream)


def _of_checkpoint(options: DownstreamOptions, argv: Sequence[str]) -> DownstreamOptions:
    """The options of `--evaluate --resume`; what the model is and is not given is as in the checkpoint."""
    resume = run_folder.to_evaluate(options)
    state = checkpoint.load(resume)
    config, answers = state.get("config", {}), state.get("model", {}).get("config", {}).get("answers")
    if config.get("task") is None:
        raise UserError(f"{resume} is not a checkpoint of training.downstream; give it in --pretrained.")
    if options.task not in (None, config["task"]):
        raise UserError(f"{resume} is of --task {config['task']}, not of {options.task}; leave out --task.")
    given = {name: config[name] for name in _OF_MODEL if name in config}
    options = parse(DownstreamOptions, argv, given=given | {"token_reduction": reduction_of(config)})
    if answers is not None:
        _check_answers(answers, read_answers(options.answers, blank=True), resume)
    return replace(options, resume=resume)


def _check_answers(trained: list[str], given: list[str], source: str) -> None:
    if trained != given:
        raise UserError(f"{source} was trained on other answers, or in another order: give their list in --answers.")


def downstream(options: DownstreamOptions, ranks: Ranks, resume: str | None) -> Parts:
    """A task after pre-training; see `run.Build`."""
    with ranks.agree():
        seed_everything(options.seed)
        built = _build(options, ranks)
        start = _start(built, options) if resume is None else None
        prepared = Setting(options, ranks, built).prepare()
        if start is not None:
            _told(start, options, prepared.task.take_over(start.twin, start.queues))
    seed_everything(options.seed + ranks.rank)
    return Parts(built.identity, built.model, *prepared)


def _build(options: DownstreamOptions, ranks: Ranks) -> Built:
    """The model of the task, its weights at random."""
    with told():
        own = identities.describe(options.model, cache_dir=options.cache_dir)
    tasks = [task for family, task in TASKS if family == own.family]
    if options.task not in tasks:
        learns = f"its tasks are {', '.join(tasks)}" if tasks else "only fusion models have tasks, such as ALBEF-B-16"
        raise UserError(f"{options.model} ({own.family}) does not learn --task {options.task}: {learns}.")
    reduction = {"method": "none"}  # no token is removed without the flag
    if options.vision_guided_reduction:
        reduction = options.token_reduction
    answers = None
    if (own.family, options.task) == ("meter", "vqa"):
        answers = read_answers(options.answers, blank=True)
    options_of = replace(options, token_reduction=reduction)
    built = build_model(options_of, ranks.device, filled=False, task=options.task, answers=answers)
    if options.vision_guided_reduction:
        check_reduces(built.model, options.model, alone=options.task == "retrieval")
    return built


def _start(built: Built, options: DownstreamOptions) -> Start:
    """Fills the model with `--pretrained`."""
    from open_clip_elip.fusion.start import start_task

    source, task, own = options.pretrained, options.task, built.identity
    if not weights.is_file(source):
        raise UserError(f"There is no checkpoint at {source}; correct --pretrained.")
    with told():
        content = weights.read(source)
        of = checkpoint_identity(content) or own  # the authors' files do not say
        trained = task if of is own else of.config.get("task", "pretraining")
        if of.family != own.family:
            raise UserError(f"{source} is of a model of the family {of.family}; give one of {own.family}.")
        if trained not in ("pretraining", task, STARTS.get(task)):
            raise UserError(f"{source} is of --task {trained}, which {task} cannot use; give one of pre-training.")
        vocabularies = [one.config["text_cfg"]["hf_tokenizer_name"] for one in (of, own)]
        if options.text_tokenizer is None and vocabularies[0] != vocabularies[1]:
            raise UserError(f"{source} was trained on the vocabulary {vocabularies[0]}; give it in --text-tokenizer.")
        check_words(of.config, own.config, source)
        if other := identities.differences(of, own):
            logging.warning(f"{source} was trained with {', '.join(other)}; give the flags that say so to keep it.")
        if trained == task and "answers" in of.config:
            _check_answers(of.config["answers"], own.config["answers"], source)
        start = start_task(built.model, content, source)
    if options.evaluate and start.new:
        raise UserError(f"{source} has no {start.new[0]}, so it was never trained for {task}; leave out --evaluate.")
    if options.evaluate and start.resized:
        logging.warning(f"{source} is of pictures of another size, {start.resized[0]}: see --force-image-size.")
    return start


def _told(start: Start, options: DownstreamOptions, left: dict[str, str]) -> None:
    """Says what became of each name in `--pretrained`. left: what the task did not take over, and why."""
    told = [f"{len(start.loaded)} weights"]
    for part, found in (("momentum twin", start.twin), ("queues", start.queues)):
        told += [f"its {part}" if part not in left else f"not its {part} ({left[part]})"] if found else []
    told += [f"resized: {', '.join(start.resized)}"] * bool(start.resized)
    told += [f"new here: {', '.join(start.new)}"] * bool(start.new)
    parts = sorted({name.partition(".")[0] for name in start.idle})
    told += [f"not used by --task {options.task}: {', '.join(parts)} ({len(start.idle)} tensors)"] * bool(parts)
    logging.info(f"From {options.pretrained}: {'; '.join(told)}.")
    if start.unknown:
        logging.warning(f"In {options.pretrained}, of no known part, so not used: {', '.join(start.unknown)}.")
