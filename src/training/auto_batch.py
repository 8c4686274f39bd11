"""`--batch-size auto`: the largest batch of which a real step fits the memory, the same on all ranks."""
from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn

from open_clip_elip.profile.measure import SavedBytes, largest_batch, peak_bytes

from .data.pixels import to_device
from .distributed import Ranks
from .errors import UserError
from .models import wrap
from .optim import create_optimizer
from .trainer import Trainer

MARGIN = 0.1  # of the memory, for what the allocator does not tell, and for longer captions than those tried
FIRST, SECOND = 4, 8  # batches that are tried first, to tell from how steps grow
TRIES = 8  # after the first


class Found(NamedTuple):
    batch_size: int
    sentence: str  # that tells of it


def find_batch_size(options: Any, ranks: Ranks, build: Callable[..., Any]) -> Found:
    """Each rank tries steps by itself, of a model that is made for it alone; then all agree on the smallest batch.

    Args:
        build: see `run.Build`.

    Raises:
        UserError: on all ranks, if not even a small step fits, or the options do not let it be found.
    """
    with ranks.agree():
        limit = _memory(options, ranks.device) * (1 - MARGIN)
        alone, on_gpu = Ranks(ranks.device, local_rank=ranks.local_rank), ranks.device.type == "cuda"
        # On a CPU nobody tells what a compiled model takes.
        trials = Trials(replace(options, batch_size=FIRST, torchcompile=options.torchcompile and on_gpu), alone, build)
        most = trials.samples // (options.accum_freq * ranks.world_size)
        if most < SECOND:
            few = f"an epoch has data for batches of {most}"
            raise UserError(f"--batch-size auto begins with batches of {SECOND}, {few}: give a number.")
        found = search(trials.peak, trials.saved, limit, most)
        if not found:
            room = f"{limit / 1e9:.3g} GB, which are left of the memory with a margin of {MARGIN:.0%}"
            raise UserError(f"--batch-size auto: not even {FIRST} samples fit into {room}; give more, or a number.")
        peak = trials.peaks[found]
        del trials
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    size, total = min(ranks.gather(found)), ranks.world_size * options.accum_freq
    sentence = (
        f"--batch-size auto: {size} for each of {ranks.world_size} process(es), {size * total} in a step; {found} were "
        f"tried here and took {peak / 1e9:.3g} of {limit / 1e9:.3g} GB, which leave a margin of {MARGIN:.0%}."
    )
    return Found(size, sentence)


def _memory(options: Any, device: torch.device) -> float:
    """Bytes that a process may use."""
    if options.memory is not None:
        return options.memory * 1e9
    if device.type != "cuda":
        raise UserError("--batch-size auto needs to know, on a CPU, how much memory there is: give --memory GB.")
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


class Trials:
    """Steps of a run with batches of any size, of one process by itself. Nothing is written."""

    def __init__(self, options: Any, alone: Ranks, build: Callable[..., Any]):
        parts = build(options, alone, None)
        model, task, self.data = parts.model, parts.task, parts.train_data
        optimizer = create_optimizer(task.parameters(model, options), options)
        self.trainer = Trainer(options, alone, model, wrap(model, options, alone), task, self.data, optimizer)
        self.samples = self.data.num_batches * options.batch_size  # in an epoch
        others = [one for one in vars(task).values() if isinstance(one, nn.Module)]  # twin, queues, teacher
        there = (one for one in others if not any(p.is_meta for p in one.parameters()))
        self.model, self.optimizer, self.resident = model, optimizer, nn.ModuleList([model, *there])
        self.peaks: dict[int, float] = {}

    def peak(self, size: int) -> float:
        """Bytes that a step with batches of this size needs; infinity if it does not fit the device."""
        options, trainer = replace(self.trainer.options, batch_size=size), self.trainer
        self.window = []  # that of the trial before
        self.model.train()
        try:
            batches = replace(self.data, options=options).epoch(0)
            batches = [trainer.task.prepare(one) for one in islice(batches, options.accum_freq)]
            self.window = [to_device(one, trainer.ranks.device, trainer.input_dtype) for one in batches]
            averages = {} if trainer.ema is None else trainer.ema.weights
            self.peaks[size] = peak_bytes(self, [self.window, averages])
        except torch.cuda.OutOfMemoryError:
            self.peaks[size] = math.inf
        self.optimizer.zero_grad(set_to_none=True)
        return self.peaks[size]

    def saved(self) -> float:
        """Bytes that a sample of the last step keeps for the backward pass."""
        saved = SavedBytes(self.resident)
        with saved:
            self()
        return saved.bytes / sum(len(one["key"]) for one in self.window)

    def __call__(self) -> None:
        self.trainer.step(self.window)


def search(peak: Callable[[int], float], saved: Callable[[], float], limit: float, most: int) -> int:
    """The largest batch, of those that were tried, whose peak is within the limit; 0: there is none.

    A straight line through two peaks tells which to try next (`largest_batch`).

    Args:
        saved: bytes a sample, by which the line rises at least; asked after the first peak.
        most: that may be tried, at least `SECOND`.
    """
    peaks = {FIRST: peak(FIRST)}
    if peaks[FIRST] > limit:
        return 0
    slope, fits, over, size = saved(), FIRST, most + 1, SECOND
    for _ in range(TRIES):
        peaks[size] = peak(size)
        fits, over = (size, over) if peaks[size] <= limit else (fits, size)
        known = sorted(pair for pair in peaks.items() if pair[1] < math.inf)[-2:]
        size = largest_batch(limit, *known, saved=slope) if len(known) == 2 else over
        if size >= over:
            size = (fits + over) // 2 if over in peaks else most
        if size <= fits or over - fits <= fits // 32:
            break
    return fits
