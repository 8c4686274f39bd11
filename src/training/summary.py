"""What a run comes to: operations and tokens a second, the device's peak, the summary at the end."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from open_clip_elip.profile.flops import Flops


class Cost(NamedTuple):
    """Of one sample in a training step, as the method needs it: what is computed twice to save memory counts once.

    Attributes:
        flops: operations, `scoring` of them to choose tokens.
        tokens: that enter the towers.
    """

    flops: float
    scoring: float
    tokens: float

    @classmethod
    def of(cls, counted: Flops, samples: int, tokens: float) -> Cost:
        """From the operations of a step on `samples` samples, of `tokens` tokens each."""
        return cls(counted.total / samples, counted.scoring / samples, tokens)

    def columns(self, rate: float, peak: float | None) -> dict[str, float]:
        """For the log, at `rate` samples a second; `peak` operations a second of all devices, if known, give MFU."""
        speed = self.flops * rate
        found = {"gflops_per_pair": self.flops / 1e9, "tokens_per_second": self.tokens * rate}
        return found | {"tflops_per_second": speed / 1e12} | ({} if peak is None else {"mfu": speed / peak})


# Dense peaks in 10**12 operations a second, from the makers' data sheets: float16 and bfloat16 on tensor cores with
# float32 accumulation, TF32, float32. None: the device has no units for it. The first name that fits is taken.
_PEAKS: tuple[tuple[str, float, float | None, float | None, float], ...] = (
    # name, float16, bfloat16, TF32, float32
    ("B200", 2250, 2250, 1125, 75),
    ("H200 NVL", 835, 835, 417, 60),
    ("H200", 989, 989, 494, 67),
    ("H100 NVL", 835, 835, 417, 60),
    ("H100 PCIe", 756, 756, 378, 51),
    ("H100", 989, 989, 494, 67),
    ("A100", 312, 312, 156, 19.5),
    ("L40S", 362, 362, 183, 91.6),
    ("L4", 121, 121, 60, 30.3),
    ("RTX 4090", 165.2, 165.2, 82.6, 82.6),
    ("RTX 3090", 71.2, 71.2, 35.6, 35.6),
    ("RTX A6000", 154.8, 154.8, 77.4, 38.7),
    ("RTX A5000", 111.2, 111.2, 55.6, 27.8),
    ("V100S", 130, None, None, 16.4),
    ("V100-PCIE", 112, None, None, 14),
    ("V100", 125, None, None, 15.7),
    ("T4", 65, None, None, 8.1),
)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense peak of one device in operations a second for a `--precision`; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if re.search("MIG|Laptop", name):  # a part of the device, or another one of the same name
        return None
    for known, float16, bfloat16, tf32, float32 in _PEAKS:
        if re.search(rf"\b{known}\b", name, re.IGNORECASE):
            single = float32 if tf32 is None or torch.get_float32_matmul_precision() == "highest" else tf32
            peak = bfloat16 if "bf" in precision else single if precision == "fp32" else float16
            return None if peak is None else peak * 1e12
    return None


def summary(
    *,
    seconds: float,
    waited: float,
    samples: int,
    losses: Sequence[float],
    evaluations: Sequence[Mapping[str, float]],
    cost: Cost | None,
    peak: float | None,
    rrt: float,
    peak_memory_gb: float,
    folder: Path | None,
) -> str:
    """What a run (or what was left of it after a resume) came to, in a few lines.

    Args:
        seconds: of training, evaluation and saving left out; `waited` of them, mean over the processes, without data.
        samples: trained on in that time, by all processes.
        losses, evaluations: in their order; each evaluation has its `epoch` besides metrics by name.
        peak: operations a second of all devices together.
        peak_memory_gb: the highest of all processes.
    """
    rate = samples / seconds if seconds > 0 else 0.0
    whole = round(seconds)
    clock = f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    lines = [f"trained    {samples:,} samples in {clock}, {rate:.4g} samples/s"]
    if seconds > 0:
        lines[0] += f", data wait {waited / seconds:.1%}"
    if cost is not None:
        used = f", {cost.flops * rate / peak:.1%} of the peak" if peak else ""
        lines.append(
            f"compute    {cost.flops * rate / 1e12:.4g} TFLOP/s{used}, {cost.tokens * rate:.4g} tokens/s, "
            f"{cost.flops / 1e9:.4g} GFLOP a pair ({cost.scoring / cost.flops:.1%} scoring)"
        )
    lines.append(f"memory     {peak_memory_gb:.2f} GB at the peak; RRT {rrt:.1%}")
    if losses:
        lines.append(f"loss       {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    lines += _best_and_last(evaluations)
    if folder is not None:
        lines.append(f"run        {folder}")
    return "\n".join(lines)


def _best_and_last(evaluations: Sequence[Mapping[str, float]]) -> list[str]:
    lines = []
    for name in dict.fromkeys(k for metrics in evaluations for k in metrics if k not in ("epoch", "step")):
        rows = [m for m in evaluations if isinstance(m.get(name), float)]
        if rows:
            lower = any(part in name for part in ("loss", "rank"))
            best = (min if lower else max)(rows, key=lambda m: m[name])
            lines.append(f"{name}: best {best[name]:.4f} (epoch {best['epoch']}), last {rows[-1][name]:.4f}")
    return lines
