"""Models counted and measured side by side, as a command line asks for."""
from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict
from types import ModuleType

import torch
from open_clip.utils import to_2tuple
from torch import Tensor, nn

from ..identity import tokenizer
from ..text import COMPILED_MULTIPLE, COMPILED_PARTS, TextParts, count_columns, cut_text
from . import ProfileError, report
from .flops import Flops, count_flops
from .measure import SavedBytes, TrainStep, in_turn, largest_batch, peak_bytes, ratios, saved_bytes, spread
from .models import Candidate, caption_ids, caption_lengths, context_length, find_device
from .report import Figures


def compare(args: argparse.Namespace) -> None:
    """Prints the table and writes the files; ModelError: what a person can mend."""
    args.device = find_device(args.device)
    args.repeat = args.repeat or (1 if args.device.type == "cpu" else 10)
    for path in filter(None, (args.json, args.markdown, args.plot)):
        report.make_folder(path.parent)
    models = [Candidate.parse(text, args.image_size) for text in args.models]
    figures = [count(one, args) for one in models]
    if args.time:
        measure(models, figures, args)
    setting, rows = _describe(figures[0], args), report.table(figures)
    print(setting + "\n\n" + report.text_table(rows))
    if args.json is not None:
        names = ("batch_size", "precision", "compile", "image_size", "rounds", "repeat")
        flags = {name: getattr(args, name) for name in names}
        found = {"setting": report.machine(args.device) | flags, "models": figures}
        report.save(args.json, json.dumps(found, indent=2) + "\n")
    if args.markdown is not None:
        report.save(args.markdown, setting + "\n\n" + report.markdown_table(rows))
    if args.plot is not None:
        report.plot(figures, args.plot, setting.splitlines()[0])


def count(one: Candidate, args: argparse.Namespace) -> Figures:
    """What needs no step: parameters, tokens, operations. The model has shapes only, so any size will do."""
    model, pairs = one.build("meta"), args.batch_size
    batch, lengths = _batch(model, one, args, pairs, "meta"), _lengths(model, one, args, pairs)
    columns = sum(lengths) if one.fuses and model.tower.shortcuts else count_columns(batch[1])
    try:
        flops, saved = _count(model, batch, one, args)
    except (NotImplementedError, RuntimeError):  # a tower that looks at the numbers: a real step, then
        flops, saved = _count(one.build("cpu"), _batch(model, one, args, pairs, "cpu"), one, args)
    parts = ("forward", "backward", "scoring", "teacher", "total", "text_forward", "text_backward", "text", "image")
    vision = sum(p.numel() for p in model.visual.parameters())
    others = sum(p.numel() for name, p in model.named_parameters() if p.ndim and "visual." not in name)
    return {
        "label": one.label,
        "batch_size": pairs,
        "vision_parameters": vision,
        "text_parameters": others,  # without the logit scale and bias
        "tokens_per_layer": report.tokens_per_layer(model),
        "rrt": model.tower.rrt() if hasattr(model, "tower") else 0.0,
        "text_tokens": columns / pairs,
        "caption_tokens": {"mean": sum(lengths) / pairs, "min": min(lengths), "max": max(lengths)},
        "flops": asdict(flops),
        "tflops_per_step": flops.total / 1e12,
        "gflops_per_pair": {part: getattr(flops, part) / pairs / 1e9 for part in parts},
        **saved,
    }


def _count(model: nn.Module, batch: tuple, one: Candidate, args: argparse.Namespace) -> tuple[Flops, Figures]:
    """Operations of a step, and if it is not measured, what it keeps."""
    flops = (fusion().count_fusion if one.fuses else count_flops)(model, *batch)
    counted = not args.time and args.precision == "fp32"  # there is no autocast for shapes
    return flops, {"saved": saved_bytes(_step(model, batch, one))} if counted else {}


def _step(model: nn.Module, batch: tuple, one: Candidate, precision: str = "fp32") -> TrainStep:
    return (fusion().make_step if one.fuses else TrainStep)(model, *batch, precision)


def measure(models: Sequence[Candidate], figures: Sequence[Figures], args: argparse.Namespace) -> None:
    """Adds what takes steps on the device: memory of one model at a time, then times of all in turn."""
    steps = {}
    for one, found in zip(models, figures, strict=True):
        model = one.build(args.device, args.precision)
        batch = _batch(model, one, args, args.batch_size, args.device)
        steps[one.label] = step = _step(model, batch, one, args.precision)
        with _running(one, args):
            found |= _memory(step, one, args)
        step.optimizer.zero_grad(set_to_none=True)
    warmup = 1 if args.device.type == "cpu" else 3
    with _running(models[0], args):
        times = in_turn(steps, device=args.device, rounds=args.rounds, warmup=warmup, repeat=args.repeat)
    for found in figures:
        found["seconds"] = spread(times[found["label"]])
        found["time_ratio"] = spread(ratios(times[found["label"]], times[models[0].label]))
        found["samples_per_second"] = rate = args.batch_size / found["seconds"]["median"]
        found["hours_per_epoch"] = {data: pairs / rate / 3600 for data, pairs in report.EPOCHS.items()}


def _memory(step: TrainStep, one: Candidate, args: argparse.Namespace) -> Figures:
    """What the model keeps, its peak, and with `--memory` the batch that fits. Then it is compiled: a compiled model is
    not seen from inside, nor is its peak on the CPU."""
    pairs, on_gpu = args.batch_size, args.device.type == "cuda"
    saved = SavedBytes(getattr(step, "resident", step.model))
    with saved:
        peak = peak_bytes(step, step.batch)
    if args.compile and on_gpu:
        step.compile()
        step()
        peak = peak_bytes(step, step.batch)
    found = {"peak": peak, "saved": saved.bytes}
    if args.memory is not None:
        half = copy(step)
        half.set_batch(*_batch(step.model, one, args, pairs // 2, args.device))
        half()
        measured = (pairs // 2, peak_bytes(half, half.batch)), (pairs, peak)
        found["memory_limit"] = args.memory * 1e9
        found["largest_batch"] = largest_batch(args.memory * 1e9, *measured, saved=saved.bytes / pairs)
    if args.compile and not on_gpu:
        step.compile()
    return found


def _batch(
    model: nn.Module, one: Candidate, args: argparse.Namespace, pairs: int, device: torch.device | str
) -> tuple[Tensor, Tensor | TextParts]:
    """Images, and token ids, cut as the model takes them in training (those of a fusion model on the CPU)."""
    image = torch.randn(pairs, 3, *to_2tuple(model.visual.image_size), device=device)
    if one.fuses:
        return image, fusion().words(_lengths(model, one, args, pairs), model)
    ids = caption_ids(model, _lengths(model, one, args, pairs))
    return image, cut_text(ids, model, *([COMPILED_PARTS, COMPILED_MULTIPLE] if args.compile else [])).to(device)


def _lengths(model: nn.Module, one: Candidate, args: argparse.Namespace, pairs: int) -> list[int]:
    context = one.identity.config["text_cfg"]["context_length"] if one.fuses else context_length(model)
    return caption_lengths(args.caption_lengths, pairs, context, lambda: tokenizer(one.identity))


def fusion() -> ModuleType:
    """What needs transformers, where it is needed."""
    from . import fusion

    return fusion


@contextmanager
def _running(one: Candidate, args: argparse.Namespace) -> Iterator[None]:
    """Turns what a step of a model can die of into one sentence."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            what = f"does not fit the device at batch {args.batch_size}; take a smaller --batch-size."
        elif args.compile:
            what = f"cannot be compiled here ({' '.join(str(error).split())[:200]}); leave --compile out."
        else:
            raise
        raise ProfileError(f"{one.label} {what}") from error


def _describe(first: Figures, args: argparse.Namespace) -> str:
    compiled = ", compiled" if args.compile else ""
    captions = "Captions of {min}-{max} tokens, {mean:.1f} on average.".format(**first["caption_tokens"])
    where = report.describe_machine(report.machine(args.device)) if args.time else "Counted as for a CPU, not run"
    return (
        f"Training step, batch {args.batch_size}, {args.precision}{compiled}. {captions}\n"
        f"{where}.\nIn brackets: the ratio to {first['label']}."
    )
