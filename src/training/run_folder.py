"""The folder of a run: its name, what may be in it, its configuration, its copy elsewhere."""
from __future__ import annotations

import argparse
import logging
import re
import shutil
from datetime import datetime
from pathlib import Path

import yaml

from . import checkpoint
from .errors import UserError


def default_name(args: argparse.Namespace) -> str:
    stamp = datetime.now().strftime("%Y_%m_%d-%H_%M_%S")
    model = re.sub(r"[/:\\]+", "-", args.model)
    return f"{stamp}-model_{model}-lr_{args.lr}-b_{args.batch_size}-j_{args.workers}-p_{args.precision}"


def find_resume(args: argparse.Namespace, folder: Path | None) -> str | None:
    """The checkpoint to continue from, or None to start anew."""
    if args.resume is None:
        return None
    if args.resume != "latest":
        if "://" not in args.resume and not Path(args.resume).is_file():
            raise UserError(f"There is no checkpoint at {args.resume}; check --resume.")
        return args.resume
    if folder is None:
        raise UserError("--resume latest looks in the run's folder, but --logs none keeps none; give --logs.")
    found = checkpoint.newest(folder / "checkpoints")
    if found is None:
        logging.info(f"There is no checkpoint in {folder / 'checkpoints'} yet; training starts from the beginning.")
    return None if found is None else str(found)


def check_unused(folder: Path | None, args: argparse.Namespace) -> None:
    """Raises UserError when the run exists already and is not to be continued: nothing written is ever lost."""
    used = folder is not None and any((folder / name).exists() for name in ("config.yaml", "out.log", "train.csv"))
    if used and args.resume != "latest":
        raise UserError(f"The run {folder} exists already; choose another --name, or continue it with --resume latest.")


def create(folder: Path, config: dict, copy_codebase: bool = False) -> None:
    """Makes the folder and writes config.yaml (which --config reads back) and params.txt (as OpenCLIP does).

    Raises:
        UserError: no write access.
    """
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=True))
        (folder / "params.txt").write_text("".join(f"{k}: {config[k]}\n" for k in sorted(config)))
    except OSError as error:
        raise UserError(f"Cannot write to the folder {folder} ({error.strerror}); choose another --logs.") from error
    if copy_codebase:
        shutil.copytree(
            Path(__file__).parents[1], folder / "code", dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
        )
