"""The skeleton of a run: its folder, what it continues, its parts, its log, the training, and the end."""
from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from open_clip_elip.identity import Identity

from . import checkpoint, remote, run_folder
from .data import TrainData
from .distributed import Ranks
from .ema import Ema
from .figures import describe
from .log import RunLog, setup_logging
from .models import wrap
from .optim import create_optimizer
from .options import TrainingOptions, resolved
from .sharding import check_optimizer
from .tasks.base import Engine, Task
from .trainer import Trainer, evaluate_task


@dataclass(frozen=True)
class Parts:
    """What a run is put together from.

    Attributes:
        identity: what the model is; goes into its checkpoints.
        model: bare, on the device.
        task: what is learnt, and what is evaluated.
        train_data: None only evaluates.
        finish: what is left to do once the run is over, on all ranks: called with the model, the averages of its
            weights (None: there are none), the metrics of the final weights ({}: they were not evaluated) and the
            run's folder (None: there is none).
    """

    identity: Identity
    model: nn.Module
    task: Task
    train_data: TrainData | None
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
    synced = options.remote_sync is not None and folder is not None
    target = f"{options.remote_sync.rstrip('/')}/{options.name}" if synced else None
    with ExitStack() as stack:
        with ranks.agree():
            stack.enter_context(run_folder.claimed(folder if ranks.is_main else None))
        _run_in(folder, target, options, ranks, build)


def _run_in(folder: Path | None, target: str | None, options: TrainingOptions, ranks: Ranks, build: Build) -> None:
    """The rest of `run`, while its folder is claimed. `target`: where its copy is kept."""
    with ranks.agree():
        resume = None
        if ranks.is_main:
            run_folder.check_unused(folder, options)
            if target is not None and options.resume == "latest":
                remote.fetch_newest(target, folder)
            elif target is not None:
                remote.check_unused(target)
            resume = run_folder.find_resume(options, folder)
    resume = ranks.broadcast(resume)

    parts = build(options, ranks, resume)
    model, task, config = parts.model, parts.task, resolved(options)
    trainer, averages = None, None
    runnable = model if parts.train_data is None else wrap(model, options, ranks, **task.ddp_options())
    with ranks.agree():
        if parts.train_data is not None:
            optimizer = create_optimizer(task.parameters(model, options), options)
            check_optimizer(optimizer, options.opt)
            described = {"config": config, "model": parts.identity.to_dict()}
            trainer = Trainer(options, ranks, model, runnable, task, parts.train_data, optimizer, folder, described)
        if resume is not None:
            averages = _continue(resume, trainer, model, options)

    with ranks.agree():  # only now is anything written: a run that cannot start leaves nothing behind
        run_log = _open_log(options, ranks, folder, config, step=trainer.steps if trainer else 0)
        if ranks.is_main and folder is not None:
            run_folder.create(folder, config, copy_codebase=options.copy_codebase)
    ranks.barrier()
    log_file = None
    if folder is not None and (ranks.is_main or options.log_local):
        log_file = folder / (f"out-{ranks.rank}" if options.log_local else "out.log")
    setup_logging(logging.DEBUG if options.debug else logging.INFO, log_file, console=ranks.is_main)
    _introduce(options, ranks, parts)
    if resume is not None:
        logging.info(f"Continuing from {resume}" + (f", after step {trainer.steps}." if trainer else "."))

    sync = None
    with ranks.agree():
        if target is not None and ranks.is_main:
            sync = remote.RemoteSync(folder, target, options.remote_sync_frequency)
            sync.start()
    try:
        if trainer is not None:
            logging.info(parts.train_data.describe())
            trainer.fit(run_log)
            averages, metrics = trainer.ema, ranks.broadcast(run_log.last_evaluation)
            if metrics.get("epoch") != trainer.epoch:
                metrics = {}  # of older weights
        else:
            engine = Engine(model, options.precision, ranks.device)
            metrics = {"epoch": 0, **evaluate_task(task, model, averages, engine, 0, last=True)}
            run_log.evaluation(metrics, 0)
            logging.info("Evaluation: " + describe(metrics))
        if parts.finish is not None:
            parts.finish(model, averages, metrics, folder)
    finally:
        run_log.close()
        if sync is not None:
            sync.close()
    if folder is not None:
        logging.info(f"The run is in {folder}.")


def _continue(resume: str, trainer: Trainer | None, model: nn.Module, options: TrainingOptions) -> Ema | None:
    """Loads a checkpoint to train on from, or without a trainer to evaluate, with its averages."""
    state = checkpoint.load(resume)
    if trainer is not None:
        trainer.load_state_dict(state, resume)
        return None
    checkpoint.load_weights(model, state.get("state_dict", state), resume)
    if options.ema_decay is None or not state.get("ema"):
        return None
    averages = Ema(model, options.ema_decay)
    averages.load_state_dict(state["ema"], state["ema_updates"])
    return averages


def _introduce(options: TrainingOptions, ranks: Ranks, parts: Parts) -> None:
    logging.info(f"{ranks.world_size} process(es), {ranks.device}, precision {options.precision}.")
    text = f"{parts.identity.name}: {sum(p.numel() for p in parts.model.parameters()) / 1e6:.1f} M parameters"
    tower = getattr(parts.model, "tower", None)
    if tower is not None and tower.reduction is not None:
        text += f", RRT in training {tower.rrt():.1%} (tokens per layer {tower.token_counts()})"
    logging.info(text)


def _open_log(options: TrainingOptions, ranks: Ranks, folder: Path | None, config: dict[str, Any], step: int) -> RunLog:
    reports = frozenset(options.report_to.split(","))
    wandb_options = {
        "project": options.wandb_project_name, "name": options.name, "id": options.name, "notes": options.wandb_notes,
        "resume": "allow" if step else None, "config": config,
    }  # fmt: skip
    return RunLog(
        folder,
        enabled=ranks.is_main,
        report_to=frozenset({"tensorboard", "wandb"}) if "all" in reports else reports,
        step=step,
        wandb_options=wandb_options,
    )
