"""Kills a training run at random moments, resumes it, and compares its end with that of an undisturbed run.

    python scripts/chaos.py                    # 20 kills
    python scripts/chaos.py --kills 100 --seed 1

A small run on pictures of noise (CPU, seconds) saves a checkpoint after every optimizer step, so that many of the
kills (SIGKILL, to the whole process group, loader workers too) strike while one is being written. After each kill
the same command is started again with `--resume latest`. Printed: kills survived and lost, and whether the final
weights are bit-equal to those of a run that nobody disturbed. The exit code is 0 only if they are, and nothing was
lost.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

from training import checkpoint
from training.main import main as train

MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 6, "width": 64, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    "token_reduction": {"method": "elip"},
}
WORDS = "red green blue gray dark light round square".split()


def write_shards(folder: Path, shards: int, samples: int) -> str:
    """Noise pictures with captions; returns the pattern of the shards."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard * samples, (shard + 1) * samples):
                file = BytesIO()
                pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(file, "PNG")
                caption = f"a {WORDS[i % 8]} {WORDS[i // 8 % 8]} thing".encode()
                for extension, data in (("png", file.getvalue()), ("txt", caption)):
                    info = tarfile.TarInfo(f"{i:06d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, BytesIO(data))
    return str(folder / f"{{00000..{shards - 1:05d}}}.tar")


def command(folder: Path, shards: str, name: str, epochs: int) -> list[str]:
    return [
        "--train-data", shards, "--dataset-type", "webdataset", "--train-num-samples", "96", "--batch-size", "8",
        "--workers", "2", "--model", "Chaos-ELIP", "--precision", "fp32", "--device", "cpu", "--epochs", str(epochs),
        "--warmup", "4", "--ema-decay", "0.9", "--save-every-n-steps", "1", "--keep-last", "3", "--no-progress",
        "--logs", str(folder), "--name", name, "--resume", "latest",
    ]  # fmt: skip


def start(argv: list[str]) -> int:
    """The training in a forked child with a process group of its own; its output goes nowhere. Returns its pid.

    Forking instead of starting an interpreter saves the seconds of import, so that most of a child's life is training.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        code = train(argv)
    finally:
        os._exit(code)


def final_state(folder: Path, name: str, epochs: int) -> dict:
    return checkpoint.load(folder / name / "checkpoints" / f"epoch_{epochs}.pt")


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def chaos(folder: Path, kills: int, seed: int, epochs: int) -> bool:
    """Runs the whole comparison in `folder`; True if every kill was survived and the ends are bit-equal."""
    (folder / "Chaos-ELIP.json").write_text(json.dumps(MODEL))
    open_clip.add_model_config(folder / "Chaos-ELIP.json")
    torch.set_num_threads(1)  # also makes forking safe: no thread pool exists yet
    shards = write_shards(folder / "shards", shards=4, samples=24)

    begin = time.perf_counter()
    _, status = os.waitpid(start(command(folder, shards, "undisturbed", epochs)), 0)
    length = time.perf_counter() - begin
    if status:
        print(f"The undisturbed run failed with exit code {os.waitstatus_to_exitcode(status)}.")
        return False
    print(f"undisturbed: {length:.1f} s")

    rng = random.Random(seed)
    killed = lost = saving = 0
    furthest = -1
    argv = command(folder, shards, "disturbed", epochs)
    checkpoints = folder / "disturbed" / "checkpoints"
    while True:
        pid = start(argv)
        if killed < kills:
            deadline = time.perf_counter() + rng.uniform(0.05, 0.6) * length
            while time.perf_counter() < deadline and os.waitpid(pid, os.WNOHANG) == (0, 0):
                time.sleep(0.005)
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            else:
                killed += 1
            try:
                os.waitpid(pid, 0)
            except ChildProcessError:
                pass
            saving += any(checkpoints.glob(".*.tmp")) if checkpoints.is_dir() else 0
            newest = checkpoint.newest(checkpoints) if checkpoints.is_dir() else None
            step = -1 if newest is None else checkpoint.load(newest)["step"]
            lost += step < furthest
            furthest = max(furthest, step)
            if killed < kills and (checkpoints / f"epoch_{epochs}.pt").is_file():
                shutil.rmtree(folder / "disturbed")  # finished before the last kill: once more from the beginning
                furthest = -1
            continue
        _, status = os.waitpid(pid, 0)
        break
    same = status == 0 and all(
        equal(final_state(folder, "undisturbed", epochs)[k], final_state(folder, "disturbed", epochs)[k])
        for k in ("state_dict", "ema")
    )
    print(f"kills: {killed}, of which while saving: {saving}; survived {killed - lost}, lost {lost}")
    print(f"final weights and their average bit-equal to the undisturbed run: {'yes' if same else 'NO'}")
    return same and not lost


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many times to kill (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--epochs", type=int, default=4, help="length of the run, 12 steps each (default 4)")
    args = parser.parse_args(argv)
    if args.kills < 0 or args.epochs < 1:
        parser.error("--kills must be at least 0 and --epochs at least 1.")
    with tempfile.TemporaryDirectory() as folder:
        return 0 if chaos(Path(folder), args.kills, args.seed, args.epochs) else 1


if __name__ == "__main__":
    sys.exit(main())
