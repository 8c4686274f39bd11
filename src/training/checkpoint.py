"""Checkpoints: written whole or not at all, read without running code, found without guessing."""
from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError

LATEST = "epoch_latest.pt"  # OpenCLIP's name, written with --save-most-recent
_EPOCH = re.compile(r"epoch_(\d+)\.pt")


def save(state: dict[str, Any], path: Path) -> None:
    """Writes `state` so that `path` is at every moment either absent, the old file or the new file, complete.

    `state` holds tensors and plain types only, so that it loads with `weights_only=True`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint (ours, OpenCLIP's, or a bare state dict; local or any fsspec URL) onto the CPU.

    Raises:
        UserError: there is no such file, or it is not a checkpoint.
    """
    try:
        if "://" in str(path):
            import fsspec

            with fsspec.open(str(path), "rb") as file:
                state = torch.load(file, map_location="cpu", weights_only=True)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint at {path}; check --resume.") from None
    except Exception as error:  # a damaged file raises anything from EOFError to UnpicklingError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as a checkpoint ({reason[:160]}); resume from another one.") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(state).__name__}, not a dictionary.")
    return state


def newest(folder: Path) -> Path | None:
    """The checkpoint of this folder, and of no other, that is furthest in training; passes over unreadable files."""
    numbered = sorted(
        ((int(m[1]), p) for p in folder.glob("epoch_*.pt") if (m := _EPOCH.fullmatch(p.name))), reverse=True
    )
    candidates = [p for _, p in numbered]
    if (folder / LATEST).is_file():
        candidates.insert(0, folder / LATEST)
    best, best_epoch = None, -1
    for path in candidates:
        try:
            epoch = load(path).get("epoch", -1)
        except UserError as error:
            logging.warning(f"{error}")
            continue
        if epoch > best_epoch:
            best, best_epoch = path, epoch
        if path.name != LATEST:
            break  # the others are older
    return best


def load_weights(model: nn.Module, state_dict: dict[str, Tensor], source: str | Path) -> None:
    """Loads a state dict strictly; `module.` prefixes of DDP are understood.

    Raises:
        UserError: a tensor is missing, unknown or of another shape; the sentence names the first.
    """
    state_dict = {k.removeprefix("module."): v for k, v in state_dict.items()}
    own = model.state_dict()
    problems = [
        f"{k} is {_shape(v)} there and {_shape(own[k])} in the model"
        for k, v in state_dict.items()
        if k in own and getattr(v, "shape", None) != own[k].shape
    ]
    problems += [f"{k} is missing" for k in own if k not in state_dict]
    problems += [f"{k} is unknown to the model" for k in state_dict if k not in own]
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise UserError(f"The checkpoint {source} does not fit this model: {problems[0]}{more}; check --model.")
    model.load_state_dict(state_dict)


def _shape(value: Any) -> str:
    return "x".join(map(str, value.shape)) or "a scalar" if isinstance(value, Tensor) else type(value).__name__
