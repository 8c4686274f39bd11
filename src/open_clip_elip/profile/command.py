"""What models cost in training, side by side.

    python -m open_clip_elip.profile ViT-S-16 ViT-S-16-ELIP ViT-S-16-ELIP:scoring_depth=1
    python -m open_clip_elip.profile ViT-B-16 ViT-B-16-ELIP --precision amp_bf16 --batch-size 256 --compile --memory 80
    python -m open_clip_elip.profile ViT-L-14 ViT-L-14-ELIP --no-time --markdown cost.md --plot cost.png

A model is NAME, or NAME:option=value,... with options of the token reduction, such as lam=0.5 or keep_ratio=1,.9,.5,.4;
shortcuts=true runs a plain OpenCLIP model with this package's exact shortcuts. Ratios are to the first model.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from open_clip import get_input_dtype
from torch import Tensor, nn

from ..identity import ModelError, tokenizer
from ..text import COMPILED_MULTIPLE, COMPILED_PARTS, TextParts, count_columns, cut_text
from .captions import MEAN, caption_ids, context_length, draw_lengths, read_lengths, typical_lengths
from .errors import ProfileError
from .flops import Flops, count_flops
from .machine import describe_machine, find_device, machine
from .memory import SavedBytes, allocated, largest_batch, peak_bytes, prepare_optimizer
from .models import Candidate
from .report import (
    NO_MATPLOTLIB,
    Profile,
    count_parameters,
    make_folder,
    markdown_table,
    plot,
    save,
    table,
    text_table,
    tokens_per_layer,
)  # fmt: skip
from .step import TrainStep
from .timing import Spread, in_turn, ratios

COMPILED = (COMPILED_PARTS, COMPILED_MULTIPLE)
PRECISIONS = ("fp32", "amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one sentence on stderr."""
    args = _parser().parse_args(argv)
    try:
        _check(args)
        models = [Candidate.parse(text, args.image_size) for text in args.models]
        profiles = profile_counts(models, args)
        if args.time:
            profile_runs(models, profiles, args)
        setting, rows = describe(profiles, args), table(profiles)
        print(setting + "\n\n" + text_table(rows))
        if args.json is not None:
            found = {"setting": machine(args.device) | _flags(args), "models": [p.to_dict() for p in profiles]}
            save(args.json, json.dumps(found, indent=2) + "\n")
        if args.markdown is not None:
            save(args.markdown, setting + "\n\n" + markdown_table(rows))
        if args.plot is not None:
            plot(profiles, args.plot, setting.splitlines()[0])
    except (ProfileError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


# ---------------------------------------------------------------------- counts


def profile_counts(models: Sequence[Candidate], args: argparse.Namespace) -> list[Profile]:
    """What needs no step: parameters, tokens, operations. The models have shapes only, so any size will do."""
    profiles = []
    for one in models:
        model = one.build("meta")
        text = batch_text(model, one, args, args.batch_size)
        rrt = model.tower.rrt() if hasattr(model, "tower") else 0.0
        profiles.append(
            Profile(
                one.label, args.batch_size, *count_parameters(model), tokens_per_layer(model), rrt,
                count_columns(text) / args.batch_size, _flops(model, text, one),
            )
        )  # fmt: skip
    return profiles


def _flops(model: nn.Module, text: Tensor | TextParts, one: Candidate) -> Flops:
    pairs = len(text.place if isinstance(text, TextParts) else text)
    try:
        return count_flops(model, batch_image(model, pairs, "meta"), text.to("meta"))
    except (NotImplementedError, RuntimeError):  # a tower that looks at the numbers: a real step, then
        model = one.build("cpu")
        return count_flops(model, batch_image(model, pairs, "cpu"), text)


def batch_image(model: nn.Module, pairs: int, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    size = model.visual.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return torch.randn(pairs, 3, height, width, device=device, dtype=dtype)


def batch_text(model: nn.Module, one: Candidate, args: argparse.Namespace, pairs: int) -> Tensor | TextParts:
    """Token ids on the CPU, cut as the model takes them in training."""
    given, context = args.caption_lengths, context_length(model)
    if given == "full":
        lengths = [context] * pairs
    elif isinstance(given, float):
        lengths = typical_lengths(pairs, given, context)
    else:
        lengths = draw_lengths(read_lengths(given, tokenizer(one.identity), context), pairs)
    return cut_text(caption_ids(model, lengths), model, *(COMPILED if args.compile else ()))


# ---------------------------------------------------------------------- runs


def profile_runs(models: Sequence[Candidate], profiles: Sequence[Profile], args: argparse.Namespace) -> None:
    """Adds to `profiles` what takes steps on the device: memory of one model at a time, then times of all in turn."""
    steps = {}
    for one, profile in zip(models, profiles, strict=True):
        others = allocated(args.device)
        steps[one.label] = step = _step(one.build(args.device, args.precision), one, args, args.batch_size)
        prepare_optimizer(step.optimizer)
        with _running(one, args):
            _measure_memory(profile, step, one, args, others)
        step.optimizer.zero_grad(set_to_none=True)
    warmup = 1 if args.device.type == "cpu" else 3
    with _running(models[0], args):
        times = in_turn(steps, device=args.device, rounds=args.rounds, warmup=warmup, repeat=args.repeat)
    for profile in profiles:
        profile.seconds = Spread.of(times[profile.label])
        profile.time_ratio = Spread.of(ratios(times[profile.label], times[profiles[0].label]))


def _measure_memory(profile: Profile, step: TrainStep, one: Candidate, args: argparse.Namespace, others: int) -> None:
    """Adds what the model keeps, its peak, and with `--memory` the batch that fits.

    What is kept is that of the model as it is: a compiled one is not seen from inside, nor is its peak on the CPU.
    """
    pairs = args.batch_size
    with SavedBytes(step.model) as saved, step.not_compiled():
        profile.peak = _peak(step, others)
    profile.saved = saved.bytes
    compiled = args.compile and args.device.type == "cuda"
    if compiled:
        step()
        profile.peak = _peak(step, others)
    if args.memory is None:
        return
    half = _step(step.model, one, args, pairs // 2)
    half.optimizer = step.optimizer
    with nullcontext() if compiled else half.not_compiled():
        half()
        peak = _peak(half, others + sum(tensor.nbytes for tensor in step.inputs()))
    profile.memory_limit = args.memory * 1e9
    profile.largest_batch, profile.fixed, profile.per_pair = largest_batch(
        profile.memory_limit, (pairs // 2, peak), (pairs, profile.peak), saved=profile.saved / pairs
    )


def _peak(step: TrainStep, others: int) -> int:
    return peak_bytes(step, step.model, step.optimizer, step.inputs(), step.image.device, others)


def _step(model: nn.Module, one: Candidate, args: argparse.Namespace, pairs: int) -> TrainStep:
    image = batch_image(model, pairs, args.device, get_input_dtype(args.precision))
    return TrainStep(model, image, batch_text(model, one, args, pairs).to(args.device), args.precision, args.compile)


@contextmanager
def _running(one: Candidate, args: argparse.Namespace) -> Iterator[None]:
    """Turns what a step of a model can die of into one sentence."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise ProfileError(
            f"{one.label} does not fit the device at batch {args.batch_size}; take a smaller --batch-size."
        ) from error
    except RuntimeError as error:
        if not args.compile:
            raise
        first = " ".join(str(error).split())[:200]
        raise ProfileError(f"{one.label} cannot be compiled here ({first}); leave --compile out.") from error


# ---------------------------------------------------------------------- the setting


def describe(profiles: Sequence[Profile], args: argparse.Namespace) -> str:
    compiled = ", compiled" if args.compile else ""
    where = describe_machine(machine(args.device)) if args.time else "Counted, not run"
    return (
        f"Training step, batch {args.batch_size}, {args.precision}{compiled}. {_captions(args)}\n"
        f"{where}.\nIn brackets: the ratio to {profiles[0].label}."
    )


def _captions(args: argparse.Namespace) -> str:
    given = args.caption_lengths
    if given == "full":
        return "Captions as long as the context."
    if isinstance(given, float):
        lengths = typical_lengths(args.batch_size, given)
        return f"Captions of {min(lengths)}-{max(lengths)} tokens, {sum(lengths) / len(lengths):.1f} on average."
    return f"Captions as in {given.name}."


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    names = ("batch_size", "precision", "compile", "image_size", "rounds", "repeat")
    given = args.caption_lengths
    return {n: getattr(args, n) for n in names} | {"captions": _captions(args) if isinstance(given, Path) else given}


# ---------------------------------------------------------------------- flags


def _check(args: argparse.Namespace) -> None:
    for name in ("batch_size", "rounds"):
        if getattr(args, name) < 1:
            raise ProfileError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1.")
    if args.memory is not None and (args.batch_size < 2 or not args.time):
        raise ProfileError("--memory measures at two batch sizes: give a --batch-size of at least 2, and no --no-time.")
    args.device = find_device(args.device)
    args.repeat = args.repeat or (1 if args.device.type == "cpu" else 10)
    for path in filter(None, (args.json, args.markdown, args.plot)):
        make_folder(path.parent)
    if args.plot is not None and find_spec("matplotlib") is None:
        raise ProfileError(NO_MATPLOTLIB)
    args.caption_lengths = _lengths(args.caption_lengths)
    if len({*args.models}) < len(args.models):
        raise ProfileError("The same model is given twice; name each once.")


def _lengths(given: str) -> float | str | Path:
    if given == "full" or Path(given).is_file():
        return given if given == "full" else Path(given)
    try:
        mean = float(given)
    except ValueError:
        raise ProfileError(
            f"--caption-lengths {given} is neither a mean number of tokens, nor full, nor a file."
        ) from None
    if not mean >= 3:
        raise ProfileError(f"--caption-lengths {given}: captions have at least 3 tokens, start and end included.")
    return mean


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m open_clip_elip.profile", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="NAME or NAME:option=value,...")
    add("--batch-size", type=int, default=32, metavar="N", help="pairs in a step; default: %(default)s")
    add("--precision", default="fp32", choices=PRECISIONS, help="default: %(default)s")
    add("--device", metavar="cpu|cuda[:N]", help="default: cuda if there is one")
    add("--image-size", type=int, metavar="PIXELS", help="instead of the models' own")
    add(
        "--caption-lengths", default=str(MEAN), metavar="MEAN|full|FILE",
        help="tokens of a caption: a mean (default: %(default)s), all of the context, or a file with one length or one "
        "caption a line",
    )  # fmt: skip
    add("--rounds", type=int, default=5, metavar="N", help="measurements of each model, in turn; default: %(default)s")
    add("--repeat", type=int, metavar="N", help="steps in one measurement; default: 1 on a CPU, 10 on a GPU")
    add("--memory", type=float, metavar="GB", help="tell the largest batch that fits (1 GB = 10^9 bytes)")
    add("--compile", action="store_true", help="torch.compile the models for the times, and on CUDA the peak memory")
    add("--no-time", dest="time", action="store_false", help="counts only: no step is run, no memory measured")
    add("--json", type=Path, metavar="FILE")
    add("--markdown", type=Path, metavar="FILE")
    add("--plot", type=Path, metavar="FILE.png")
    return parser
