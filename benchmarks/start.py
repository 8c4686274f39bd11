"""Seconds and memory from the command to the first step, with few shards and with as many as CC12M has.

    python benchmarks/start.py                        # 10, and 5,000 shards of 2,400 samples

All shards are links to one, with sizes noted beside them. `imports` is a program that only imports what the command
does. Memory is a process's own and its part of what it shares (PSS, so Linux only).
"""
from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from resume import write_shards
from telling import positive

from open_clip_elip.profile.report import Rows, machine, markdown_table, save, text_table

RUN = ("--model", "ViT-Pico-8-64-ELIP", "--batch-size", "64", "--epochs", "1", "--device", "cpu", "--logs", "none")


def link_shards(shard: Path, folder: Path, count: int, samples: int) -> str:
    folder.mkdir()
    names = [f"{number:05d}.tar" for number in range(count)]
    for name in names:
        os.link(shard, folder / name)
    (folder / "sizes.json").write_text(json.dumps(dict.fromkeys(names, samples)))
    return f"{folder}/{{00000..{count - 1:05d}}}.tar"


def memory(process: int) -> float:
    """MB of a process."""
    return int(re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{process}/smaps_rollup").read_text(), re.M)[1]) / 1e3


def start(pattern: str, workers: int) -> tuple[float, float, float]:
    """Seconds to the first step; MB of the trainer then, and of each worker."""
    command = [sys.executable, "-m", "training.main", *RUN, "--workers", str(workers), "--train-data", pattern]
    begin, told = time.perf_counter(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        for line in run.stdout:
            told.append(line)
            if "step 1/" in line:
                break
        else:
            raise SystemExit("".join(told))
        seconds = time.perf_counter() - begin
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        found = memory(run.pid), sum(map(memory, children)) / len(children)
        run.kill()
    return seconds, *found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=positive, nargs="+", default=[10, 5000], metavar="N")
    parser.add_argument("--samples", type=positive, default=2400, metavar="N", help="in a shard; default: %(default)s")
    parser.add_argument("--workers", type=positive, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    rows: Rows = [("", "seconds to the first step", "MB, trainer", "MB, each worker")]
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import training.work.main"], check=True)
    rows.append(("imports", f"{time.perf_counter() - begin:.1f}", "", ""))
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder) / "one"
        one.mkdir()
        write_shards(one, args.samples, 1)
        for count in dict.fromkeys(args.shards):
            pattern = link_shards(one / "00000.tar", Path(folder) / str(count), count, args.samples)
            seconds, *parts = start(pattern, args.workers)
            name = f"{count:,} shards, {count * args.samples:,} samples"
            rows.append((name, f"{seconds:.1f}", *(f"{part:,.0f}" for part in parts)))
    text = f"{machine(torch.device('cpu'))['device']}; {args.workers} workers."
    print(f"{text}\n\n{text_table(rows)}")
    if args.markdown is not None:
        save(args.markdown, f"# Start\n\n{text}\n\n{markdown_table(rows)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
