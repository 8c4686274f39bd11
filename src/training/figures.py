"""What the log tells of a run: rates, waits, costs, and its summary."""
from __future__ import annotations

import logging
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from .distributed import Ranks
from .files import expendable
from .tasks.base import Cost

Row = Mapping[str, float]

# Dense peaks in 10**12 operations a second, from the makers' data sheets: float16 and bfloat16 on tensor cores with
# float32 accumulation, TF32, float32. None: the device has no units for it. The first name that fits is taken.
_PEAKS: dict[str, tuple[float, float | None, float | None, float]] = {
    "B200": (2250, 2250, 1125, 75),
    "H200 NVL": (835, 835, 417, 60),
    "H200": (989, 989, 494, 67),
    "H100 NVL": (835, 835, 417, 60),
    "H100 PCIe": (756, 756, 378, 51),
    "H100": (989, 989, 494, 67),
    "A100": (312, 312, 156, 19.5),
    "L40S": (362, 362, 183, 91.6),
    "L4": (121, 121, 60, 30.3),
    "RTX 4090": (165.2, 165.2, 82.6, 82.6),
    "RTX 3090": (71.2, 71.2, 35.6, 35.6),
    "RTX A6000": (154.8, 154.8, 77.4, 38.7),
    "RTX A5000": (111.2, 111.2, 55.6, 27.8),
    "V100S": (130, None, None, 16.4),
    "V100-PCIE": (112, None, None, 14),
    "V100": (125, None, None, 15.7),
    "T4": (65, None, None, 8.1),
}


class Figures:
    """Counts since the last row of the log (optimizer `steps`, seconds `waited` for data, `costs` of a sample of each
    batch, None where not known) and since this process began; `evaluations` are metrics with `epoch`, in order."""

    def __init__(self, ranks: Ranks, precision: str, global_batch: int):
        self.ranks, self.global_batch = ranks, global_batch
        peak = peak_flops(ranks.device, precision)
        self.peak = peak and peak * ranks.world_size
        self.totals: Counter[str] = Counter()
        self.sums: Counter[str] = Counter()  # the task's columns, times samples
        self.losses: list[float] = []  # the first and the last
        self.evaluations: list[dict[str, float]] = []
        self.start()

    def start(self) -> None:
        self.since, self.steps, self.waited, self.costs = time.perf_counter(), 0, 0.0, []

    def row(self, where: Row, losses: Row, lr: float, columns: Row) -> dict[str, float]:
        """The next row of train.csv; what has been counted begins anew. `where`: step, epoch and samples; `columns`:
        the task's own."""
        steps, seconds, waited = self.steps, time.perf_counter() - self.since, self.waited
        cost = Cost.mean(self.costs)
        self.start()
        samples = steps * self.global_batch
        rate = samples / seconds
        self.totals.update(seconds=seconds, waited=waited, samples=samples)
        self.sums.update({name: value * samples for name, value in columns.items()})
        self.losses = [*self.losses[:1], losses["loss"]]
        row = {
            **where,
            **losses,
            "lr": lr,
            "samples_per_second": rate,
            "samples_per_second_per_gpu": rate / self.ranks.world_size,
            "data_time": waited / steps,
            "batch_time": seconds / steps,
            **columns,
            "peak_memory_gb": peak_memory_gb(self.ranks.device),
        }
        if cost is not None:
            self.totals.update(operations=cost.operations * samples, tokens=cost.tokens * samples)
            row["gflops_per_sample"] = cost.operations / 1e9
            row["tokens_per_second"] = cost.tokens * rate
            row["tflops_per_second"] = cost.operations * rate / 1e12
            if self.peak is not None:
                row["mfu"] = cost.operations * rate / self.peak
        return row

    def line(self, row: Row, losses: Row, seconds_left: float) -> str:
        """A row for people."""
        extra = [name for name in losses if name != "loss"] if len(losses) > 2 else []
        parts = [
            f"loss {losses['loss']:.4f}",
            *(f"{name.replace('_', ' ')} {row[name]:.4g}" for name in [*extra, *self.sums]),
            f"{row['samples_per_second']:.4g} samples/s, data wait {row['data_time'] / row['batch_time']:.0%}",
            f"lr {row['lr']:.3g}",
        ]
        if "tflops_per_second" in row:
            mfu = f", MFU {row['mfu']:.1%}" if "mfu" in row else ""
            parts.append(f"{row['tflops_per_second']:.3g} TFLOP/s{mfu}")
        return " | ".join([*parts, f"peak memory {row['peak_memory_gb']:.2f} GB", f"{_clock(seconds_left)} left"])

    def summarise(self, folder: Path | None) -> None:
        """Logs what the run (or what was left of it after a resume) came to, and writes `summary.txt`. Collective."""
        seconds, samples, operations = (self.totals[name] for name in ("seconds", "samples", "operations"))
        rate = samples / seconds if seconds else 0.0
        waited = f", data wait {self.totals['waited'] / seconds:.1%}" if seconds else ""
        lines = [f"trained    {samples:,} samples in {_clock(seconds)}, {rate:.4g} samples/s{waited}"]
        if operations:
            used = f", {operations / seconds / self.peak:.1%} of the peak" if self.peak else ""
            tokens, each = self.totals["tokens"] / seconds, operations / samples / 1e9
            speed = f"{operations / seconds / 1e12:.4g} TFLOP/s{used}"
            lines.append(f"compute    {speed}, {tokens:.4g} tokens/s, {each:.4g} GFLOP a sample")
        lines.append(f"memory     {max(self.ranks.gather(peak_memory_gb(self.ranks.device))):.2f} GB at the peak")
        if self.sums:
            means = (f"{name.replace('_', ' ')} {total / samples:.4g}" for name, total in self.sums.items())
            lines.append(f"on average {', '.join(means)}")
        if self.losses:
            lines.append(f"loss       {self.losses[0]:.4f} at first, {self.losses[-1]:.4f} at last")
        for name in dict.fromkeys(key for metrics in self.evaluations for key in metrics if key != "epoch"):
            rows = [metrics for metrics in self.evaluations if isinstance(metrics.get(name), float)]
            if rows:
                better = min if "loss" in name or name.endswith("_rank") else max
                best = better(rows, key=lambda metrics: metrics[name])
                lines.append(f"{name}: best {best[name]:.4f} (epoch {best['epoch']}), last {rows[-1][name]:.4f}")
        if folder is not None:
            lines.append(f"run        {folder}")
        text = "\n".join(lines)
        logging.info("Summary\n" + text)
        if self.ranks.is_main and folder is not None:
            with expendable(folder / "summary.txt"):
                (folder / "summary.txt").write_text(text + "\n")


def describe(metrics: Row) -> str:
    return ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items() if k != "step")


def peak_memory_gb(device: torch.device) -> float:
    """Peak so far in GB: allocated device memory on CUDA, resident memory of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense peak of one device in operations a second for a `--precision`; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    found = [peaks for known, peaks in _PEAKS.items() if re.search(rf"\b{known}\b", name, re.IGNORECASE)]
    if not found or re.search("MIG|Laptop", name):  # a part of the device, or another one of the same name
        return None
    float16, bfloat16, tf32, float32 = found[0]
    peak = bfloat16 if "bf" in precision else float16
    if precision == "fp32":
        peak = float32 if tf32 is None or torch.get_float32_matmul_precision() == "highest" else tf32
    return peak and peak * 1e12


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
