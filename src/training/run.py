"""The skeleton of a run: its folder, what it continues, its parts, its log, the training, and the end."""
from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from open_clip_elip.identity import Identity

from . import checkpoint, run_folder
from .auto_batch import find_batch_size
from .data import TrainData
from .distributed import Ranks
from .ema import Ema
from .figures import describe
from .log import RunLog, setup_logging
from .models import check_words, wrap
from .optim import create_optimizer
from .options import TrainingOptions, resolved
from .options.run import AUTO
from .remote import RemoteSync
from .sharding import check_optimizer
from .tasks.base import Engine, Task
from .trainer import Trainer, evaluate_task


@dataclass(frozen=True)
class Parts:
    """What a run is put together from."""

    identity: Identity  # goes into the checkpoints
    model: nn.Module  # bare, on the device
    task: Task
    train_data: TrainData | None  # None only evaluates
    # What is left to do at the end, on all ranks: with the model, the averages of its weights (if there are any), the
    # metrics of the final weights ({}: they were not evaluated) and the run's folder (if there is one).
    finish: Callable[[nn.Module, Ema | None, dict[str, float], Path | None], None] | None = None


# From the options, this process and the checkpoint that is continued (if any). Draws random numbers from `--seed` for
# the model and leaves each rank with its own. Called on all ranks; a `UserError` is raised on all of them.
Build = Callable[[TrainingOptions, Ranks, str | None], Parts]


def run(options: TrainingOptions, ranks: Ranks, build: Build) -> None:
    """Puts the parts together, checks them on all ranks before anything is written, and trains."""
    # open_clip's loss calls it; nothing a person who trains can change.
    warnings.filterwarnings("ignore", message="torch.distributed.nn.functional.all_gather is deprecated")
    if ranks.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True

    options.name = ranks.broadcast(options.name or run_folder.default_name(options))
    folder = None if options.logs.lower() == "none" else Path(options.logs) / options.name
    with ExitStack() as stack:
        sync, resume = None, None
        with ranks.agree():
            if ranks.is_main:
                stack.enter_context(run_folder.claimed(folder))
                run_folder.check_unused(folder, options)
                if options.remote_sync is not None and folder is not None:
                    target = f"{options.remote_sync.rstrip('/')}/{options.name}"
                    sync = RemoteSync(folder, target, options.remote_sync_frequency)
                    sync.fetch_newest() if options.resume == "latest" else sync.check_unused()
                resume = run_folder.find_resume(options, folder)
        resume = ranks.broadcast(resume)

        sentences = _settle_batch(options, ranks, build, resume)
        parts = build(options, ranks, resume)
        model, task = parts.model, parts.task
        described = {"config": resolved(options), "model": parts.identity.to_dict()}
        trainer, averages, epoch = None, None, 0
        runnable = model if parts.train_data is None else wrap(model, options, ranks, **task.ddp_options())
        with ranks.agree():
            if parts.train_data is not None:
                optimizer = create_optimizer(task.parameters(model, options), options)
                check_optimizer(optimizer, options.opt)
                trainer = Trainer(options, ranks, model, runnable, task, parts.train_data, optimizer, folder, described)
            if resume is not None:
                averages, epoch = _continue(resume, trainer, parts, options)

        with ranks.agree():  # only now is anything written: a run that cannot start leaves nothing behind
            step = trainer.steps if trainer else 0
            wandb_options = {
                "project": options.wandb_project_name, "name": options.name, "notes": options.wandb_notes,
                "resume": "allow" if step else None, "config": described["config"],
            }  # fmt: skip
            run_log = RunLog(folder, options.report_to, enabled=ranks.is_main, step=step, wandb_options=wandb_options)
            if ranks.is_main and folder is not None:
                run_folder.create(folder, described["config"], copy_codebase=options.copy_codebase)
        log_file = None
        if folder is not None and (ranks.is_main or options.log_local):
            log_file = folder / (f"out-{ranks.rank}" if options.log_local else "out.log")
        setup_logging(logging.DEBUG if options.debug else logging.INFO, log_file, console=ranks.is_main)
        logging.info(f"{ranks.world_size} process(es), {ranks.device}, precision {options.precision}.")
        for sentence in (_in_words(parts), *sentences):
            logging.info(sentence)
        if resume is not None:
            logging.info(f"Continuing from {resume}" + (f", after step {trainer.steps}." if trainer else "."))
        with ranks.agree():
            if sync is not None:
                sync.start()
                stack.callback(sync.close)
        stack.callback(run_log.close)

        if trainer is not None:
            logging.info(parts.train_data.describe())
            trainer.fit(run_log)
            of_these_weights = [row for row in run_log.results if row.get("epoch") == trainer.epoch]
            averages, metrics = trainer.ema, ranks.broadcast((of_these_weights or [{}])[-1])
        else:
            engine = Engine(model, options.precision, ranks.device)
            metrics = {"epoch": epoch, **evaluate_task(task, model, averages, engine, epoch, last=True)}
            run_log.evaluation(metrics, 0)
            logging.info("Evaluation: " + describe(metrics))
        if parts.finish is not None:
            parts.finish(model, averages, metrics, folder)
    if folder is not None:
        logging.info(f"The run is in {folder}.")


def _settle_batch(options: TrainingOptions, ranks: Ranks, build: Build, resume: str | None) -> list[str]:
    """Gives the options the numbers behind `--batch-size auto`, a continued run's own, and `--lr-base-batch`; returns
    what to say of it."""
    sentences: list[str | None] = []
    if options.batch_size == AUTO:
        with ranks.agree():
            plan = checkpoint.load(resume).get("plan") if ranks.is_main and resume is not None else None
        if (plan := ranks.broadcast(plan)) is not None:
            options.batch_size = plan["batch_size"]
            sentences.append(f"--batch-size auto: {options.batch_size}, as in the run that goes on.")
        else:
            options.batch_size, sentence = find_batch_size(options, ranks, build)
            sentences.append(sentence)
        options.memory = None  # of no use beside the number
    sentences.append(options.scale_lr(ranks.world_size))
    return [sentence for sentence in sentences if sentence]


def _continue(
    resume: str, trainer: Trainer | None, parts: Parts, options: TrainingOptions
) -> tuple[Ema | None, int]:
    """Loads a checkpoint to train on from, or without a trainer to evaluate: its averages then, and its epoch."""
    state = checkpoint.load(resume)
    if isinstance(trained := state.get("model"), Mapping) and "config" in trained:
        check_words(trained["config"], parts.identity.config, resume)
    if trainer is not None:
        trainer.load_state_dict(state, resume)
        return None, trainer.epoch
    averages = checkpoint.restore(parts.model, state, resume, ema_decay=options.ema_decay)
    return averages if state.get("ema") else None, state.get("epoch", 0)


def _in_words(parts: Parts) -> str:
    text = f"{parts.identity.name}: {sum(p.numel() for p in parts.model.parameters()) / 1e6:.1f} M parameters"
    tower = getattr(parts.model, "tower", None)
    if tower is not None and tower.reduction is not None:
        text += f", RRT in training {tower.rrt():.1%} (tokens per layer {tower.token_counts()})"
    if (texts := getattr(parts.model, "text_reduction", None)) is not None:
        text += f", {texts.keep:.0%} of the text tokens in the second half of the layers ({texts.rule})"
    return text
