"""The training loop. It knows batches, steps, epochs and state; what is learnt is the task's business.

`Trainer.step` is one optimizer step; `Trainer.train_epoch` is the loop around it; all that must survive a restart is in
`Trainer.state_dict`.
"""
from __future__ import annotations

import itertools
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint
from .control import EXIT_INTERRUPTED, EXIT_NONFINITE, Control
from .data import TrainData
from .data.pixels import to_device
from .distributed import Ranks
from .ema import Ema
from .errors import Stopped, UserError
from .evaluation.passes import NotFinite
from .figures import Figures, describe
from .files import append
from .log import RunLog
from .options import TrainingOptions
from .plan import Plan, differences, is_due
from .sharding import clip_grad_norm, full_state_dict, gathered, unscale
from .tasks.base import Batch, Engine, Progress, Task

# Options that an optimizer keeps with its parameters, and their names there.
_IN_GROUPS = {
    "lr": "lr", "wd": "weight_decay", "beta1": "betas", "beta2": "betas", "eps": "eps", "momentum": "momentum",
    "layer_decay": "lr_scale",
}  # fmt: skip


@dataclass(eq=False)
class Trainer:
    options: TrainingOptions
    ranks: Ranks
    model: nn.Module  # bare; its weights are what is saved
    runnable: nn.Module  # the same model as it is run: wrapped by DDP, compiled, or itself
    task: Task
    data: TrainData
    optimizer: torch.optim.Optimizer
    folder: Path | None = None  # None writes nothing
    described: dict[str, Any] = field(default_factory=dict)  # goes into each checkpoint: the configuration, the model

    def __post_init__(self):
        options, ranks = self.options, self.ranks
        self.engine = Engine(self.runnable, options.precision, ranks.device)
        self.input_dtype = open_clip.get_input_dtype(options.precision)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.ema = None if options.ema_decay is None else Ema(self.model, options.ema_decay)
        self.control = Control(ranks)
        kept = self.folder / "checkpoints" if self.folder is not None and ranks.is_main else None
        how_many = options.keep_last, options.save_every_n_minutes, options.delete_previous_checkpoint
        self.saver = checkpoint.Saver(kept, *how_many)
        self.plan = Plan.of(options, self.data.num_batches, ranks.world_size)
        self.schedule = self.plan.schedule(self.optimizer, options)
        self.figures = Figures(ranks, options.precision, self.plan.global_batch)
        self.epoch = self.steps = self.samples = 0  # in all: epochs completed, optimizer steps, samples seen
        self.epoch_steps = 0  # optimizer steps of the current epoch
        self.runs_ahead = ranks.device.type != "cpu"  # a GPU makes a step while the next one is prepared
        self.unsettled: Callable[[], list[dict[str, Any]]] = list  # asks what the last step adds to `nonfinite`
        self.nonfinite: list[dict[str, Any]] = []  # this rank's steps that were not finite and are not recorded yet
        self.nonfinite_steps = 0
        self.notes: list[str] = []  # to be logged when the run begins
        warmup, total = self.plan.warmup_steps, self.plan.total_steps
        if self.schedule is not None and warmup > total > 0:
            longer = f"Warm-up ({warmup} steps) is longer than the run ({total} steps)"
            self.notes.append(f"{longer}, so the learning rate ends at {total / warmup:.0%} of --lr; lower --warmup.")

    # ------------------------------------------------------------------ the loop

    def fit(self, run_log: RunLog) -> None:
        """Trains from the current state to the end of the run, evaluating and saving on the way.

        `Stopped`: it ended early and in order: a signal, or a non-finite loss with `--nonfinite stop`. UserError, on
        all ranks: the data of any rank turned out to be unusable.
        """
        self.run_log = run_log
        for note in self.notes:
            logging.warning(note)
        with self.control:
            evaluated = self.ranks.broadcast([row.get("epoch") for row in run_log.results])
            if self.epoch > 0 and self.epoch_steps == 0 and self.epoch not in evaluated:
                self.evaluate()  # the run ended between the last save and its evaluation
            while not self.finished:
                self.train_epoch()
                self.epoch, self.epoch_steps = self.epoch + 1, 0
                self.save_epoch()
                self.evaluate()
                self.draw()
            self.save_what_failed()
        self.figures.summarise(self.folder)

    @property
    def finished(self) -> bool:
        # After the last step, the epoch it belongs to has still to be closed: saved and evaluated.
        return self.epoch >= self.plan.epochs or (self.samples >= self.plan.total_samples and not self.epoch_steps)

    def train_epoch(self) -> None:
        """The rest of the current epoch: fetch, agree, step, log, save."""
        self.engine.model.train()
        left = self.plan.steps_left(self.epoch_steps, self.samples)
        batches = iter(self.data.epoch(self.epoch) if left else ())
        if left and not self.control.begun:
            slow = ", after the model is compiled, which takes minutes" if self.options.torchcompile else ""
            logging.info(f"Reading the first batch, for the first step{slow}.")
        self.figures.start()
        show = sys.stderr.isatty() if self.options.progress is None else self.options.progress
        place = {"initial": self.epoch_steps, "total": self.plan.steps_per_epoch, "unit": "step", "leave": False}
        name = f"epoch {self.epoch + 1}/{self.plan.epochs}"
        with tqdm(desc=name, disable=not (show and self.ranks.is_main), **place) as bar:
            for i in range(left):
                position = self.data.state_dict()  # a window that is fetched but not trained on is fetched again
                window, error = self.fetch(batches)
                self.act_on_wishes(position, error)
                window = [to_device(self.task.prepare(b), self.ranks.device, self.input_dtype) for b in window]
                losses, lr = self.step(window)
                self.figures.costs += [self.task.cost(batch) for batch in window] if self.ranks.is_main else []
                bar.update()
                if (self.epoch_steps - 1) % self.options.log_every_n_steps == 0 or i == left - 1:
                    self.log_step(losses, lr)
                if self.options.save_every_n_steps and self.steps % self.options.save_every_n_steps == 0:
                    self.save([f"step_{self.steps}.pt"], self.data.state_dict())
        self.settle()
        self.act_on_wishes(self.data.state_dict())
        self.report_skipped()

    def step(self, window: list[Batch]) -> tuple[dict[str, Tensor], float]:
        """One optimizer step on `window`, `--accum-freq` micro-batches on the device; returns its losses and lr."""
        if self.schedule is not None:
            self.schedule(self.samples / self.plan.reference_batch)
        lr = self.optimizer.param_groups[0]["lr"]
        scaler = self.engine.scaler  # only under `amp` does it do anything
        progress = Progress(self.epoch, self.epoch_steps, self.steps, self.samples, self.plan)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.task.gradients(window, self.engine, progress)
        self.settle()
        unscale(scaler, self.optimizer)
        norm = clip_grad_norm(self.parameters, self.options.grad_clip_norm)
        finite = torch.isfinite(norm)  # the same on all ranks, for gradients are averaged
        applied = cache(lambda: bool(finite))
        if scaler.is_enabled():  # leaves a step that is not finite out by itself
            scaler.step(self.optimizer)
            scaler.update()
        elif isinstance(self.optimizer, torch.optim.AdamW) and self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = (~finite).float()  # by which it leaves the step out, on the device
            self.optimizer.step()
        elif applied():
            self.optimizer.step()
        self.task.after_step(self.model, applied)
        if self.ema is not None and applied():
            self.ema.update(self.model)
        self.unsettled = partial(self.nonfinite_of, self.steps, applied, losses, norm, [b["key"] for b in window])
        if not self.runs_ahead:
            self.settle()
        self.steps, self.epoch_steps = self.steps + 1, self.epoch_steps + 1
        self.samples += self.plan.global_batch
        self.figures.steps += 1
        self.control.begun = True
        return losses, lr

    def nonfinite_of(
        self, step: int, applied: Callable[[], bool], losses: dict[str, Tensor], norm: Tensor, keys: list[list[str]]
    ) -> list[dict[str, Any]]:
        """A step that was not finite, in a list; waits for the device."""
        # An infinite gradient of a finite loss is the scaler's business.
        if applied() or self.engine.scaler.is_enabled() and bool(torch.isfinite(losses["loss"])):
            return []
        numbers = {"loss": losses["loss"].item(), "gradient_norm": norm.item()}
        return [{"step": step, "rank": self.ranks.rank, **numbers, "keys": list(itertools.chain(*keys))}]

    def settle(self) -> None:
        """Finds out whether the last step was finite. On a GPU this comes when the gradients of the next step are on
        their way, so that the device never waits for the program; or before what depends on it."""
        self.nonfinite += self.unsettled()
        self.unsettled = list

    def fetch(self, batches: Iterator[Batch]) -> tuple[list[Batch], UserError | None]:
        """The next window, or what is wrong with this rank's data."""
        begin = time.perf_counter()
        try:
            return [next(batches) for _ in range(self.options.accum_freq)], None
        except UserError as error:
            return [], error
        finally:
            self.figures.waited += time.perf_counter() - begin

    # ------------------------------------------------------------------ between two steps

    def act_on_wishes(self, position: dict[str, Any], error: UserError | None = None) -> None:
        """Saves or stops when any rank wants to: on a signal, by the clock, after a non-finite step, on bad data.

        `position`: of the data, for the current weights. `error`: what went wrong with this rank's data.
        """
        try:
            signal, save, nonfinite = self.control.agree(self.saver.due(), bool(self.nonfinite), error)
        except UserError:
            if self.steps:
                self.save([f"step_{self.steps}.pt"], position)  # once the data are mended, the run goes on here
            raise
        if nonfinite or save or signal:
            self.settle()
            nonfinite = self.record_nonfinite()
        stop = nonfinite and self.options.nonfinite == "stop"
        if save or signal or stop:
            self.save([f"step_{self.steps}.pt"], position)
        if stop:
            what = f"The loss or gradient of step {min(nonfinite)} was not finite, so it was not applied"
            after = "--resume latest goes on after them (--nonfinite skip passes over such steps)"
            raise Stopped(f"{what}; the samples are in nonfinite.jsonl, and {after}.", EXIT_NONFINITE)
        if signal:
            where = f"Stopped by signal {signal} after step {self.steps}"
            raise Stopped(f"{where}; --resume latest goes on exactly here.", EXIT_INTERRUPTED)

    def record_nonfinite(self) -> set[int]:
        """Writes down steps that were not finite, and returns their numbers; a collective call."""
        records = list(itertools.chain(*self.ranks.gather(self.nonfinite)))
        self.nonfinite, steps = [], {record["step"] for record in records}
        self.nonfinite_steps += len(steps)
        for step in sorted(steps):
            logging.error(f"Step {step} was not applied: its loss or gradient is not finite.")
        if steps and self.ranks.is_main and self.folder is not None:
            append(self.folder / "nonfinite.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        return steps

    def log_step(self, losses: dict[str, Tensor], lr: float) -> None:
        values = self.ranks.mean(losses)  # waits for the device, so the clock is true
        where = {"step": self.steps - 1, "epoch": self.epoch, "samples": self.samples}
        row = self.figures.row(where, values, lr, self.task.log(self.model))
        self.run_log.train(row)
        left = (self.plan.total_samples - self.samples) / row["samples_per_second"]
        place = f"epoch {self.epoch + 1}/{self.plan.epochs} step {self.epoch_steps}/{self.plan.steps_per_epoch}"
        logging.info(f"{place} | {self.figures.line(row, values, left)}")

    def report_skipped(self) -> None:
        """What was left out in this epoch, over all ranks."""
        for rank, sentence in enumerate(self.ranks.gather(self.data.report().sentence())):
            if sentence:
                logging.warning(f"Rank {rank}: {sentence}" if self.ranks.world_size > 1 else sentence)
        if self.nonfinite_steps:
            logging.warning(f"{self.nonfinite_steps} steps so far were not applied: not finite.")

    def evaluate(self) -> None:
        """What is due after the epoch just completed; the averaged weights too, if there are any (`ema/...`)."""
        try:
            metrics = evaluate_task(self.task, self.model, self.ema, self.engine, self.epoch, self.finished)
        except NotFinite as problem:  # on all ranks; the weights may still get well
            logging.warning(f"No evaluation after epoch {self.epoch}: {problem}")
            return
        if metrics:
            metrics = {"epoch": self.epoch, "step": self.steps, **metrics}
            self.figures.evaluations.append(metrics)
            self.run_log.evaluation(metrics, self.steps)
            logging.info(f"Evaluation after epoch {self.epoch}: " + describe(metrics))
            self.saver.keep_best(self.epoch, {row.get("epoch"): self.task.score(row) for row in self.run_log.results})

    def draw(self) -> None:
        """The task's picture, if one is due after the epoch just completed."""
        if self.task.picture is not None:
            with gathered(self.model):
                picture = self.task.picture(self.model, self.epoch, self.finished)
            if picture is not None:
                self.run_log.picture("kept", picture, self.steps)

    # ------------------------------------------------------------------ state

    def state_dict(self, position: dict[str, Any]) -> dict[str, Any]:
        """Plain types and tensors: all that the rest of the run depends on. Call on all ranks; rank 0's is complete."""
        weights, optimizer = full_state_dict(self.model, self.optimizer)
        return {
            "epoch": self.epoch,
            "epoch_steps": self.epoch_steps,
            "step": self.steps,
            "samples": self.samples,
            "name": self.options.name,
            "state_dict": weights,
            "optimizer": optimizer,
            "scaler": self.engine.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else {},
            "ema_updates": self.ema.updates if self.ema is not None else 0,
            "task": self.task.state_dict(),
            "plan": asdict(self.plan),
            "data": self.ranks.gather(position),
            "files": self.data.files,
            "random": self.ranks.gather(self.engine.random_state()),
            "nonfinite_steps": self.nonfinite_steps,
            **self.described,
        }

    def load_state_dict(self, state: dict[str, Any], source: str | Path) -> None:
        """Continues from `state_dict`, from an OpenCLIP checkpoint (its epoch), or from bare weights (epoch 0).

        UserError: the state does not fit this run; what is loaded by then is not used.
        """
        whole = "epoch" in state
        before = state.get("config", dict.fromkeys(_IN_GROUPS))  # of OpenCLIP's nothing is known
        changed = differences(before, self.described.get("config", {}))
        if whole and "opt" in changed and before["opt"].lower() != self.options.opt.lower():
            raise UserError(f"{source} is of another optimizer: {changed['opt']}; keep it, or start by --pretrained.")
        optimizer, own_groups = self.optimizer if whole else None, [dict(g) for g in self.optimizer.param_groups]
        self.ema = checkpoint.restore(self.model, state, source, optimizer, self.options.ema_decay)
        if not whole:
            return
        for group, own in zip(self.optimizer.param_groups, own_groups, strict=True):
            group.update({k: own[k] for name in changed if (k := _IN_GROUPS.get(name)) in own})
        if self.engine.scaler.is_enabled() and state.get("scaler"):
            self.engine.scaler.load_state_dict(state["scaler"])
        self.epoch = state["epoch"]
        if "plan" not in state:  # OpenCLIP's: whole epochs
            self.steps = self.epoch * self.plan.steps_per_epoch
            self.samples = self.steps * self.plan.global_batch
            return
        if self.task.state_dict().keys() != state.get("task", {}).keys():
            raise UserError(f"{source} was written by another task: it lacks the state that this one continues from.")
        self.task.load_state_dict(state.get("task", {}))
        self.steps, self.samples, self.epoch_steps = state["step"], state["samples"], state["epoch_steps"]
        self.nonfinite_steps = state["nonfinite_steps"]
        change = self.plan.change_from(state["plan"], mid_epoch=self.epoch_steps > 0)
        if change and not self.options.allow_elastic:
            otherwise = "continue with what it had, or add --allow-elastic to go on by samples seen (not bit for bit)"
            raise UserError(f"{source} was written with {change}; {otherwise}.")
        self.plan = Plan.of(self.options, self.data.num_batches, self.ranks.world_size, state["plan"])
        self.schedule = self.plan.schedule(self.optimizer, self.options)
        read = differences(*(position.get("identity", {}) for position in (state["data"][0], self.data.state_dict())))
        told = [changed[name] for name in changed if name not in {"name", "logs", "resume", *read}]
        if told:
            self.notes.append(f"Going on with other options than {source} was written with: {', '.join(told)}.")
        if read:
            self.notes.append(f"The coming data are not those of the uninterrupted run: {', '.join(read.values())}.")
        if files := [*differences(state.get("files", {}), self.data.files)]:
            what = f"{len(files)} file(s) of the data have changed since {source} was written, by size or date"
            self.notes.append(f"{what}, the first of them {files[0]}; the coming samples may be others.")
        if self.finished:
            done = f"{self.epoch} epochs, {self.samples:,} samples"
            self.notes.append(f"Nothing is left to train: {source} has {done}; to go on, raise --epochs or --duration.")
        if change:
            self.notes.append(f"Elastic resume: {source} was written with {change}; going on by samples seen.")
            share = self.epoch_steps / state["plan"]["steps_per_epoch"]
            self.epoch_steps = min(round(share * self.plan.steps_per_epoch), self.plan.steps_per_epoch)
            self.data.skip_to(self.epoch, self.epoch_steps * self.options.accum_freq)
        else:
            if self.epoch_steps:
                self.data.load_state_dict(state["data"][self.ranks.rank])
            self.engine.restore_random_state(state["random"][self.ranks.rank])

    def save_epoch(self) -> None:
        """After an epoch: `epoch_K.pt` every --save-frequency epochs and at the end, `epoch_latest.pt` if asked."""
        options = self.options
        due = is_due(self.epoch, options.save_frequency, self.finished) or self.finished
        names = [f"epoch_{self.epoch}.pt"] * due + [checkpoint.LATEST] * options.save_most_recent
        self.save(names, self.data.state_dict())

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
        state = self.state_dict(position) if names else {}
        for name in names:
            self.saver.save(state, name)
        if (self.ranks.broadcast(self.saver.bad) or "").startswith("state_dict."):
            raise Stopped("The weights are not finite any more; resume from before, at a lower --lr.", EXIT_NONFINITE)


def evaluate_task(
    task: Task, model: nn.Module, ema: Ema | None, engine: Engine, epoch: int, last: bool
) -> dict[str, float]:
    """What is due at the end of `epoch`; the averaged weights too, if there are any (`ema/...`). {} if nothing is."""
    random_state = engine.random_state()
    try:
        with gathered(model):
            metrics = task.evaluate(model, epoch, last)
        if metrics and ema is not None:
            with ema.applied(model), gathered(model):
                metrics |= {f"ema/{name}": value for name, value in task.evaluate(model, epoch, last).items()}
    finally:  # the rest of the run must not depend on it: a resumed one may not evaluate here again
        engine.restore_random_state(random_state)
    return metrics
