"""Contrastive pre-training with token reduction. An OpenCLIP training command line works here unchanged.

One process:      python -m training.main --model ViT-S-16-ELIP --train-data '/data/cc3m/{00000..00331}.tar' ...
Four GPUs:        torchrun --nproc_per_node 4 -m training.main ...
Two nodes:        torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \
                      -m training.main ...
From a recipe:    torchrun --nproc_per_node 4 -m training.main --config configs/NAME.yaml --name my-run
"""
from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import checkpoint, remote, run_folder
from .control import Stopped
from .cost import memory_estimate
from .data import TrainData, build_train_data, build_val_data
from .data.transforms import with_decoding
from .distributed import Ranks, end, init_ranks, launch_rank, leave, seed_everything
from .ema import Ema
from .errors import EXIT_USER_ERROR, UserError
from .log import RunLog, setup_logging
from .models import build_model, build_teacher, wrap
from .optim import create_optimizer
from .options.params import PRETRAINING, Command, parse_args, resolved_config
from .sharding import check_optimizer
from .tasks.contrastive import ClipTask, Task, training_rrt
from .trainer import Trainer, describe, evaluate
from .zero_shot import load_zero_shot_data


@dataclass(frozen=True)
class Parts:
    """What a run is put together from.

    Attributes:
        model: bare, on the device.
        task: what is learnt, and what is evaluated.
        train_data: None only evaluates.
        finish: what is left to do once the run is over, on all ranks: called with the model, the averages of its
            weights (None: there are none), the metrics of the final weights ({}: they were not evaluated) and the
            run's folder (None: there is none).
    """

    model: nn.Module
    task: Task
    train_data: TrainData | None
    finish: Callable[[nn.Module, Ema | None, dict[str, float], Path | None], None] | None = None


# From the flags, this process and the checkpoint that is continued (if any). Draws random numbers from `--seed` for the
# model and leaves each rank with its own. Called on all ranks; a `UserError` is raised on all of them.
Build = Callable[[argparse.Namespace, Ranks, str | None], Parts]


def main(argv: list[str] | None = None) -> int:
    """Runs one training (or, without training data, one evaluation) and returns the exit code."""
    return command_line(PRETRAINING, lambda args, ranks: run(args, ranks, PRETRAINING, pretraining), argv)


def command_line(
    command: Command, work: Callable[[argparse.Namespace, Ranks], None], argv: list[str] | None = None
) -> int:
    """Reads the options, starts the process group and works; what ends in order is told in one sentence.

    Args:
        argv: words of the command line; None takes the program's.

    Returns:
        The exit code.
    """
    setup_logging(logging.INFO, None, console=launch_rank() == 0)
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv, command)
        ranks = init_ranks(args.device, args.dist_backend, args.dist_url, args.no_set_device_rank)
        work(args, ranks)
    except Stopped as stopped:
        logging.warning(str(stopped))
        return stopped.code
    except UserError as error:
        if launch_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    finally:
        leave()
    return 0


def pretraining(args: argparse.Namespace, ranks: Ranks, resume: str | None) -> Parts:
    """Contrastive training on image-text pairs."""
    with ranks.agree():
        seed_everything(args.seed)
        model, preprocess_train, preprocess_val, tokenizer = build_model(args, ranks.device)
        seed_everything(args.seed + ranks.rank)
        place = {"rank": ranks.rank, "world_size": ranks.world_size}
        train_data = build_train_data(args, preprocess_train, tokenizer, **place)
        val_data = build_val_data(args, preprocess_val, tokenizer, **place)
        zero_shot_data = load_zero_shot_data(args)
        preprocess_val = with_decoding(preprocess_val, args.image_decode)
        teacher = build_teacher(args, ranks.device)
        task = ClipTask(args, ranks, tokenizer, preprocess_val, val_data, zero_shot_data, teacher)
        check_memory(model, args, ranks)
    return Parts(model, task, train_data)


def run(args: argparse.Namespace, ranks: Ranks, command: Command, build: Build) -> None:
    """Puts the parts together, checks them on all ranks before anything is written, and trains.

    Args:
        command: the one that `args` were read for.
        build: makes model, data and task.
    """
    # open_clip's loss calls it; nothing a person who trains can change.
    warnings.filterwarnings("ignore", message="torch.distributed.nn.functional.all_gather is deprecated")
    if ranks.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True

    args.name = ranks.broadcast(args.name or run_folder.default_name(args))
    folder = None if args.logs.lower() == "none" else Path(args.logs) / args.name
    target = None if args.remote_sync is None or folder is None else f"{args.remote_sync.rstrip('/')}/{args.name}"
    config = resolved_config(args, command)
    with ranks.agree():
        resume = None
        if ranks.is_main:
            run_folder.check_unused(folder, args)
            if target is not None and args.resume == "latest":
                remote.fetch_newest(target, folder)
            elif target is not None:
                remote.check_unused(target)
            resume = run_folder.find_resume(args, folder)
    resume = ranks.broadcast(resume)

    parts = build(args, ranks, resume)
    model, task, train_data = parts.model, parts.task, parts.train_data
    runnable = model if train_data is None else wrap(model, args, ranks)
    with ranks.agree():
        trainer = averages = None
        if train_data is not None:
            optimizer = create_optimizer(model, args)
            check_optimizer(optimizer, args.opt)
            trainer = Trainer(args, ranks, model, runnable, task, train_data, optimizer, folder, config)
        if resume is not None:
            state = checkpoint.load(resume)
            if trainer is not None:
                trainer.load_state_dict(state, resume)
            else:
                checkpoint.load_weights(model, state.get("state_dict", state), resume)
                if args.ema_decay is not None and state.get("ema"):
                    averages = Ema(model, args.ema_decay)
                    averages.load_state_dict(state["ema"], state["ema_updates"])

    with ranks.agree():  # only now is anything written: a run that cannot start leaves nothing behind
        if ranks.is_main and folder is not None:
            run_folder.create(folder, config, copy_codebase=args.copy_codebase)
    ranks.barrier()
    log_file = None
    if folder is not None and (ranks.is_main or args.log_local):
        log_file = folder / (f"out-{ranks.rank}" if args.log_local else "out.log")
    setup_logging(logging.DEBUG if args.debug else logging.INFO, log_file, console=ranks.is_main)
    logging.info(f"{ranks.world_size} process(es), {ranks.device}, precision {args.precision}.")
    logging.info(
        f"{args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"RRT in training {training_rrt(model):.1%}"
        + (f" (tokens per layer {model.tower.token_counts()})" if getattr(model, "reduction", None) else "")
    )
    if resume is not None:
        logging.info(f"Continuing from {resume}" + (f", after step {trainer.steps}." if trainer else "."))

    sync = None
    with ranks.agree():
        if target is not None and ranks.is_main:
            sync = remote.RemoteSync(folder, target, args.remote_sync_frequency)
            sync.check()
            sync.start()
    run_log = open_log(args, ranks, folder, config, step=trainer.steps if trainer else 0)
    try:
        if trainer is not None:
            logging.info(train_data.describe())
            trainer.fit(run_log)
            averages, metrics = trainer.ema, ranks.broadcast(run_log.last_evaluation)
            if metrics.get("epoch") != trainer.epoch:
                metrics = {}  # of older weights
        else:
            metrics = {"epoch": 0, **evaluate(task, model, averages, 0, last=True)}
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


def check_memory(model, args, ranks: Ranks) -> None:
    """Refuses a run that cannot fit the GPU, before its first step; what fits by this lower bound may still not."""
    if ranks.device.type != "cuda" or (args.train_data is None and args.dataset_type != "synthetic"):
        return
    ema = args.ema_decay is not None
    needed = memory_estimate(model, args, world_size=ranks.world_size, ema=ema, sharded=args.fsdp)
    available = torch.cuda.get_device_properties(ranks.device).total_memory
    if needed is not None and needed.total > available:
        raise UserError(
            f"This run needs at least {needed.total / 1e9:.1f} GB on each GPU ({needed}), but there are "
            f"{available / 1e9:.1f} GB; lower --batch-size (and raise --accum-freq), or add --grad-checkpointing."
        )


def open_log(args, ranks: Ranks, folder: Path | None, config: dict, step: int) -> RunLog:
    return RunLog(
        folder,
        enabled=ranks.is_main,
        report_to=reports(args),
        step=step,
        wandb_options={
            "project": args.wandb_project_name,
            "name": args.name,
            "id": args.name,
            "notes": args.wandb_notes,
            "resume": "allow" if step else None,
            "config": config,
        },
    )


def reports(args: argparse.Namespace) -> frozenset[str]:
    names = frozenset(filter(None, re.split(r"[,\s]+", args.report_to)))
    return frozenset({"tensorboard", "wandb"}) if "all" in names else names


if __name__ == "__main__":
    end(main())
