"""Full fine-tuning of an image tower for classification, on the trainer of pre-training.

One process:      python -m training.finetune --model ViT-B-16-ELIP --pretrained epoch_32.pt --data cifar10=/data
Four GPUs:        torchrun --nproc_per_node 4 -m training.finetune --config configs/finetune/slip_vit_b.yaml \
                      --model ViT-B-16-ELIP --pretrained epoch_32.pt --data imagenet=/data/imagenet \
                      --also imagenet-v2=/data/imagenetv2 imagenet-r=/data/imagenet-r --name my-run --resume latest
Evaluation:       python -m training.finetune --evaluate --resume logs/my-run/checkpoints/epoch_100.pt \
                      --data imagenet=/data/imagenet
"""
from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, wise_ft
from .command import run_command
from .tasks.augment import Augmentation, Mix, train_transform
from .tasks.classification import (
    ClassificationTask,
    FinetuningOptions,
    add_drop_path,
    random_classifier,
    zero_shot_head,
)
from .data import TrainData
from .data.samples import RawSample
from .data.sources import RowSource
from .distributed import Ranks, end, seed_everything
from .ema import Ema
from .errors import UserError
from .evaluation.command import hash_weights
from .data.sets.registry import load_data
from .data.sets.labelled import LabelledImages
from .evaluation.results import Results
from .evaluation.scores import METRICS, check_classes
from .main import Parts, run
from .models import build_model, own_reduction
from .options import parse
from .options.model import reduction_of
from .zero_shot import zero_shot_classifier

# What a classifier is. With --evaluate and without --model, these are as in the checkpoint.
_CLASSIFIER_OPTIONS = (
    "model", "pretrained", "pretrained_image", "force_context_length", "force_image_size", "force_quick_gelu",
    "force_custom_text", "image_mean", "image_std", "image_interpolation", "image_resize_mode", "head",
    "vision_guided_reduction", "ema_decay",
)  # fmt: skip


# ---------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """Fine-tunes, or evaluates, and returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)

    def work(args: FinetuningOptions, ranks: Ranks) -> None:
        with ranks.agree():
            if args.model is None:
                args = _as_in_checkpoint(words, args.resume)
                args.divide_global_batch(ranks.world_size)
        run(args, ranks, finetuning)

    return run_command(FinetuningOptions, work, words, __doc__)


def _as_in_checkpoint(words: list[str], resume: str) -> FinetuningOptions:
    """The options, with those that say what the classifier is as they are in a checkpoint's configuration."""
    if resume == "latest":
        raise UserError("--evaluate needs --model, or a checkpoint file in --resume that says which model it is of.")
    config = checkpoint.load(resume).get("config", {})
    if "head" not in config:
        raise UserError(f"{resume} is not a checkpoint of fine-tuning; give one of training.finetune, or --model.")
    given = {name: config[name] for name in _CLASSIFIER_OPTIONS if name in config}
    return parse(FinetuningOptions, words, given=given | {"token_reduction": reduction_of(config)})


def finetuning(args: FinetuningOptions, ranks: Ranks, resume: str | None) -> Parts:
    """A classifier, labelled images and their task; see `main.Build`."""
    place = {"rank": ranks.rank, "world_size": ranks.world_size}
    with ranks.agree():
        if args.download and ranks.local_rank == 0:
            load_data_sets(args)  # one process of each machine fetches what is not there, before the others look
    with ranks.agree():
        results = Results(None if args.results.lower() == "none" else Path(args.results), ranks)
        train, tests = load_data_sets(args)
        seed_everything(args.seed)
        # The model's reduction is guided by captions, so without the flag it is left out.
        own = {"method": own_reduction(args.model).get("method", "elip")}
        said = own | (args.token_reduction or {})
        args.token_reduction = said if args.vision_guided_reduction else {"method": "none"}
        model, _, transform, tokenizer = build_model(args, ranks.device)
    data = next(iter(tests.values()))
    common = {"num_classes": len(data.classnames), "reduce": args.vision_guided_reduction}
    if args.head == "random":
        classifier = random_classifier(model, **common)
    else:
        weights = None
        if resume is None or args.wise_ft:  # else they come from the checkpoint
            weights = zero_shot_classifier(model, tokenizer, data, ranks=ranks, precision=args.precision)
        classifier = zero_shot_head(model, weights=weights, **common)
    classifier.shortcuts = args.shortcuts
    del model
    start = wise_ft.whole_weights(classifier) if args.wise_ft else None
    with ranks.agree():
        add_drop_path(classifier.visual, args.drop_path)
        train_data = None if train is None else build_train_data(args, train, classifier.visual, **place)
    seed_everything(args.seed + ranks.rank)
    mix = Mix(
        len(data.classnames),
        mixup=args.mixup,
        cutmix=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        smoothing=args.label_smoothing,
    )
    task = ClassificationTask(args, ranks, mix, tests, transform)
    return Parts(classifier, task, train_data, partial(_finish, args, ranks, task, results, start))


def load_data_sets(args: FinetuningOptions) -> tuple[LabelledImages | None, dict[str, LabelledImages]]:
    """The data to train on (None with `--evaluate`), and those to evaluate on by name, that of `--data` first.

    Raises:
        UserError: a data set cannot be had, has other classes, or has the name of another.
    """
    train = None if args.evaluate else load_data(args.data, split="train", download=args.download)
    test = load_data(args.test_data or args.data, split="test", download=args.download)
    tests = [test, *(load_data(spec, split="test", download=args.download) for spec in args.also)]
    for data in tests:
        check_classes(test if train is None else train, data)
    named: dict[str, LabelledImages] = {}
    for data in tests:
        if data.name in named:
            raise UserError(f"Two data sets to evaluate on are called {data.name}; give each of them once.")
        named[data.name] = data
    return train, named


# ---------------------------------------------------------------------- training data


class LabelledRows:
    """Labelled images as rows for `RowSource`: the caption is the class number."""

    def __init__(self, data: LabelledImages):
        self.images, self.labels, self.name = data.images, data.labels.numpy(), data.name

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> RawSample:
        row = int(row)
        image = partial(self.images.load, row)
        return RawSample(self.images.name(row), image, str(self.labels[row]), self.name, row)


def class_numbers(captions: Sequence[str]) -> Tensor:
    """The captions of `LabelledRows` as (B,) int64."""
    return torch.tensor([int(caption) for caption in captions])


def build_train_data(
    args: FinetuningOptions, data: LabelledImages, visual: nn.Module, *, rank: int, world_size: int
) -> TrainData:
    """Augmented training batches, `text` the class numbers (B,).

    Raises:
        UserError: less than one batch, or an unknown augmentation policy.
    """
    num_batches = len(data) // (args.batch_size * world_size)
    if not num_batches:
        raise UserError(
            f"{data.name} has only {len(data):,} training images, fewer than one batch of {args.batch_size} on each "
            f"of {world_size} process(es): use a smaller --batch-size."
        )
    config = visual.preprocess_cfg
    size = config["size"]
    augmentation = Augmentation(
        crop_scale=tuple(args.crop_scale),
        crop_ratio=tuple(args.crop_ratio),
        hflip=args.hflip,
        auto_augment=args.auto_augment,
        color_jitter=args.color_jitter,
        erasing=args.random_erasing,
        erasing_mode=args.erasing_mode,
        interpolation=args.train_interpolation,
    )
    transform = train_transform(
        augmentation, tuple(size) if isinstance(size, (tuple, list)) else (size, size), config["mean"], config["std"]
    )
    samples = num_batches * args.batch_size * world_size
    lines = [
        "Training data (labelled images):",
        f"  {data.name}: {len(data):,} images of {len(data.classnames):,} classes",
        f"  {len(data) - samples:,} of them, others in each epoch, are left out by rounding down",
        f"  {num_batches:,} batches of {args.batch_size:,} on each of {world_size} process(es) "
        f"({args.workers} workers each) = {samples:,} samples per epoch",
    ]
    counts = torch.bincount(data.labels, minlength=len(data.classnames)).tolist()
    empty = [name for name, count in zip(data.classnames, counts, strict=True) if not count]
    if empty:
        shown = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
        lines.insert(2, f"  {len(empty)} of the classes have no training image: {shown}")
    return TrainData(
        RowSource(LabelledRows(data), args.seed, args.batch_size, num_batches),
        transform,
        class_numbers,
        batch_size=args.batch_size,
        workers=args.workers,
        seed=args.seed,
        rank=rank,
        world_size=world_size,
        num_batches=num_batches,
        identity={"dataset_type": "labelled", "sources": [data.name], "fingerprint": data.fingerprint()},
        description="\n".join(lines),
        stall_seconds=args.stall_seconds,
    )


# ---------------------------------------------------------------------- the end


def _finish(
    args: FinetuningOptions,
    ranks: Ranks,
    task: ClassificationTask,
    results: Results,
    start: dict[str, Tensor] | None,
    model: nn.Module,
    averages: Ema | None,
    metrics: dict[str, float],
    folder: Path | None,
) -> None:
    """The final results, and the curve from the weights at the start (None: it was not asked for)."""
    final = {"": wise_ft.whole_weights(model)}
    if averages is not None:
        final["ema/"] = {name: value.cpu() for name, value in averages.state_dict().items()}
    with ranks.agree():
        for prefix, weights in final.items():
            for what, own in _described(args, task, prefix, hash_weights(weights), metrics):
                results.add(what, own, {"run": None if folder is None else str(folder)})
    if start is not None:
        # The averages are what is taken from a run that keeps them.
        rows = wise_ft.curve(model, start, list(final.values())[-1], task.metrics)
        logging.info("WiSE-FT, from the zero-shot classifier (0) to the fine-tuned one (1)\n" + wise_ft.describe(rows))
        with ranks.agree():
            if ranks.is_main and folder is not None:
                wise_ft.write(rows, folder)


def _described(
    args: FinetuningOptions, task: ClassificationTask, prefix: str, weights_hash: str, metrics: dict[str, float]
) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
    """For each data set that was evaluated: what was done (see `Results`), and its metrics (`prefix`NAME-...)."""
    for name, data in task.data.items():
        own = {metric: metrics[key] for metric in METRICS if (key := f"{prefix}{name}-{metric}") in metrics}
        if not own:
            continue
        yield {
            "command": "finetune",
            "model": args.model,
            "pretrained": args.pretrained,
            "weights": weights_hash,
            "data": name,
            "split": data.split,
            "data_fingerprint": data.fingerprint(),
            "settings": {
                "precision": args.precision,
                "transform": repr(task.transform),
                "on_broken": args.on_broken,
                "head": args.head,
                "vision_guided_reduction": args.vision_guided_reduction,
                "averaged": bool(prefix),
            },
        }, own


if __name__ == "__main__":
    end(main())
