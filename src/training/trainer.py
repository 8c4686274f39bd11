"""The training loop. It knows batches, steps, epochs and state; what is learnt is the task's business.

`Trainer.step` is one optimizer step; `Trainer.train_epoch` is the loop around it; all that must survive a restart is in
`Trainer.state_dict`.
"""
from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip_train.precision import get_autocast
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint
from .control import EXIT_INTERRUPTED, EXIT_NONFINITE, Control, Stopped
from .cost import peak_flops, step_cost, summary
from .data import TrainData
from .data.pixels import to_device
from .distributed import Ranks
from .ema import Ema
from .errors import UserError
from .log import RunLog, peak_memory_gb
from .plan import Plan
from .sharding import (
    clip_grad_norm,
    full_state_dict,
    gathered,
    is_sharded,
    load_full_state_dict,
    no_sync,
    unscale,
)
from .tasks.contrastive import Batch, Task


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
        self.ema = None if args.ema_decay is None else Ema(model, args.ema_decay)
        self.control = Control(ranks)
        self.saver = checkpoint.Saver(
            folder / "checkpoints" if folder is not None and ranks.is_main else None,
            keep_last=args.keep_last,
            every_minutes=args.save_every_n_minutes,
        )
        self.show_progress = sys.stderr.isatty() if args.progress is None else args.progress
        self.plan = Plan.of(args, data.num_batches, ranks.world_size)
        self.schedule = self.plan.schedule(optimizer, args)
        self.epoch = 0  # epochs completed
        self.epoch_steps = 0  # optimizer steps of the current epoch
        self.steps = 0  # optimizer steps in all
        self.samples = 0  # samples seen in all
        self.nonfinite: dict[str, Any] | None = None  # this rank's last step, if it was not finite
        self.nonfinite_steps = 0
        self.cost = step_cost(model, accumulate=args.accum_freq > 1)  # of a pair; None for towers it does not know
        self.text_columns: float | None = None  # of the last batch's captions on average, where they were cut
        self.peak = peak_flops(ranks.device, args.precision)
        self.totals = {"seconds": 0.0, "waited": 0.0, "samples": 0}  # of training since this process began
        self.removed = 0.0  # ratio of removed tokens, summed over these samples
        self.losses: list[float] = []
        self.evaluations: list[dict[str, float]] = []
        self.notes: list[str] = []  # to be logged when the run begins

    # ------------------------------------------------------------------ the loop

    def fit(self, run_log: RunLog) -> None:
        """Trains from the current state to the end of the run, evaluating and saving on the way.

        Raises:
            Stopped: the run ended early and in order: a signal, or a non-finite loss with `--nonfinite stop`.
            UserError: on all ranks, when the data of any rank turn out to be unusable.
        """
        self.run_log = run_log
        for note in self.notes:
            logging.warning(note)
        self.warn_of_long_warmup()
        with self.control:
            between_epochs = self.epoch > 0 and self.epoch_steps == 0
            if between_epochs and not self.ranks.broadcast(run_log.has_evaluation(self.epoch)):
                self.evaluate()  # the run ended between the last save and its evaluation
            while not self.finished:
                self.train_epoch()
                self.epoch, self.epoch_steps = self.epoch + 1, 0
                self.save_epoch()
                self.evaluate()
            self.save_what_failed()
        self.summarise()

    @property
    def finished(self) -> bool:
        # After the last step, the epoch it belongs to has still to be closed: saved and evaluated.
        return self.epoch >= self.plan.epochs or (self.samples >= self.plan.total_samples and not self.epoch_steps)

    def train_epoch(self) -> None:
        """The rest of the current epoch: fetch, agree, step, log, save."""
        self.runnable.train()
        left = self.plan.steps_left(self.epoch_steps, self.samples)
        batches = iter(self.data.epoch(self.epoch) if left else ())
        meter = _Meter()
        with self.progress_bar() as bar:
            for i in range(left):
                position = self.data.state_dict()  # a window that is fetched but not trained on is fetched again
                window, error = self.fetch(batches, meter)
                self.act_on_wishes(position, error)
                losses, lr = self.step([self.to_device(batch) for batch in window])
                meter.steps += 1
                bar.update()
                if (self.epoch_steps - 1) % self.args.log_every_n_steps == 0 or i == left - 1:
                    self.log_step(losses, lr, meter)
                if self.args.save_every_n_steps and self.steps % self.args.save_every_n_steps == 0:
                    self.save_step(self.data.state_dict())
        self.act_on_wishes(self.data.state_dict())
        self.report_skipped()

    def step(self, window: list[Batch]) -> tuple[dict[str, Tensor], float]:
        """One optimizer step on `window`, a list of `--accum-freq` micro-batches; returns its losses and lr."""
        if self.schedule is not None:
            self.schedule(self.samples / self.plan.reference_batch)
        lr = self.optimizer.param_groups[0]["lr"]
        if self.plan.full_token_steps:
            self.model.tower.reduces = not self.plan.uses_all_tokens(self.samples)
        self.optimizer.zero_grad(set_to_none=True)
        if len(window) == 1:
            with self.autocast():
                losses = self.task.losses(self.task.features(self.runnable, window[0]))
            self.backward(losses["loss"])
        else:
            losses = self.accumulate(window)

        if self.scaler is not None:
            unscale(self.scaler, self.optimizer)
        norm = self.clip_gradients()
        if self.scaler is not None:
            finite = bool(torch.isfinite(losses["loss"]))  # an infinite gradient alone is the scaler's business
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            finite = bool(torch.isfinite(norm))  # the same on all ranks, for gradients are averaged
            if finite:
                self.optimizer.step()
        self.task.after_step(self.model)
        if self.ema is not None and finite:
            self.ema.update(self.model)
        self.nonfinite = None if finite else {
            "step": self.steps, "rank": self.ranks.rank, "loss": losses["loss"].item(), "gradient_norm": norm.item(),
            "keys": [key for batch in window for key in batch["key"]],
        }
        self.steps, self.epoch_steps = self.steps + 1, self.epoch_steps + 1
        self.samples += self.plan.global_batch
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
            with nullcontext() if last else no_sync(self.runnable):
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

    def clip_gradients(self) -> Tensor:
        """The norm of all gradients together, before they are clipped to --grad-clip-norm (if given)."""
        if self.args.grad_clip_norm is not None or is_sharded(self.model):
            return clip_grad_norm(self.parameters, self.args.grad_clip_norm or math.inf)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def to_device(self, batch: Batch) -> Batch:
        device = self.ranks.device
        batch = self.task.prepare(self.model, batch)
        self.text_columns = batch.get("text_columns")
        return batch | {
            "image": to_device(batch["image"], device, self.input_dtype, batch.get("normalization")),
            "text": batch["text"].to(device=device, non_blocking=True),
        }

    def fetch(self, batches: Iterator[Batch], meter: _Meter) -> tuple[list[Batch], UserError | None]:
        """The next window, or what is wrong with this rank's data."""
        begin = time.perf_counter()
        try:
            return [next(batches) for _ in range(self.args.accum_freq)], None
        except UserError as error:
            return [], error
        finally:
            meter.waited += time.perf_counter() - begin

    # ------------------------------------------------------------------ between two steps

    def act_on_wishes(self, position: dict[str, Any], error: UserError | None = None) -> None:
        """Saves or stops when any rank wants to: on a signal, by the clock, after a non-finite step, on bad data.

        Args:
            position: the data position that goes with the current weights.
            error: what went wrong with this rank's data.
        """
        try:
            wishes = self.control.agree(save=self.saver.due(), nonfinite=self.nonfinite is not None, error=error)
        except UserError:
            if self.steps:
                self.save_step(position)  # once the data are mended, the run goes on here
            raise
        if wishes.nonfinite:
            self.record_nonfinite()
        stop = wishes.nonfinite and self.args.nonfinite == "stop"
        if wishes.save or wishes.signal or stop:
            self.save_step(position)
        if stop:
            raise Stopped(
                f"The loss or gradient of step {self.steps - 1} was not finite, so it was not applied; the samples are "
                "in nonfinite.jsonl, and --resume latest goes on after them (--nonfinite skip passes over such steps).",
                EXIT_NONFINITE,
            )
        if wishes.signal:
            raise Stopped(
                f"Stopped by signal {wishes.signal} after step {self.steps}; --resume latest goes on exactly here.",
                EXIT_INTERRUPTED,
            )

    def record_nonfinite(self) -> None:
        self.nonfinite_steps += 1
        records = [record for record in self.ranks.gather(self.nonfinite) if record is not None]
        self.nonfinite = None
        logging.error(f"Step {self.steps - 1} was not applied: its loss or gradient is not finite.")
        if self.ranks.is_main and self.folder is not None:
            with (self.folder / "nonfinite.jsonl").open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    # ------------------------------------------------------------------ figures

    def log_step(self, losses: dict[str, Tensor], lr: float, meter: _Meter) -> None:
        values = self.ranks.mean(losses)  # waits for the device, so the clock below is true
        steps, seconds, waited = meter.read()
        rate = steps * self.plan.global_batch / seconds
        for name, value in (("seconds", seconds), ("waited", waited), ("samples", steps * self.plan.global_batch)):
            self.totals[name] += value
        self.losses = [*self.losses[:1], values["loss"]]
        row = {
            "step": self.steps - 1,
            "epoch": self.epoch,
            "samples": self.samples,
            **values,
            "lr": lr,
            "samples_per_second": rate,
            "samples_per_second_per_gpu": rate / self.ranks.world_size,
            "data_time": waited / steps,
            "batch_time": seconds / steps,
            **self.task.log(self.model),
            "peak_memory_gb": peak_memory_gb(self.ranks.device),
        }
        self.removed += row.get("rrt", 0.0) * steps * self.plan.global_batch
        if self.cost is not None:  # of the captions and the tokens of now
            columns = None if self.text_columns is None else round(self.text_columns)
            self.cost = step_cost(self.model, columns, self.args.accum_freq > 1)
            row["gflops_per_pair"] = self.cost.model / 1e9
            row["tokens_per_second"] = self.cost.tokens * rate
            row["tflops_per_second"] = self.cost.model * rate / 1e12
            if self.peak is not None:
                row["mfu"] = self.cost.model * rate / (self.peak * self.ranks.world_size)
        self.run_log.train(row)
        left = (self.plan.total_samples - self.samples) / rate
        extra = " ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in values.items() if k != "loss" and len(values) > 2)
        logging.info(
            f"epoch {self.epoch + 1}/{self.plan.epochs} step {self.epoch_steps}/{self.plan.steps_per_epoch} | "
            f"loss {values['loss']:.4f} {extra}| {rate:.4g} samples/s, data wait {waited / seconds:.0%} | "
            f"lr {lr:.3g} | "
            + (f"logit scale {row['logit_scale']:.2f} | " if "logit_scale" in row else "")
            + f"RRT {row.get('rrt', 0):.1%} | "
            + (f"{row['tflops_per_second']:.3g} TFLOP/s | " if self.cost is not None else "")
            + (f"MFU {row['mfu']:.1%} | " if "mfu" in row else "")
            + f"peak memory {row['peak_memory_gb']:.2f} GB | {_hours(left)} left"
        )

    def report_skipped(self) -> None:
        """What was left out in this epoch, over all ranks."""
        for rank, sentence in enumerate(self.ranks.gather(self.data.report().sentence())):
            if sentence:
                logging.warning(f"Rank {rank}: {sentence}" if self.ranks.world_size > 1 else sentence)
        if self.nonfinite_steps:
            logging.warning(f"{self.nonfinite_steps} steps so far were not applied: not finite.")

    def summarise(self) -> None:
        """What the run, or what was left of it after a resume, came to."""
        text = summary(
            **self.totals,
            losses=self.losses,
            evaluations=self.evaluations,
            cost=self.cost,
            peak=None if self.peak is None else self.peak * self.ranks.world_size,
            rrt=self.removed / max(1, self.totals["samples"]),
            peak_memory_gb=max(self.ranks.gather(peak_memory_gb(self.ranks.device))),
            folder=self.folder,
        )
        logging.info("Summary\n" + text)
        if self.ranks.is_main and self.folder is not None:
            (self.folder / "summary.txt").write_text(text + "\n")

    def warn_of_long_warmup(self) -> None:
        if self.schedule is not None and self.plan.warmup_steps >= self.plan.total_steps > 0:
            logging.warning(
                f"Warm-up ({self.plan.warmup_steps} steps) is as long as the run ({self.plan.total_steps} steps), so "
                "the learning rate never reaches --lr; lower --warmup."
            )

    def progress_bar(self) -> tqdm:
        return tqdm(
            total=self.plan.steps_per_epoch, initial=self.epoch_steps, unit="step", leave=False,
            desc=f"epoch {self.epoch + 1}/{self.plan.epochs}", disable=not (self.show_progress and self.ranks.is_main),
        )  # fmt: skip

    def evaluate(self) -> None:
        """What is due after the epoch just completed; the averaged weights too, if there are any (`ema/...`)."""
        metrics = evaluate(self.task, self.model, self.ema, self.epoch, self.finished)
        if metrics:
            metrics = {"epoch": self.epoch, "step": self.steps, **metrics}
            self.evaluations.append(metrics)
            self.run_log.evaluation(metrics, self.steps)
            logging.info(f"Evaluation after epoch {self.epoch}: " + describe(metrics))
            if self.ranks.is_main:
                self.saver.keep_best(self.epoch, self.task.score(metrics))

    # ------------------------------------------------------------------ state

    def state_dict(self, position: dict[str, Any]) -> dict[str, Any]:
        """Plain types and tensors: all that the rest of the run depends on. Call on all ranks; rank 0's is complete."""
        weights, optimizer = full_state_dict(self.model, self.optimizer)
        return {
            "epoch": self.epoch,
            "epoch_steps": self.epoch_steps,
            "step": self.steps,
            "samples": self.samples,
            "name": self.args.name,
            "state_dict": weights,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict() if self.scaler is not None else {},
            "ema": self.ema.state_dict() if self.ema is not None else {},
            "ema_updates": self.ema.updates if self.ema is not None else 0,
            "plan": self.plan.state_dict(),
            "data": self.ranks.gather(position if self.epoch_steps else {}),
            "random": self.ranks.gather(_random_state(self.ranks.device)),
            "nonfinite_steps": self.nonfinite_steps,
            "config": self.config,
        }

    def load_state_dict(self, state: dict[str, Any], source: str | Path) -> None:
        """Continues from `state_dict`, from an OpenCLIP checkpoint (its epoch), or from bare weights (epoch 0).

        Raises:
            UserError: the state does not fit this run; what is loaded by then is not used.
        """
        weights = checkpoint.fitting_weights(self.model, state.get("state_dict", state), source)
        whole = "epoch" in state
        try:
            optimizer = self.optimizer if whole else None
            load_full_state_dict(self.model, optimizer, weights, state["optimizer"] if whole else None)
        except (KeyError, ValueError) as error:
            raise UserError(f"The optimizer state in {source} does not fit --opt {self.args.opt}: {error}") from error
        if self.ema is not None:
            self.ema = Ema(self.model, self.args.ema_decay)
        if not whole:
            return
        if self.scaler is not None and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None and state.get("ema"):
            self.ema.load_state_dict(state["ema"], state["ema_updates"])
        self.epoch = state["epoch"]
        if "plan" not in state:  # OpenCLIP's: whole epochs
            self.steps = self.epoch * self.plan.steps_per_epoch
            self.samples = self.steps * self.plan.global_batch
            return
        self.steps, self.samples, self.epoch_steps = state["step"], state["samples"], state["epoch_steps"]
        self.nonfinite_steps = state["nonfinite_steps"]
        change = self.plan.change_from(state["plan"], mid_epoch=self.epoch_steps > 0)
        if change and not self.args.allow_elastic:
            raise UserError(
                f"{source} was written with {change}; continue with what it had, or add --allow-elastic to go on by "
                "samples seen (not bit for bit)."
            )
        self.plan = self.plan.continued(state["plan"], self.args)
        self.schedule = self.plan.schedule(self.optimizer, self.args)
        workers = state["plan"]["workers"]
        if not change and workers != self.plan.workers:
            self.notes.append(
                f"{self.plan.workers} loader workers instead of {workers}: the coming epochs have another sample order "
                "than they would have had."
            )
        if change:
            self.notes.append(f"Elastic resume: {source} was written with {change}; going on by samples seen.")
            share = self.epoch_steps / state["plan"]["steps_per_epoch"]
            self.epoch_steps = min(round(share * self.plan.steps_per_epoch), self.plan.steps_per_epoch)
            self.data.skip_to(self.epoch, self.epoch_steps * self.args.accum_freq)
            return
        if self.epoch_steps:
            self.data.load_state_dict(state["data"][self.ranks.rank])
        _restore_random_state(self.ranks.device, state["random"][self.ranks.rank])

    def save_step(self, position: dict[str, Any]) -> None:
        """`step_K.pt`, in the middle of an epoch. Call on all ranks."""
        self.save([f"step_{self.steps}.pt"], position)

    def save_epoch(self) -> None:
        """After an epoch: `epoch_K.pt` every --save-frequency epochs and at the end, `epoch_latest.pt` if asked."""
        args, names = self.args, []
        if self.finished or (args.save_frequency > 0 and self.epoch % args.save_frequency == 0):
            names.append(f"epoch_{self.epoch}.pt")
        if args.save_most_recent:
            names.append(checkpoint.LATEST)
        self.save(names, {})
        if args.delete_previous_checkpoint and self.ranks.is_main:
            self.saver.delete(f"epoch_{self.epoch - 1}.pt")

    def save_what_failed(self, attempts: int = 5) -> None:
        """At the end of the run: the last checkpoint must be there, so a full disk gets a few more chances."""
        for attempt in range(attempts):
            if not self.ranks.broadcast(self.saver.failed):
                return
            time.sleep(2**attempt)
            self.save_epoch()
        raise UserError(f"The last checkpoint could not be written to {self.folder}; free space there and resume.")

    def save(self, names: list[str], position: dict[str, Any]) -> None:
        """Writes the present state under each name; it is gathered once, and not at all if there is no name."""
        if not names:
            return
        state = self.state_dict(position)
        if self.ranks.is_main:
            for name in names:
                self.saver.save(state, name)


def evaluate(task: Task, model: nn.Module, ema: Ema | None, epoch: int, last: bool) -> dict[str, float]:
    """What is due at the end of `epoch`; the averaged weights too, if there are any (`ema/...`). {} if nothing is.

    The random numbers of the rest of the run do not depend on it: a resumed run may not evaluate here again.
    """
    device = next(model.parameters()).device
    random_state = _random_state(device)
    with gathered(model):
        metrics = task.evaluate(model, epoch, last)
    if metrics and ema is not None:
        with ema.applied(model), gathered(model):
            averaged = task.evaluate(model, epoch, last)
        metrics |= {f"ema/{name}": value for name, value in averaged.items()}
    _restore_random_state(device, random_state)
    return metrics


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
