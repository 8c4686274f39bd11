"""Checkpoints: written whole or not at all, read without running code, found without guessing."""
from __future__ import annotations

import logging
import math
import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves_with_path

from open_clip_elip import weights
from open_clip_elip.adapters import is_adapter
from open_clip_elip.identity import ModelError
from open_clip_elip.loading import misfits

from .ema import Ema
from .errors import UserError, reason
from .files import expendable, written_whole
from .sharding import load_full_state_dict

LATEST = "epoch_latest.pt"  # OpenCLIP's name, written with --save-most-recent
BEST = "best.pt"
_NAME = re.compile(r"(epoch|step)_\d+\.pt|epoch_latest\.pt")


def save(state: dict[str, Any], path: Path) -> None:
    """Writes `state`, tensors and plain types only, whole or not at all."""
    with written_whole(path) as file:
        torch.save(state, file)


def load(path: str | Path) -> dict[str, Any]:
    """What `weights.read` finds: ours, OpenCLIP's, or a bare state dict. UserError: it is no checkpoint."""
    try:
        return weights.read(path)
    except ModelError as error:
        raise UserError(str(error)) from error


def newest(folder: Path) -> Path | None:
    """The checkpoint of this folder, and of no other, that is furthest in training; passes over unreadable files."""
    found = progress_in(folder)
    return max(found, key=found.get, default=None)


def progress_in(folder: Path, level: int = logging.WARNING) -> dict[Path, tuple[int, int]]:
    """Where in training each readable checkpoint of this folder lies; the others are told at this level."""
    found = {}
    for path in sorted(path for path in folder.glob("*.pt") if _NAME.fullmatch(path.name)):
        try:
            found[path] = _progress(load(path))
        except UserError as error:
            logging.log(level, str(error))
    return found


def _progress(state: dict[str, Any]) -> tuple[int, int]:
    """Epochs and steps; a checkpoint from OpenCLIP ends an epoch."""
    return state.get("epoch", -1), state.get("epoch_steps", 0)


@dataclass
class Saver:
    """Writes a run's checkpoints, tidies up behind itself, and survives a disk that fails."""

    folder: Path | None  # None (all ranks but the main one, or no folder) makes every method do nothing
    keep_last: int | None = None  # besides the best; None keeps all `epoch_K.pt` and the two newest `step_K.pt`
    every_minutes: float | None = None  # how often `due` asks for one; None: never
    delete_previous: bool = False  # the `epoch_K.pt` before, once a new one is written

    RETRY_SECONDS = 60.0

    def __post_init__(self):
        self.saved_at = time.monotonic()
        self.failed = False
        self.bad: str | None = None  # what is not finite in a state that therefore was not written
        self.written: dict[str, tuple[int, int]] = {}  # name -> progress
        self.best: int | None = None  # the epoch in best.pt
        folder = self.folder
        if folder is not None and folder.is_dir():
            for left_over in folder.glob(".*.pt.*.tmp"):
                with expendable(left_over):
                    left_over.unlink(missing_ok=True)
            found = progress_in(folder, logging.DEBUG)  # what is wrong was told when the newest was looked for
            self.written = {path.name: progress for path, progress in found.items()}
            with suppress(UserError):
                self.best = load(folder / BEST).get("epoch")

    def due(self) -> bool:
        """Whether it is time for a checkpoint: by the clock, or because the last one could not be written."""
        wait = self.RETRY_SECONDS if self.failed else (self.every_minutes or math.inf) * 60
        return self.folder is not None and time.monotonic() - self.saved_at >= wait

    def save(self, state: dict[str, Any], name: str) -> bool:
        """Writes `name` and deletes what is no longer to be kept. False, with a log line, if it could not be written.

        A state whose weights, averages or task hold a number that is not finite is never written.
        """
        if self.folder is None:
            return True
        self.saved_at = time.monotonic()
        self.bad = _nonfinite({part: state.get(part) for part in ("state_dict", "ema", "task")})
        if self.bad is not None:
            bad = self.bad.removeprefix("state_dict.")
            logging.error(f"{name} was not written: {bad} is not finite. The checkpoint before it stays the newest.")
            return False
        try:
            save(state, self.folder / name)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as either
            self.failed = True
            logging.error(
                f"{name} could not be written ({reason(error)}). Training goes on with the older checkpoints in place; "
                f"the next try is in {self.RETRY_SECONDS:.0f} s at the latest."
            )
            return False
        self.failed = False
        self.written[name] = _progress(state)
        self._prune(name)
        return True

    def keep_best(self, epoch: int, scores: dict[int, float | None]) -> None:
        """Makes `best.pt` the checkpoint of `epoch` if its score (higher is better) beats that of the best so far.

        scores: of all epochs, where there is one. A best checkpoint that has none counts as the worst.
        """
        source = None if self.folder is None else self.folder / f"epoch_{epoch}.pt"
        score, best = scores.get(epoch), scores.get(self.best)
        if source is None or not source.is_file() or score is None or not score > (-math.inf if best is None else best):
            return
        with expendable(self.folder / BEST):
            temporary = self.folder / f".{BEST}.{os.getpid()}.tmp"
            temporary.unlink(missing_ok=True)
            try:
                os.link(source, temporary)  # no second copy is written, or on the disk, where links are possible
            except OSError:
                shutil.copyfile(source, temporary)
            os.replace(temporary, self.folder / BEST)
            self.best = epoch

    def _prune(self, newest: str) -> None:
        """Deletes what `newest`, just written, replaces."""
        names = (name for name in self.written if name != LATEST)
        ordered = sorted(names, key=lambda name: (self.written[name], name == newest))
        steps = [name for name in ordered if name.startswith("step_")]
        surplus = set(steps[:-2] if self.keep_last is None else ordered[: -self.keep_last])
        if self.delete_previous and newest in ordered and newest not in steps:
            surplus |= set([name for name in ordered[: ordered.index(newest)] if name not in steps][-1:])
        for name in surplus:
            del self.written[name]
            with expendable(self.folder / name):
                (self.folder / name).unlink(missing_ok=True)


def _nonfinite(state: dict[str, Any]) -> str | None:
    """The name of a floating tensor with a number that is not finite, at any depth of dicts, lists and tuples."""
    for path, value in tree_leaves_with_path(state):
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            return ".".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path)
    return None


def restore(
    model: nn.Module, state: dict[str, Any], source: str | Path, optimizer: torch.optim.Optimizer | None = None,
    ema_decay: float | None = None,
) -> Ema | None:  # fmt: skip
    """Loads the weights of a checkpoint or a bare state dict strictly, and an optimizer's state.

    Returns averages of the weights, those of the checkpoint if it has any. UserError: something does not fit.
    """
    weights = _fitting(model, state.get("state_dict", state), source)
    if optimizer is not None and "optimizer" not in state:
        raise UserError(f"{source} has no optimizer state to go on with; start anew with --pretrained {source}.")
    try:
        load_full_state_dict(model, optimizer, weights, None if optimizer is None else state["optimizer"])
    except (KeyError, ValueError) as error:
        advice = "check --opt, --layer-decay and what is locked"
        raise UserError(f"The optimizer state in {source} does not fit this run's: {error}; {advice}.") from error
    if ema_decay is None:
        return None
    averages = Ema(model, ema_decay)
    if state.get("ema"):
        averages.load_state_dict(_fitting(model, state["ema"], source), state["ema_updates"])
    return averages


def _fitting(model: nn.Module, state_dict: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """The state dict under the model's own names, without DDP's `module.`; UserError names the first that differs."""
    state_dict = {k.removeprefix("module."): v for k, v in state_dict.items()}
    own = model.state_dict()
    missing, unknown = [k for k in own if k not in state_dict], [k for k in state_dict if k not in own]
    if wrong := misfits(state_dict, own, missing, unknown):
        advice = "check --model, and the flags that change it"
        if {*filter(is_adapter, state_dict)} != {*filter(is_adapter, own)}:
            advice = "check --adapter and --adapter-rank"
        if ("head.weight" in state_dict) != ("head.weight" in own):
            advice = "one of them has a classifier's head (training.finetune) and the other one has not"
        raise UserError(f"The checkpoint {source} does not fit this model: {wrong}; {advice}.")
    return state_dict
