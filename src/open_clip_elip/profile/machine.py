"""What figures were measured on. No names of hosts, people or folders."""
from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .errors import ProfileError

PACKAGES = ("torch", "open_clip_torch", "open_clip_elip")


def find_device(name: str | None) -> torch.device:
    """The device of a command line; by default the GPU, if there is one.

    Raises:
        ProfileError: there is no such device here.
    """
    available = torch.cuda.is_available()
    name = name or ("cuda" if available else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?" if available else "cpu", name):
        raise ProfileError(f"There is no device {name!r} here; take {'cpu or cuda' if available else 'cpu'}.")
    return torch.device(name)


def machine(device: str | torch.device) -> dict[str, Any]:
    """Device, cores and threads, versions."""
    device = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", file.read_text(), re.MULTILINE) if file.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def describe_machine(found: dict[str, Any]) -> str:
    """One line of what `machine` returns."""
    versions = ", ".join(f"{package} {found[package]}" for package in PACKAGES)
    return f"{found['device']}, {found['cores']} cores, {found['threads']} threads; Python {found['python']}, {versions}"
