"""Records figures that a change of the code must not change, and compares them to the last digit.

    python scripts/figures.py --write tests/figures.json --jobs 2      # before the change
    python scripts/figures.py --against tests/figures.json --jobs 2    # after it
    python scripts/figures.py --against tests/figures.json --only 'elip*'

Each case is a command or two on a tiny model and pictures of noise, run in processes of their own on one CPU thread:
training with every method and option, fine-tuning, linear probes, zero-shot classification, retrieval, counted
operations. Only command lines are used and only files are read, so the same script runs on any version of the code:
on that of PYTHONPATH, else on the one that is installed. One line a case is printed; the exit code is 1 if a figure
differs from the recorded one, or if a case fails.

Losses are those of every step, as they stand in train.csv; weights, and the features and classifiers that are kept on
disk, count as a hash of their names, types, shapes and bytes. Times are left out. Rounding depends on the processor and
on torch: figures agree only where both are those of the recording, which has them at its top.

The cases that begin with `quickstart` need `data/openmoji-64` and the finished `logs/quickstart` below the working
folder (scripts/quickstart.sh); they are skipped where these are missing. `quickstart run` only reads what that run left
behind: train it anew with the changed code (FRESH=1) before it is compared. Its figures also depend on the number of
threads; those recorded are of two.
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
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

Figures = dict[str, Any]

MODEL = "ViT-Pico-8-64-ELIP"
COLOURS = {"red": (220, 40, 30), "green": (40, 180, 60), "blue": (40, 60, 210), "yellow": (230, 210, 40)}
WORDS = "round square dark light small large old new soft hard striped".split()
PROFILED = (
    "ViT-S-16", "ViT-S-16-ELIP", "ViT-B-16-ELIP", "ViT-S-16-EViT", "ViT-S-16-ToMe", "ViT-S-16-Random", "ViT-L-14-ELIP",
    "ViT-B-32-ELIP",
)  # fmt: skip
QUICKSTART, EMOJI = Path("logs/quickstart"), Path("data/openmoji-64/val")


class Skipped(Exception):
    """A case cannot be run here; its text says why."""

    KEY = "not run"  # in place of figures


class Failed(Exception):
    """A command ended with another exit code than 0; its text is the end of what it said."""

    KEY = "failed"


# --- data ---


def picture(index: int) -> bytes:
    """Noise in the colour of the picture's class, which is `index` modulo the number of classes."""
    colour = list(COLOURS.values())[index % len(COLOURS)]
    noise = np.random.default_rng(index).integers(0, 256, (8, 8, 3))
    pixels = ((noise + np.array(colour)) // 2).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((72 + index % 3 * 8, 72), Image.Resampling.BILINEAR).save(file, "PNG")
    return file.getvalue()


def caption(index: int) -> str:
    words = [WORDS[(index * 7 + i * 3) % len(WORDS)] for i in range(1 + index % 5)]
    return f"a {' '.join(words)} {list(COLOURS)[index % len(COLOURS)]} thing"


def write_shards(folder: Path, first: int, samples: int, shards: int = 2) -> str:
    """Pictures `first` and following with their captions; returns the pattern of the shards."""
    folder.mkdir(parents=True)
    sizes = {}
    for shard in range(shards):
        indices = range(first + shard * samples // shards, first + (shard + 1) * samples // shards)
        sizes[f"{shard:05d}.tar"] = len(indices)
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for index in indices:
                for extension, content in (("png", picture(index)), ("txt", caption(index).encode())):
                    info = tarfile.TarInfo(f"{index:06d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return f"{folder}/{{00000..{shards - 1:05d}}}.tar"


def write_class_folders(folder: Path, first: int, samples: dict[str, int]) -> Path:
    """`SPLIT/CLASS/NUMBER.png` and `classnames.txt`; `samples` by split."""
    names = list(COLOURS)
    for split, count in samples.items():
        for index in range(first, first + count):
            place = folder / split / f"class{index % len(names)}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{index}.png").write_bytes(picture(index))
        first += count
    (folder / "classnames.txt").write_text("".join(f"{name} thing\n" for name in names))
    return folder


def write_captioned(folder: Path, first: int, samples: int) -> Path:
    """Pictures with two captions each, and the JSON file that says so."""
    folder.mkdir()
    entries = []
    for index in range(first, first + samples):
        (folder / f"{index}.png").write_bytes(picture(index))
        entries.append({"image": f"{index}.png", "caption": [caption(index), f"{caption(index)} on a wall"]})
    (folder / "captioned_test.json").write_text(json.dumps(entries))
    return folder


# --- commands ---


class Workplace:
    """A folder with the data of all cases, and the runs that they make."""

    def __init__(self, folder: Path):
        self.folder, self.logs = folder, folder / "logs"
        self.train_shards = write_shards(folder / "train", 0, 64)
        self.val_shards = write_shards(folder / "val", 1000, 32)
        self.labelled = write_class_folders(folder / "labelled", 2000, {"train": 64, "test": 40})
        self.captioned = write_captioned(folder / "captioned", 3000, 32)
        self.lock = threading.Lock()

    def run(self, module: str, *flags: str | Path, processes: int = 1) -> None:
        command = [sys.executable, "-m"]
        if processes > 1:
            command += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
        command += [module, *["--"] * (processes > 1), *map(str, flags)]
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(self.folder / "compiled")}
        environment = os.environ | threads | cache
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", timeout=900)
        if done.returncode:
            raise Failed(f"exit code {done.returncode}: {' | '.join(done.stderr.strip().splitlines()[-4:])[-600:]}")

    def train(self, name: str, *flags: str | Path, processes: int = 1, precision: str = "fp32") -> Path:
        """Pre-trains two epochs of 64 pairs, as the flags have it; the run's folder."""
        self.run(
            "training.main", "--model", MODEL, "--train-data", self.train_shards, "--dataset-type", "webdataset",
            "--precision", precision, *self.small(name), *flags, processes=processes,
        )  # fmt: skip
        return self.logs / name

    def finetune(self, name: str, *flags: str | Path) -> Path:
        checkpoint = self.pretrained() / "checkpoints" / "epoch_2.pt"
        self.run(
            "training.finetune", "--model", MODEL, "--pretrained", checkpoint, "--data", self.labelled,
            "--precision", "fp32", "--results", self.folder / f"results-{name}", *self.small(name), *flags,
        )  # fmt: skip
        return self.logs / name

    def small(self, name: str) -> list[str | Path]:
        return [
            "--batch-size", "8", "--workers", "1", "--warmup", "2", "--epochs", "2", "--device", "cpu",
            "--log-every-n-steps", "1", "--no-progress", "--logs", self.logs, "--name", name,
        ]  # fmt: skip

    def pretrained(self) -> Path:
        """The plain run of ELIP, which others start from; trained once."""
        with self.lock:
            folder = self.logs / "elip"
            return folder if folder.is_dir() else self.train("elip", "--token-reduction", "elip")

    def evaluate(self, module: str, name: str, data: Path, *flags: str, checkpoint: Path | None = None) -> Figures:
        """Runs an evaluation command, of the plain run's checkpoint without another."""
        results = self.folder / f"results-{name}"
        self.run(
            module, "--pretrained", checkpoint or self.pretrained() / "checkpoints" / "epoch_2.pt", "--data", data,
            "--batch-size", "16", "--workers", "1", "--device", "cpu", "--precision", "fp32", "--no-progress",
            "--results", results, *flags,
        )  # fmt: skip
        return result_figures(results)


# --- what they leave behind ---


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
    figures |= {name: rows[-1][name] for name in ("lr", "logit_scale", "rrt", "gflops_per_pair") if name in rows[-1]}
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
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        figures |= record["metrics"]
        if "regularisation" in record:
            figures["regularisation"] = record["regularisation"]
    classifiers = [torch.load(path, weights_only=True)["classifier"] for path in folder.glob("classifiers/*.pt")]
    features = sorted(hash_tensors(load_file(path)) for path in folder.rglob("*.safetensors"))
    if classifiers:
        figures["classifiers"] = sorted(hash_tensors({"classifier": value}) for value in classifiers)
    if features:
        figures["features"] = features
    return figures


# --- cases ---


def training(name: str, *flags: str, **kwargs: Any) -> Callable[[Workplace], Figures]:
    return lambda work: run_figures(work.train(name.replace(" ", "-"), *flags, **kwargs))


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
    flags = ("--val-data", work.val_shards, "--zeroshot-data", work.labelled, "--zeroshot-frequency", "1")
    return run_figures(work.train("evaluated", *flags, "--ema-decay", "0.9"))


def finetuned(name: str, *flags: str) -> Callable[[Workplace], Figures]:
    def case(work: Workplace) -> Figures:
        return run_figures(work.finetune(name, *flags)) | {"results": result_figures(work.folder / f"results-{name}")}

    return case


def quickstart_run(work: Workplace) -> Figures:
    quickstart_checkpoint()
    figures = run_figures(QUICKSTART, epochs=6)
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
        found["label"]: {
            **{key: found["flops"][key] for key in counted},
            "rrt": found["rrt"],
            "tokens_per_layer": found["tokens_per_layer"],
        }
        for found in json.loads(file.read_text())["models"]
    }


def all_cases() -> dict[str, Callable[[Workplace], Figures]]:
    """By name, in the order of the report; the one that takes longest is begun early."""
    cases: dict[str, Callable[[Workplace], Figures]] = {"elip fp32": lambda work: run_figures(work.pretrained())}
    cases["elip torchcompile"] = compiled
    for method in ("elip", "evit", "tome", "random", "none"):
        for precision in ("fp32", "amp_bf16", *["amp"] * (method == "elip")):
            name = f"{method} {precision}"
            cases.setdefault(name, training(name, "--token-reduction", method, precision=precision))
    options = {
        "accumulation": ("--accum-freq", "2"),
        "ema": ("--ema-decay", "0.9"),
        "siglip": ("--siglip",),
        "grad-checkpointing": ("--grad-checkpointing",),
        "no-shortcuts": ("--no-shortcuts",),
        "image-decode plain": ("--image-decode", "plain"),
        "layer-decay": ("--layer-decay", "0.8"),
        "full-tokens-last": ("--full-tokens-last", "50%"),
        "patch-dropout": ("--force-patch-dropout", "0.25"),
    }
    cases |= {f"elip {name}": training(name, *flags) for name, flags in options.items()}
    cases["elip two processes"] = training("two", processes=2)
    cases["elip two processes accumulation"] = training("two-accumulation", "--accum-freq", "2", processes=2)
    cases["elip two processes siglip"] = training("two-siglip", "--siglip", processes=2)
    cases["elip resumed"] = resumed
    cases["elip evaluated"] = evaluated
    cases["finetune random head"] = finetuned("random-head")
    cases["finetune zero-shot head wise-ft"] = finetuned("zero-shot-head", "--head", "zero-shot", "--wise-ft")
    cases["finetune vision-guided"] = finetuned("vision-guided", "--vision-guided-reduction")
    guided = "--vision-guided-reduction"
    for name, flags in {"": (), " vision-guided": (guided,)}.items():
        for module, data in {"linear_probe": "labelled", "zero_shot": "labelled", "retrieval": "captioned"}.items():
            cases[f"{module}{name}"] = lambda work, module=module, data=data, name=name, flags=flags: work.evaluate(
                f"training.{module}", f"{module}{name}".replace(" ", "-"), getattr(work, data), *flags
            )
    cases["quickstart run"] = quickstart_run
    for module in ("zero_shot", "retrieval"):
        cases[f"quickstart {module}"] = lambda work, module=module: work.evaluate(
            f"training.{module}", f"quickstart-{module}", EMOJI, checkpoint=quickstart_checkpoint()
        )
    cases["operations"] = operations
    return cases


# --- report ---


def shown(value: Any) -> str:
    """A figure in a few words: of a list the first and the last."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(item)}" for key, item in value.items())
    if isinstance(value, list):
        return f"[{shown(value[0])} ... {shown(value[-1])}]" if len(value) > 2 else f"[{', '.join(map(shown, value))}]"
    return str(value)


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
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "open_clip_torch", "torchvision", "timm")}
    return {"cpu": names[0] if names else platform.processor(), "python": platform.python_version(), **versions}


def record(found: dict[str, Figures]) -> str:
    """The recording as JSON, one line a case."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(figures)}" for name, figures in found.items())
    return f'{{"machine": {json.dumps(machine())},\n"cases": {{\n{lines}\n}}}}\n'


def attempt(case: Callable[[Workplace], Figures], work: Workplace) -> Figures:
    begin = time.perf_counter()
    try:
        figures = json.loads(json.dumps(case(work)))  # as it will be read again
    except Skipped as reason:
        figures = {Skipped.KEY: str(reason)}
    except Exception as error:
        figures = {Failed.KEY: f"{type(error).__name__}: {error}"}
    return {"figures": figures, "seconds": time.perf_counter() - begin}


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
    code = importlib.util.find_spec("training")
    print(f"code: {'not found' if code is None else Path(code.origin).parents[1]}", file=sys.stderr)
    recorded = json.loads(args.against.read_text()) if args.against else None
    for sentence in differences(recorded["machine"], machine()) if recorded else ():
        print(f"another machine, so figures may differ by rounding: {sentence}", file=sys.stderr)

    found, wrong, compared = {}, [], 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        work = Workplace(Path(folder))
        for name, result in zip(cases, pool.map(lambda case: attempt(case, work), cases.values()), strict=True):
            found[name] = figures = result["figures"]
            print(f"{name} ({result['seconds']:.0f} s): {shown(figures)}", flush=True)
            before = recorded["cases"].get(name, {}) if recorded else {}
            if Failed.KEY in figures:
                wrong.append(f"FAILED {name}: {figures[Failed.KEY]}")
            elif recorded and (Skipped.KEY in figures or Skipped.KEY in before):
                print(f"{name}: not compared", file=sys.stderr)
            elif recorded:
                compared += 1
                wrong += [f"DIFFERS {name}: {sentence}" for sentence in differences(before, figures)]
    if args.write and not wrong:
        args.write.write_text(record(found))
    if args.against or wrong:
        print("\n".join(wrong) or f"{compared} of {len(found)} cases compared: all as recorded.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
