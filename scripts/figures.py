"""Records figures that a change of the code must not change, and compares them to the last digit.

    python scripts/figures.py --write tests/figures.json --jobs 2      # before the change
    python scripts/figures.py --against tests/figures.json --jobs 2    # after it (--only 'elip*': some of them)

Each case is a command or two on a tiny model and pictures of noise, run in processes of their own on one CPU thread.
Only command lines are used and only files are read, so the same script runs on any version of the code: on that of
PYTHONPATH, else on the one that is installed. The exit code is 1 if a figure differs, or if a case fails. Rounding
depends on the processor and on torch: figures agree only where both are those of the recording.

The cases `quickstart` need `data/openmoji-64` and the finished `logs/quickstart` in the working folder, else they are
skipped. `quickstart run` only reads what scripts/quickstart.sh left there: train anew (FRESH=1, two threads) before it.
"""
from __future__ import annotations

import argparse
import csv
import fnmatch
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

Figures = dict[str, Any]

MODEL = "ViT-Pico-8-64-ELIP"
COLOURS = {"red": (220, 40, 30), "green": (40, 180, 60), "blue": (40, 60, 210), "yellow": (230, 210, 40)}
WORDS = "round square dark light small large old new soft hard striped".split()
PLAIN = "--workers 1 --device cpu --precision fp32 --no-progress".split()
SMALL = [*PLAIN, *"--batch-size 8 --warmup 2 --epochs 2 --log-every-n-steps 1".split()]
PROFILED = (
    "ViT-S-16 ViT-S-16-ELIP ViT-B-16-ELIP ViT-S-16-EViT ViT-S-16-ToMe ViT-S-16-Random ViT-L-14-ELIP ViT-B-32-ELIP"
).split()
QUICKSTART, EMOJI = Path("logs/quickstart"), Path("data/openmoji-64/val")
NOT_RUN, FAILED = "not run", "failed"  # in place of figures


class Skipped(Exception):
    """A case cannot be run here; its text says why."""


def picture(index: int) -> bytes:
    """Noise in the colour of the picture's class, which is `index` modulo the number of classes."""
    colour = list(COLOURS.values())[index % len(COLOURS)]
    noise, file = np.random.default_rng(index).integers(0, 256, (8, 8, 3)), io.BytesIO()
    image = Image.fromarray(((noise + np.array(colour)) // 2).astype(np.uint8))
    image.resize((72 + index % 3 * 8, 72), Image.Resampling.BILINEAR).save(file, "PNG")
    return file.getvalue()


def caption(index: int) -> str:
    words = [WORDS[(index * 7 + i * 3) % len(WORDS)] for i in range(1 + index % 5)]
    return f"a {' '.join(words)} {list(COLOURS)[index % len(COLOURS)]} thing"


def write_shards(folder: Path, first: int, samples: int) -> str:
    """Pictures `first` and following with their captions in two shards; returns their pattern."""
    folder.mkdir()
    sizes = {f"0000{shard}.tar": samples // 2 for shard in range(2)}
    for begin, name in zip((first, first + samples // 2), sizes, strict=True):
        with tarfile.open(folder / name, "w") as tar:
            for index in range(begin, begin + sizes[name]):
                for suffix, content in (("png", picture(index)), ("txt", caption(index).encode())):
                    info = tarfile.TarInfo(f"{index:06d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return f"{folder}/{{00000..00001}}.tar"


def write_pictures(folder: Path) -> None:
    """`labelled/SPLIT/CLASS/NUMBER.png` with `classnames.txt`; `captioned` with two captions each in a JSON file."""
    for split, first, count in (("train", 2000, 64), ("test", 2064, 40)):
        for index in range(first, first + count):
            place = folder / "labelled" / split / f"class{index % len(COLOURS)}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{index}.png").write_bytes(picture(index))
    (folder / "labelled" / "classnames.txt").write_text("".join(f"{name} thing\n" for name in COLOURS))
    (folder / "captioned").mkdir()
    entries = []
    for index in range(3000, 3032):
        (folder / "captioned" / f"{index}.png").write_bytes(picture(index))
        entries.append({"image": f"{index}.png", "caption": [caption(index), f"{caption(index)} on a wall"]})
    (folder / "captioned" / "captioned_test.json").write_text(json.dumps(entries))


class Workplace:
    """A folder with the data of all cases, and the runs that they make."""

    def __init__(self, folder: Path):
        self.folder, self.lock = folder, threading.Lock()
        self.train_shards = write_shards(folder / "train", 0, 64)
        self.val_shards = write_shards(folder / "val", 1000, 32)
        write_pictures(folder)

    def run(self, module: str, *flags: str | Path, processes: int = 1) -> None:
        several = f"torch.distributed.run --standalone --nproc_per_node {processes} -m".split() * (processes > 1)
        command = [sys.executable, "-m", *several, module, *["--"] * (processes > 1), *map(str, flags)]
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        environment = os.environ | threads | {"TORCHINDUCTOR_CACHE_DIR": str(self.folder / "compiled")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", timeout=900)
        if done.returncode:
            told = " | ".join(done.stderr.strip().splitlines()[-4:])[-600:]
            raise RuntimeError(f"exit code {done.returncode}: {told}")

    def train(self, name: str, *flags: str | Path, processes: int = 1) -> Path:
        """Pre-trains two epochs of 64 pairs, as the flags have it; the run's folder."""
        data = ("--train-data", self.train_shards, "--dataset-type", "webdataset", "--logs", self.folder / "logs")
        self.run("training.main", "--model", MODEL, *data, "--name", name, *SMALL, *flags, processes=processes)
        return self.folder / "logs" / name

    def finetune(self, name: str, flags: Sequence[str]) -> Figures:
        results, data = self.folder / f"results-{name}", ("--data", self.folder / "labelled")
        places = ("--results", results, "--logs", self.folder / "logs", "--name", name)
        self.run("training.finetune", "--model", MODEL, *self.pretrained(), *data, *places, *SMALL, *flags)
        return run_figures(self.folder / "logs" / name) | {"results": result_figures(results)}

    def pretrained(self) -> tuple[str, Path]:
        """The flag for the plain run of ELIP, which others start from; trained once."""
        with self.lock:
            folder = self.folder / "logs" / "elip"
            if not folder.is_dir():
                self.train("elip", "--token-reduction", "elip")
        return "--pretrained", folder / "checkpoints" / "epoch_2.pt"

    def evaluate(self, module: str, name: str, *flags: str | Path) -> Figures:
        results = self.folder / f"results-{name.replace(' ', '-')}"
        self.run(f"training.{module}", "--batch-size", "16", *PLAIN, "--results", results, *flags)
        return result_figures(results)


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def run_figures(folder: Path, epochs: int = 2) -> Figures:
    """Of a run of the trainer: losses, some more of the last step, evaluations, weights."""
    with (folder / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    figures: Figures = {"losses": [row["loss"] for row in rows]}
    last = {name.replace("per_sample", "per_pair"): value for name, value in rows[-1].items()}  # renamed since
    figures |= {name: last[name] for name in ("lr", "logit_scale", "rrt", "gflops_per_pair") if name in last}
    evaluations = folder / "checkpoints" / "results.jsonl"
    if evaluations.is_file():
        figures["evaluations"] = [json.loads(line) for line in evaluations.read_text().splitlines()]
    if (folder / "wise_ft.json").is_file():
        figures["wise_ft"] = json.loads((folder / "wise_ft.json").read_text())
    state = torch.load(folder / "checkpoints" / f"epoch_{epochs}.pt", map_location="cpu", weights_only=True)
    figures["weights"] = hash_tensors(state["state_dict"])
    if state.get("ema"):
        figures["ema"] = hash_tensors(state["ema"])
    return figures


def result_figures(folder: Path) -> Figures:
    """Of an evaluation: its metrics, and hashes of the features and classifiers that it kept."""
    figures: Figures = {}
    for record in (json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))):
        figures |= record["metrics"] | {key: record[key] for key in ("regularisation",) if key in record}
    classifiers = [torch.load(path, weights_only=True)["classifier"] for path in folder.glob("classifiers/*.pt")]
    kept = {
        "classifiers": sorted(hash_tensors({"classifier": value}) for value in classifiers),
        "features": sorted(hash_tensors(kept_features(path)) for path in folder.rglob("*.npy")),
    }
    return figures | {name: hashes for name, hashes in kept.items() if hashes}


def kept_features(path: Path) -> dict[str, torch.Tensor]:
    """As the recording's version kept them: of readable pictures only, with labels and places."""
    described = json.loads(path.with_suffix(".json").read_text())
    labels = torch.tensor(described["labels"])
    places = torch.tensor([place for place in range(len(labels)) if place not in set(described["unreadable"])])
    features = torch.from_numpy(np.load(path))
    return {"features": features[places], "labels": labels[places], "places": places}


def compiled(work: Workplace) -> Figures:
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise Skipped("there is no C++ compiler")
    return run_figures(work.train("compiled", "--torchcompile", "--epochs", "1"), epochs=1)


def resumed(work: Workplace) -> Figures:
    """Resumed in the middle of the first epoch; the final weights are those of the run that was not interrupted."""
    first = work.train("saving", "--save-every-n-steps", "3", "--keep-last", "20")
    second = work.train("resumed", "--resume", first / "checkpoints" / "step_3.pt")
    return {"uninterrupted": run_figures(first)["weights"], **run_figures(second)}


def evaluated(work: Workplace) -> Figures:
    flags = ("--val-data", work.val_shards, "--zeroshot-data", work.folder / "labelled", "--zeroshot-frequency", "1")
    return run_figures(work.train("evaluated", *flags, "--ema-decay", "0.9"))


def quickstart_run(work: Workplace) -> Figures:
    figures = run_figures(quickstart_checkpoint().parents[1], epochs=6)
    return figures | {"losses": [figures["losses"][0], figures["losses"][-1]]}


def quickstart_checkpoint() -> Path:
    path = QUICKSTART / "checkpoints" / "epoch_6.pt"
    if not (path.is_file() and EMOJI.is_dir()):
        raise Skipped(f"there is no {path} or no {EMOJI}")
    return path


def operations(work: Workplace) -> Figures:
    file = work.folder / "profile.json"
    work.run("open_clip_elip.profile", *PROFILED, "--no-time", "--batch-size", "8", "--device", "cpu", "--json", file)
    counted = ("forward", "backward", "scoring", "text_forward", "text_backward")
    return {
        one["label"]: {key: one["flops"][key] for key in counted} | {k: one[k] for k in ("rrt", "tokens_per_layer")}
        for one in json.loads(file.read_text())["models"]
    }


def all_cases() -> dict[str, Callable[[Workplace], Figures]]:
    """By name, in the order of the report; the one that takes longest is begun early."""

    def training(name: str, flags: str, processes: int = 1) -> Callable[[Workplace], Figures]:
        return lambda work: run_figures(work.train(name.replace(" ", "-"), *flags.split(), processes=processes))

    def elip(work: Workplace) -> Figures:
        return run_figures(work.pretrained()[1].parents[1])

    cases: dict[str, Callable[[Workplace], Figures]] = {"elip fp32": elip, "elip torchcompile": compiled}
    for method in ("elip", "evit", "tome", "random", "none"):
        for precision in ("fp32", "amp_bf16", *["amp"] * (method == "elip")):
            name = f"{method} {precision}"
            cases.setdefault(name, training(name, f"--token-reduction {method} --precision {precision}"))
    options = {
        "accumulation": "--accum-freq 2", "ema": "--ema-decay 0.9", "siglip": "--siglip",
        "grad-checkpointing": "--grad-checkpointing", "no-shortcuts": "--no-shortcuts",
        "image-decode plain": "--image-decode plain", "layer-decay": "--layer-decay 0.8",
        "full-tokens-last": "--full-tokens-last 50%", "patch-dropout": "--force-patch-dropout 0.25",
    }  # fmt: skip
    cases |= {f"elip {name}": training(name, flags) for name, flags in options.items()}
    for name, flags in {"": "", " accumulation": "--accum-freq 2", " siglip": "--siglip"}.items():
        cases[f"elip two processes{name}"] = training(f"two{name}", flags, processes=2)
    cases |= {"elip resumed": resumed, "elip evaluated": evaluated}
    heads = {"random head": "", "zero-shot head wise-ft": "--head zero-shot --wise-ft"}
    for name, flags in (heads | {"vision-guided": "--vision-guided-reduction"}).items():
        cases[f"finetune {name}"] = partial(Workplace.finetune, name=name.replace(" ", "-"), flags=flags.split())
    for name, flags in {"": [], " vision-guided": ["--vision-guided-reduction"]}.items():
        for module, data in {"linear_probe": "labelled", "zero_shot": "labelled", "retrieval": "captioned"}.items():
            cases[f"{module}{name}"] = lambda work, module=module, data=data, name=name, flags=flags: work.evaluate(
                module, f"{module}{name}", *work.pretrained(), "--data", work.folder / data, *flags
            )
    cases["quickstart run"] = quickstart_run
    for module in ("zero_shot", "retrieval"):
        cases[f"quickstart {module}"] = lambda work, module=module: work.evaluate(
            module, f"quickstart-{module}", "--pretrained", quickstart_checkpoint(), "--data", EMOJI
        )
    return cases | {"operations": operations}


def differences(recorded: Any, now: Any, place: str = "") -> list[str]:
    """One sentence for each figure that is not exactly the recorded one."""
    if isinstance(recorded, list) and isinstance(now, list) and len(recorded) == len(now):
        recorded, now = dict(enumerate(recorded)), dict(enumerate(now))
    if isinstance(recorded, dict) and isinstance(now, dict):
        keys = [*recorded, *(key for key in now if key not in recorded)]
        found = (differences(recorded.get(key), now.get(key), f"{place} {key}") for key in keys)
        return [sentence for some in found for sentence in some]
    return [] if recorded == now else [f"{place.strip()}: recorded {recorded}, now {now}"]


def machine() -> dict[str, str]:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text() if info.is_file() else "", re.MULTILINE)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "open_clip_torch", "torchvision", "timm")}
    return {"cpu": names[0] if names else platform.processor(), "python": platform.python_version(), **versions}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE.json", help="record the figures of all cases")
    parser.add_argument("--against", type=Path, metavar="FILE.json", help="compare them with recorded ones")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cases whose name fits, such as 'elip*'")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cases side by side (default 1)")
    args = parser.parse_args(argv)
    cases = {name: case for name, case in all_cases().items() if fnmatch.fnmatch(name, args.only)}
    if not cases or args.jobs < 1 or (args.write and args.only != "*"):
        parser.error("--only must fit a case and does not go with --write; --jobs must be at least 1.")
    print(f"code: {Path(importlib.util.find_spec('training').origin).parents[1]}", file=sys.stderr)
    recorded = json.loads(args.against.read_text()) if args.against else None
    for sentence in differences(recorded["machine"], machine()) if recorded else ():
        print(f"another machine, so figures may differ by rounding: {sentence}", file=sys.stderr)
    found, wrong, compared = {}, [], 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        work = Workplace(Path(folder))

        def attempt(name: str) -> Figures:
            try:
                return json.loads(json.dumps(cases[name](work)))  # as it will be read again
            except Skipped as reason:
                return {NOT_RUN: str(reason)}
            except Exception as error:
                return {FAILED: f"{type(error).__name__}: {error}"}

        for name, figures in zip(cases, pool.map(attempt, cases), strict=True):
            found[name] = figures
            print(f"{name}: {json.dumps(figures)[:300]}", flush=True)
            before = recorded["cases"].get(name, {}) if recorded else {}
            if FAILED in figures:
                wrong.append(f"FAILED {name}: {figures[FAILED]}")
            elif recorded and (NOT_RUN in figures or NOT_RUN in before):
                print(f"{name}: not compared", file=sys.stderr)
            elif recorded:
                compared += 1
                wrong += [f"DIFFERS {name}: {sentence}" for sentence in differences(before, figures)]
    if args.write and not wrong:
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(figures)}" for name, figures in found.items())
        args.write.write_text(f'{{"machine": {json.dumps(machine())},\n"cases": {{\n{lines}\n}}}}\n')
    if args.against or wrong:
        print("\n".join(wrong) or f"{compared} of {len(found)} cases compared: all as recorded.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
