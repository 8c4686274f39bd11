"""The training loop. It knows batches, steps, epochs and state; what is learnt is the task's business.

`Trainer.step` is one optimizer step. All that must survive a restart is in `Trainer.state_dict`.
"""
from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip_train.precision import get_autocast
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from . import checkpoint
from .data import TrainData
from .distributed import Ranks
from .errors import UserError
from .log import RunLog, peak_memory_gb
from .optim import create_schedule
from .task import Batch, Task


class Trainer:
    """
    Args:
        args: the run's flags.
        ranks: this process among the others.
        model: the bare model; its weights are what is saved.
        runnable: the same model as it is run: wrapped by DDP, compiled, or itself.
        task: what is learnt.
        data: training data, with its position.
        optimizer: steps the model's parameters.
        folder: the run's folder, or None to write nothing.
        config: the resolved configuration, saved with each checkpoint.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        ranks: Ranks,
        model: nn.Module,
        runnable: nn.Module,
        task: Task,
        data: TrainData,
        optimizer: torch.optim.Optimizer,
        folder: Path | None,
        config: dict[str, Any],
    ):
        self.args, self.ranks, self.model, self.runnable, self.task = args, ranks, model, runnable, task
        self.data, self.optimizer = data, optimizer
        self.folder, self.config = folder, config
        self.autocast = get_autocast(args.precision, device_type=ranks.device.type)
        self.input_dtype = open_clip.get_input_dtype(args.precision)
        self.scaler = torch.amp.GradScaler(ranks.device.type) if args.precision == "amp" else None
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.show_progress = sys.stderr.isatty() if args.progress is None else args.progress
        self.global_batch = args.batch_size * args.accum_freq * ranks.world_size
        self.steps_per_epoch = data.num_batches // args.accum_freq
        if not self.steps_per_epoch:
            raise UserError(
                f"One optimizer step needs {args.accum_freq} batches but an epoch has {data.num_batches}; "
                "lower --accum-freq or --batch-size."
            )
        self.schedule = create_schedule(optimizer, args, self.steps_per_epoch)  # step -> lr, sets it; or None
        self.epoch = 0  # epochs completed
        self.steps = 0  # optimizer steps completed

    # ------------------------------------------------------------------ the loop

    def fit(self, run_log: RunLog) -> None:
        """Trains from the current state to the last epoch, evaluating and saving on the way."""
        self.run_log = run_log
        total = self.steps_per_epoch * self.args.epochs
        if self.schedule is not None and self.args.warmup >= total > 0:
            logging.warning(
                f"Warm-up ({self.args.warmup} steps) is as long as the run ({total} steps), so the learning rate never "
                "reaches --lr; lower --warmup."
            )
        while self.epoch < self.args.epochs:
            self.train_epoch()
            self.epoch += 1
            last = self.epoch == self.args.epochs
            self.evaluate(last)
            self.save(last)

    def train_epoch(self) -> None:
        self.runnable.train()
        batches = self.data.epoch(self.epoch)
        done = self.steps - self.epoch * self.steps_per_epoch
        bar = tqdm(
            total=self.steps_per_epoch, initial=done, desc=f"epoch {self.epoch + 1}/{self.args.epochs}", unit="step",
            leave=False, disable=not (self.show_progress and self.ranks.is_main),
        )
        meter = _Meter()
        with bar:
            for window in _windows(batches, self.args.accum_freq, self.steps_per_epoch - done, meter):
                losses, lr = self.step([self.to_device(batch) for batch in window])
                meter.steps += 1
                bar.update()
                in_epoch = self.steps - self.epoch * self.steps_per_epoch
                if (in_epoch - 1) % self.args.log_every_n_steps == 0 or in_epoch == self.steps_per_epoch:
                    self.log_step(losses, lr, in_epoch, meter)
        self.report_skipped()

    def step(self, window: list[Batch]) -> tuple[dict[str, Tensor], float]:
        """One optimizer step on `window`, a list of `--accum-freq` micro-batches; returns its losses and lr."""
        if self.schedule is not None:
            self.schedule(self.steps)
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.zero_grad(set_to_none=True)
        if len(window) == 1:
            with self.autocast():
                losses = self.task.losses(self.task.features(self.runnable, window[0]))
            self.backward(losses["loss"])
        else:
            losses = self.accumulate(window)

        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.args.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.args.grad_clip_norm)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.task.after_step(self.model)
        self.steps += 1
        return losses, lr

    def accumulate(self, window: list[Batch]) -> dict[str, Tensor]:
        """Gradients of the loss over the whole window, as if it were one batch, at the memory of one micro-batch.

        The features of all micro-batches are computed without gradient; the loss over all of them gives the gradient of
        each feature; a second pass carries those into the parameters (GradCache, Gao et al. 2021). Exact, also for the
        parameters the loss sees directly, such as the logit scale.
        """
        random_states, parts = [], []
        for batch in window:
            random_states.append(_random_state(self.ranks.device))
            with torch.no_grad(), self.autocast():
                parts.append(self.task.features(self.runnable, batch))
        shared = [name for name in parts[0] if name in self.task.shared]
        leaves = {
            name: (parts[0][name] if name in shared else torch.cat([p[name] for p in parts])).detach().requires_grad_()
            for name in parts[0]
        }
        with self.autocast():
            losses = self.task.losses(leaves)
        self.backward(losses["loss"])

        after = _random_state(self.ranks.device)
        start = 0
        for i, (batch, random_state) in enumerate(zip(window, random_states, strict=True)):
            last = i == len(window) - 1
            _restore_random_state(self.ranks.device, random_state)
            wrapped = isinstance(self.runnable, DistributedDataParallel) or hasattr(self.runnable, "no_sync")
            with self.runnable.no_sync() if wrapped and not last else nullcontext():
                with self.autocast():
                    features = self.task.features(self.runnable, batch)
                outputs, gradients = [], []
                for name, value in features.items():
                    gradient = leaves[name].grad
                    if gradient is None or not value.requires_grad or (name in shared and not last):
                        continue
                    outputs.append(value)
                    gradients.append(gradient if name in shared else gradient[start : start + len(value)])
                torch.autograd.backward(outputs, gradients)
            start += len(batch["image"])
        _restore_random_state(self.ranks.device, after)
        return losses

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def to_device(self, batch: Batch) -> Batch:
        device = self.ranks.device
        return batch | {
            "image": batch["image"].to(device=device, dtype=self.input_dtype, non_blocking=True),
            "text": batch["text"].to(device=device, non_blocking=True),
        }

    # ------------------------------------------------------------------ figures

    def log_step(self, losses: dict[str, Tensor], lr: float, in_epoch: int, meter: _Meter) -> None:
        values = self.ranks.mean(losses)  # waits for the device, so the clock below is true
        steps, seconds, waited = meter.read()
        rate = steps * self.global_batch / seconds
        row = {
            "step": self.steps - 1,
            "epoch": self.epoch,
            "samples": self.steps * self.global_batch,
            **values,
            "lr": lr,
            "samples_per_second": rate,
            "samples_per_second_per_gpu": rate / self.ranks.world_size,
            "data_time": waited / steps,
            "batch_time": seconds / steps,
            **self.task.log(self.model),
            "peak_memory_gb": peak_memory_gb(self.ranks.device),
        }
        self.run_log.train(row)
        left = (self.args.epochs * self.steps_per_epoch - self.steps) * seconds / steps
        extra = " ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in values.items() if k != "loss" and len(values) > 2)
        logging.info(
            f"epoch {self.epoch + 1}/{self.args.epochs} step {in_epoch}/{self.steps_per_epoch} | "
            f"loss {values['loss']:.4f} {extra}| {rate:.4g} samples/s, data wait {waited / seconds:.0%} | "
            f"lr {lr:.3g} | logit scale {row.get('logit_scale', math.nan):.2f} | RRT {row.get('rrt', 0):.1%} | "
            f"peak memory {row['peak_memory_gb']:.2f} GB | {_hours(left)} left"
        )

    def report_skipped(self) -> None:
        """What the data left out in this epoch, over all ranks."""
        for rank, sentence in enumerate(self.ranks.gather(self.data.report().sentence())):
            if sentence:
                logging.warning(f"Rank {rank}: {sentence}" if self.ranks.world_size > 1 else sentence)

    def evaluate(self, last: bool) -> None:
        metrics = self.task.evaluate(self.model, self.epoch, last)
        if metrics:
            metrics = {"epoch": self.epoch, "step": self.steps, **metrics}
            self.run_log.evaluation(metrics, self.steps)
            logging.info(f"Evaluation after epoch {self.epoch}: " + describe(metrics))

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors: all the rest of the run depends on. Call on all ranks."""
        return {
            "epoch": self.epoch,
            "step": self.steps,
            "steps_per_epoch": self.steps_per_epoch,
            "samples": self.steps * self.global_batch,
            "name": self.args.name,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else {},
            "data": self.ranks.gather(self.data.state_dict()),
            "random": self.ranks.gather(_random_state(self.ranks.device)),
            "config": self.config,
        }

    def load_state_dict(self, state: dict[str, Any], source: str | Path) -> None:
        """Continues from `state_dict`, from an OpenCLIP checkpoint (its epoch), or from bare weights (epoch 0)."""
        checkpoint.load_weights(self.model, state.get("state_dict", state), source)
        if "epoch" not in state:
            return
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError) as error:
            raise UserError(f"The optimizer state in {source} does not fit --opt {self.args.opt}: {error}") from error
        if self.scaler is not None and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.epoch = state["epoch"]
        self.steps = state.get("step", self.epoch * self.steps_per_epoch)
        steps_per_epoch = state.get("steps_per_epoch", self.steps_per_epoch)  # an OpenCLIP checkpoint does not say
        if steps_per_epoch != self.steps_per_epoch:
            raise UserError(
                f"An epoch had {steps_per_epoch} steps when {source} was written and has {self.steps_per_epoch} now, "
                "so the schedule would jump; continue with the batch size, number of processes and data it had."
            )
        if len(state.get("data", ())) == self.ranks.world_size:
            self.data.load_state_dict(state["data"][self.ranks.rank])
        if len(state.get("random", ())) == self.ranks.world_size:
            _restore_random_state(self.ranks.device, state["random"][self.ranks.rank])

    def save(self, last: bool) -> None:
        """After an epoch: `epoch_K.pt` every --save-frequency epochs and at the end, `epoch_latest.pt` if asked."""
        args = self.args
        state = self.state_dict()
        if self.folder is None or not self.ranks.is_main:
            return
        folder = self.folder / "checkpoints"
        if last or (args.save_frequency > 0 and self.epoch % args.save_frequency == 0):
            checkpoint.save(state, folder / f"epoch_{self.epoch}.pt")
        if args.delete_previous_checkpoint:
            (folder / f"epoch_{self.epoch - 1}.pt").unlink(missing_ok=True)
        if args.save_most_recent:
            checkpoint.save(state, folder / checkpoint.LATEST)


def describe(metrics: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items() if k != "step")


class _Meter:
    """Wall-clock and time spent waiting for data since the last `read`."""

    def __init__(self):
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def read(self) -> tuple[int, float, float]:
        now = time.perf_counter()
        reading = self.steps, now - self.start, self.waited
        self.start, self.waited, self.steps = now, 0.0, 0
        return reading


def _windows(batches: Iterable[Batch], size: int, count: int, meter: _Meter) -> Iterator[list[Batch]]:
    """`count` lists of `size` consecutive batches."""
    iterator = iter(batches)
    for _ in range(count):
        begin = time.perf_counter()
        window = [next(iterator) for _ in range(size)]
        meter.waited += time.perf_counter() - begin
        yield window


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _hours(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
