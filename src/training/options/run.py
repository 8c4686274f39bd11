"""Options of a training run, whatever is trained: length, optimisation, precision, processes, checkpoints, logging."""
from __future__ import annotations

import re
from dataclasses import dataclass

from .. import durations
from ..errors import UserError
from ..launch import several_processes
from .data import LoadingOptions
from .kinds import COUNT, DEVICE, FRACTION_BELOW_1, NOT_NEGATIVE, POSITIVE, POSITIVE_COUNT, SHARE, SWITCH, Kind, one_of
from .parser import Section, forbid, option

COOLDOWN = "lr_scheduler=const-cooldown !skip_scheduler"
DECAY = "lr_scheduler=epoch-decay !skip_scheduler"
BY_EPOCH = "lr_scheduler=epoch-cosine|epoch-decay !skip_scheduler"
PRECISION = one_of("amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16", "fp32")
DURATION = Kind(
    lambda word: int(word) if word.isdecimal() else word, "a length like 500, 2ep, 1e6samples or 5%", "N|NUNIT",
    lambda value: durations.parse(str(value)))  # fmt: skip
AUTO = "auto"
BATCH = Kind(
    lambda word: AUTO if word == AUTO else int(word), f"{POSITIVE_COUNT.phrase}, or {AUTO}", "N|auto",
    lambda value: value == AUTO or POSITIVE_COUNT.allowed(value))  # fmt: skip
OPTIMIZER = Kind(
    str, "adamw, or timm/NAME for an optimizer of timm", "NAME",
    lambda value: re.fullmatch("adamw|timm/.+", value.lower()))  # fmt: skip
REPORTERS = Kind(
    lambda word: word.replace(" ", ""), "wandb, tensorboard, csv (joined with commas) or all", "NAMES",
    lambda value: {*value.split(",")} <= {"", "wandb", "tensorboard", "csv", "all"})  # fmt: skip


@dataclass
class OptimizationOptions(Section, title="optimisation", needs="trains"):
    epochs: int = option(32, "Epochs in all.", COUNT, needs="trains !duration")
    duration: int | str | None = option(None, "Instead of --epochs: steps, or 2.5ep, 1e7samples.", DURATION)
    batch_size: int | str | None = option(
        None, "Samples of a batch, for each process. Without it and --global-batch: 64. auto: the largest of which a "
        "step, tried before the run, fits the memory less a tenth.", BATCH, needs="")
    memory: float | None = option(
        None, "Memory of a process in GB (10^9 bytes), for --batch-size auto. Without it: what the GPU has free.",
        POSITIVE, metavar="GB", needs="batch_size=auto trains")
    global_batch: int | None = option(
        None, "Samples of a step over all processes, instead of --batch-size.", POSITIVE_COUNT, needs="!batch_size")
    accum_freq: int = option(1, "Batches that make one optimizer step.", POSITIVE_COUNT)
    opt: str = option("adamw", "Optimizer: adamw, or any of timm's as timm/NAME.", OPTIMIZER)
    lr: float | None = option(None, "Highest learning rate. Without it: 5e-4 (timm's have no default).", POSITIVE)
    lr_base_batch: int | None = option(
        None, "The step of N samples that --lr is meant for; it is multiplied by the samples of a step here / N.",
        POSITIVE_COUNT)
    beta1: float | None = option(None, "Adam's first beta. Without it: 0.9.", FRACTION_BELOW_1)
    beta2: float | None = option(None, "Adam's second beta. Without it: 0.98 for ViTs, else 0.999.", FRACTION_BELOW_1)
    eps: float | None = option(None, "Adam's epsilon. Without it: 1e-6 for ViTs, else 1e-8.", POSITIVE)
    wd: float = option(0.2, "Weight decay; never applied to biases, norms and the temperature.", NOT_NEGATIVE)
    momentum: float | None = option(None, "For timm's optimizers that have one.", NOT_NEGATIVE, needs="!opt=adamw")
    grad_clip_norm: float | None = option(None, "Clip the gradient to this norm. Without it: no clipping.", POSITIVE)
    warmup: int | str = option(
        10000, "How long the learning rate rises: steps, or with a unit: 2ep, 1e6samples, 5%.", DURATION,
        needs="trains !skip_scheduler")
    lr_scheduler: str = option(
        "cosine", "Learning rate after the warm-up: a cosine to 0, constant, or constant with a cooldown at the end. "
        "epoch-cosine is ALBEF's: the warm-up rises every 100 steps, the cosine falls from epoch to epoch. epoch-decay "
        "is BLIP's: multiplied by --lr-decay from epoch to epoch. linear is METER's: a line from 0, and one to 0.",
        one_of("cosine", "const", "const-cooldown", "epoch-cosine", "epoch-decay", "linear"),
        needs="trains !skip_scheduler")
    lr_start: float = option(0.0, "Learning rate at which the warm-up begins.", NOT_NEGATIVE, needs=BY_EPOCH)
    lr_end: float = option(0.0, "Learning rate that it falls to, and not below.", NOT_NEGATIVE, needs=BY_EPOCH)
    lr_decay: float = option(0.9, "Factor of the learning rate after each epoch.", SHARE, needs=DECAY)
    epochs_cooldown: int | None = option(None, "The last N of --epochs are the cooldown.", COUNT, needs=COOLDOWN)
    layer_decay: float | None = option(None, "Factor of the rate for each layer below the last.", SHARE)
    ema_decay: float | None = option(
        None, "Also keep an average of the weights with this decay.", FRACTION_BELOW_1, needs="")
    nonfinite: str = option(
        "stop", "What to do after a step whose loss or gradient is not finite (it is never applied): stop, or skip it.",
        one_of("stop", "skip"))
    lr_cooldown_end: float = option(0.0, "Learning rate at the end of the cooldown.", NOT_NEGATIVE, needs=COOLDOWN)
    lr_cooldown_power: float = option(1.0, "Power of its polynomial; 1 is linear.", NOT_NEGATIVE, needs=COOLDOWN)
    skip_scheduler: bool = option(False, "Keep the learning rate at --lr throughout.")

    @property
    def trains(self) -> bool:
        """The run is to train, not only to evaluate."""
        return True

    def adam_defaults(self) -> dict[str, float]:
        """The hyper-parameters of the CLIP paper, which has other ones for ViTs."""
        vit = "vit" in (getattr(self, "model", None) or "").lower()
        return {"lr": 5e-4, "beta1": 0.9, "beta2": 0.98 if vit else 0.999, "eps": 1e-6 if vit else 1e-8}

    def __post_init__(self) -> None:
        if self.batch_size is None and self.global_batch is None:
            self.batch_size = 64
        for name, value in {} if self._timm else self.adam_defaults().items():  # timm's optimizers bring their own
            if getattr(self, name) is None:
                setattr(self, name, value)

    def divide_global_batch(self, world_size: int) -> None:
        """Sets the batch size of one process where only the global batch was given."""
        if self.batch_size is not None:
            return
        parts = world_size * self.accum_freq
        self.batch_size, rest = divmod(self.global_batch, parts)
        if rest or not self.batch_size:
            among = f"{world_size} process(es) x --accum-freq {self.accum_freq} = {parts}"
            advice = "change one of them, or give --batch-size"
            raise UserError(f"The global batch of {self.global_batch} cannot be divided by {among}: {advice}.")

    def scale_lr(self, world_size: int) -> str | None:
        """Brings `lr` from `lr_base_batch`, which is then None, to the samples of a step; tells of it."""
        if self.lr_base_batch is None:
            return None
        base, step = (self.lr, self.lr_base_batch), self.batch_size * self.accum_freq * world_size
        self.lr, self.lr_base_batch = self.lr * step / self.lr_base_batch, None
        return f"--lr {base[0]:g} is for {base[1]} samples in a step; for {step} it is {self.lr:g}."

    @property
    def _timm(self) -> bool:
        return self.opt.lower().startswith("timm/")

    def check(self) -> None:
        if self.lr_scheduler == "const-cooldown":
            length = "the number of epochs at the end to cool down in"
            forbid(self.epochs_cooldown is None, f"--lr-scheduler const-cooldown needs --epochs-cooldown, {length}.")
            problem = f"--epochs-cooldown {self.epochs_cooldown} is more than --epochs {self.epochs}: lower it."
            forbid(self.epochs_cooldown > self.epochs, problem)
        if self._timm:
            one_beta = (self.beta1 is None) != (self.beta2 is None)
            forbid(one_beta, f"--opt {self.opt} needs both --beta1 and --beta2, or neither.")
            missing = self.trains and self.lr is None and not self.skip_scheduler
            forbid(missing, f"--opt {self.opt} has no default learning rate to schedule: give --lr.")
        forbid(self.lr_base_batch is not None and self.lr is None, "--lr-base-batch scales --lr: give that too.")
        forbid(self.batch_size == AUTO and not self.trains, "--batch-size auto is for training: give a number.")
        forbid(self.batch_size == AUTO and self.fsdp, "--batch-size auto cannot try a sharded step: give a number.")
        whole = "--duration is the whole run: give it in steps, epochs (ep) or samples, not in %."
        forbid(str(self.duration).endswith("%"), whole)


@dataclass
class SpeedOptions(Section, title="precision, speed and memory"):
    precision: str = option(
        "amp", "amp: mixed float16 (on a CPU bfloat16) with loss scaling; amp_bf16: mixed bfloat16; bf16 and fp16: "
        "weights in that format but for norms; pure_*: all weights; fp32.", PRECISION)
    device: str = option("cuda", "cuda, cpu, ... Where there is no CUDA, cuda means cpu.", DEVICE)
    grad_checkpointing: bool = option(False, "Recompute activations backwards, to save memory.", needs="trains")
    torchcompile: bool = option(False, "Compile it with torch.compile.", spellings=("--compile",), needs="trains")
    shortcuts: bool = option(
        True, "Cut captions behind their end, and compute only the pooled row of the last layers; numbers differ by "
        "rounding alone. --no-shortcuts runs models as OpenCLIP does, or the released program.")
    gone = {
        "use_bnb_linear": "is not supported: use --precision amp_bf16 to save time and memory instead",
        **dict.fromkeys(("torchscript", "trace"), "is not supported: use --torchcompile instead"),
    }


@dataclass
class DistributedOptions(Section, title="several processes (started by torchrun)", needs="several_processes"):
    dist_url: str | None = option(None, "Address at which the processes meet. Without it: torchrun's.", metavar="URL")
    dist_backend: str | None = option(None, "nccl, gloo, hccl, ... Without it: what fits the device.", metavar="NAME")
    no_set_device_rank: bool = option(False, "Do not choose the device by local rank: each process sees only its own.")
    use_bn_sync: bool = option(False, "Compute BatchNorm statistics over all processes.")
    fsdp: bool = option(False, "Split weights, gradients and optimizer states (FSDP2).", needs="trains")
    ddp_static_graph: bool = option(False, "Tell DDP that the graph never changes.", needs="several_processes !fsdp")
    gone = {"horovod": "is not supported: start several processes with torchrun instead"}

    @property
    def several_processes(self) -> bool:
        return several_processes()



@dataclass
class CheckpointOptions(Section, title="run folder and checkpoints", needs="trains !logs=none"):
    logs: str = option("./logs/", "Folder of all runs; 'none' keeps nothing.", metavar="DIR", path=True, needs="")
    name: str | None = option(
        None, "Name of the folder in --logs. Without it: from the time and the main options.", metavar="NAME", needs="")
    resume: str | None = option(
        None, "Continue from this checkpoint, or from the newest of --name (latest).", metavar="FILE|latest", path=True,
        needs="")
    save_frequency: int = option(1, "Save every N epochs and after the last; 0: only after the last.", COUNT)
    save_every_n_steps: int | None = option(None, "Also save every N optimizer steps.", POSITIVE_COUNT)
    save_every_n_minutes: float | None = option(None, "Also save in the middle of an epoch, every N minutes.", POSITIVE)
    keep_last: int | None = option(
        None, "Keep the newest N checkpoints and the best. Without it: every epoch's, and the two newest in the middle "
        "of an epoch.", POSITIVE_COUNT)
    allow_elastic: bool = option(
        False, "Let --resume change the number of processes or the batch, by samples seen.", needs="resume trains")
    save_most_recent: bool = option(False, "Also save every epoch to epoch_latest.pt.")
    delete_previous_checkpoint: bool = option(False, "Delete the checkpoint before, once a new one is saved.")
    remote_sync: str | None = option(
        None, "Copy the run folder to this URL (of any kind that fsspec knows) as it grows.", metavar="URL", path=True,
        needs="!logs=none")
    remote_sync_frequency: int = option(300, "Seconds between two copies.", POSITIVE_COUNT, needs="remote_sync")
    remote_sync_protocol: str = option("s3", "As in OpenCLIP: fsspec copies in either case.", one_of("s3", "fsspec"))
    copy_codebase: bool = option(False, "Keep a copy of the code in the run folder.", needs="!logs=none")

    def check(self) -> None:
        forbid("://" in self.logs, f"--logs {self.logs} is no folder; --remote-sync copies a run to a URL.")


@dataclass
class LoggingOptions(Section, title="logging"):
    log_every_n_steps: int = option(100, "Steps between two lines of the log.", POSITIVE_COUNT, needs="trains")
    report_to: str = option(
        "", "Where metrics are written: wandb, tensorboard (joined with commas), or all; csv alone always.",
        REPORTERS, joined=",")
    progress: bool | None = option(None, "Show a progress bar. Without it: on a terminal only.", SWITCH)
    wandb_project_name: str = option("open-clip", "Project in wandb.", metavar="NAME", needs="report_to=wandb|all")
    wandb_notes: str = option("", "Notes on the run in wandb.", needs="report_to=wandb|all")
    log_local: bool = option(False, "Write a log file for every process, not only the first.", needs="!logs=none")
    debug: bool = option(False, "Log more.")


@dataclass
class TrainingOptions(
    LoadingOptions, OptimizationOptions, SpeedOptions, DistributedOptions, CheckpointOptions, LoggingOptions
):
    """All that the trainer itself needs."""
