"""Checkpoints: written whole or not at all, read without running code, found without guessing."""
from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from open_clip_elip import weights
from open_clip_elip.identity import ModelError

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
    best, furthest = None, (-1, -1)
    for path in _checkpoints(folder):
        try:
            progress = _progress(load(path))
        except UserError as error:
            logging.warning(f"{error}")
            continue
        if progress > furthest:
            best, furthest = path, progress
    return best


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.pt") if _NAME.fullmatch(path.name))


def _progress(state: dict[str, Any]) -> tuple[int, int]:
    """Where in training a checkpoint lies; one from OpenCLIP ends an epoch."""
    return state.get("epoch", -1), state.get("epoch_steps", 0)


class Saver:
    """Writes a run's checkpoints, tidies up behind itself, and survives a disk that fails.

    Args:
        folder: where; None (all ranks but the main one, or no folder) makes every method do nothing.
        keep_last: how many checkpoints to keep besides the best. None keeps all `epoch_K.pt` and the two newest
            `step_K.pt`.
        every_minutes: how often `due` asks for one; None or 0: never.
        delete_previous: delete the `epoch_K.pt` before, once a new one is written.
    """

    RETRY_SECONDS = 60.0

    def __init__(
        self, folder: Path | None, keep_last: int | None = None, every_minutes: float | None = None,
        delete_previous: bool = False,
    ):  # fmt: skip
        self.folder, self.keep_last, self.delete_previous = folder, keep_last, delete_previous
        self.interval = (every_minutes or math.inf) * 60
        self.saved_at = time.monotonic()
        self.failed = False
        self.written: dict[str, tuple[int, int]] = {}  # name -> progress
        self.best = -math.inf
        if folder is not None and folder.is_dir():
            for left_over in folder.glob(".*.pt.*.tmp"):
                left_over.unlink(missing_ok=True)
            for path in _checkpoints(folder):
                with suppress(UserError):  # told when it is looked for
                    self.written[path.name] = _progress(load(path))
            record = folder / "best.json"
            try:
                self.best = float(json.loads(record.read_bytes())["score"])
            except FileNotFoundError:
                pass
            except (OSError, ValueError, KeyError, TypeError) as error:
                logging.warning(f"{record} cannot be read ({reason(error)}); the next score becomes the best one.")

    def due(self) -> bool:
        """Whether it is time for a checkpoint: by the clock, or because the last one could not be written."""
        if self.folder is None:
            return False
        return time.monotonic() - self.saved_at >= (self.RETRY_SECONDS if self.failed else self.interval)

    def save(self, state: dict[str, Any], name: str) -> bool:
        """Writes `name` and deletes what is no longer to be kept. False, with a log line, if it could not be written.

        A state whose weights, averages or task hold a number that is not finite is never written.
        """
        if self.folder is None:
            return True
        self.saved_at = time.monotonic()
        bad = next(_nonfinite({part: state.get(part) for part in ("state_dict", "ema", "task")}), None)
        if bad is not None:
            bad = bad.removeprefix("state_dict.")
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

    def keep_best(self, epoch: int, score: float | None) -> None:
        """Makes `best.pt` the checkpoint of `epoch` if its score (higher is better) beats the best so far."""
        source = None if self.folder is None else self.folder / f"epoch_{epoch}.pt"
        if source is None or not source.is_file() or score is None or not score > self.best:
            return
        with expendable(self.folder / BEST):
            temporary = self.folder / f".best.pt.{os.getpid()}.tmp"
            temporary.unlink(missing_ok=True)
            try:
                os.link(source, temporary)  # no second copy on the disk where links are possible
            except OSError:
                shutil.copyfile(source, temporary)
            os.replace(temporary, self.folder / BEST)
            self.best = score
            with written_whole(self.folder / "best.json") as file:
                file.write(json.dumps({"epoch": epoch, "score": score}).encode() + b"\n")

    def _prune(self, newest: str) -> None:
        """What `newest`, just written, replaces."""
        names = (name for name in self.written if name != LATEST)
        ordered = sorted(names, key=lambda name: (self.written[name], name == newest))
        if self.keep_last is not None:
            surplus = ordered[: -max(1, self.keep_last)]
        else:
            surplus = [name for name in ordered if name.startswith("step_")][:-2]
        if self.delete_previous and newest.startswith("epoch_") and newest != LATEST:
            before = ordered[: ordered.index(newest)]
            surplus += [name for name in before if name.startswith("epoch_") and name not in surplus][-1:]
        for name in surplus:
            del self.written[name]
            with expendable(self.folder / name):
                (self.folder / name).unlink(missing_ok=True)


def _nonfinite(value: Any, name: str = "") -> Iterator[str]:
    """Names of the floating tensors with a number that is not finite, at any depth of dicts, lists and tuples."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            yield name
    elif isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _nonfinite(part, f"{name}.{key}".removeprefix("."))


def load_weights(model: nn.Module, state_dict: dict[str, Tensor], source: str | Path) -> None:
    """Loads a state dict strictly (see `fitting_weights`)."""
    load_full_state_dict(model, None, fitting_weights(model, state_dict, source), None)


def fitting_weights(model: nn.Module, state_dict: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """The state dict under the model's own names, without DDP's `module.`; UserError names the first that differs."""
    state_dict = {k.removeprefix("module."): v for k, v in state_dict.items()}
    own = model.state_dict()
    found = {k: (_shape(v), _shape(own[k])) for k, v in state_dict.items() if k in own}
    problems = [f"{k} is {there} there and {here} in the model" for k, (there, here) in found.items() if there != here]
    problems += [f"{k} is missing" for k in own if k not in state_dict]
    problems += [f"{k} is unknown to the model" for k in state_dict if k not in own]
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise UserError(f"The checkpoint {source} does not fit this model: {problems[0]}{more}; check --model.")
    return state_dict


def _shape(value: Any) -> str:
    return "x".join(map(str, value.shape)) or "a scalar" if isinstance(value, Tensor) else type(value).__name__
