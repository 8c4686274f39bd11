"""Full fine-tuning of an image tower for classification, on the trainer of pre-training.

One process:      python -m training.finetune --model ViT-B-16-ELIP --pretrained epoch_32.pt --data cifar10=/data
Four GPUs:        torchrun --nproc_per_node 4 -m training.finetune --config configs/finetune/slip_vit_b.yaml \
                      --model ViT-B-16-ELIP --pretrained epoch_32.pt --data imagenet=/data/imagenet \
                      --also imagenet-v2=/data/imagenetv2 imagenet-r=/data/imagenet-r --name my-run --resume latest
Evaluation:       python -m training.finetune --evaluate --resume logs/my-run/checkpoints/epoch_100.pt \
                      --data imagenet=/data/imagenet
"""
from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from . import checkpoint, wise_ft
from .tasks.augment import Augmentation, Mix, train_transform
from .tasks.classification import ClassificationTask, add_drop_path, random_classifier, zero_shot_head
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
from .main import Parts, command_line, run
from .models import build_model, own_reduction
from .options.params import (
    FRACTION,
    FRACTION_ABOVE_0,
    FRACTION_BELOW_1,
    NOT_NEGATIVE,
    OFF,
    POSITIVE,
    POSITIVE_COUNT,
    SECTIONS,
    Command,
    Parser,
    check_training,
    fill_optimizer_defaults,
    one_of,
    parse_args,
)
from .zero_shot import zero_shot_classifier

# ---------------------------------------------------------------------- options


def _add_labelled_data(parser: Parser) -> None:
    add = parser.section("labelled data")
    add(
        "--data",
        "Data set to train on (its training split) and to evaluate on (its test split): NAME=PATH, or PATH where the "
        "files tell which it is.",
        metavar="[NAME=]PATH",
    )
    add("--test-data", "Another place for the test split of --data.", metavar="[NAME=]PATH")
    add(
        "--also",
        "More data sets to evaluate on, with the classes of --data or, for ImageNet, some of them (imagenet-v2, "
        "imagenet-r, ...).",
        metavar="[NAME=]PATH",
        nargs="+",
        default=[],
    )
    add("--download", "Let torchvision download a data set that is not there.", **OFF)
    add(
        "--on-broken",
        "A test image that cannot be read: leave it out, or stop.",
        default="skip",
        **one_of("skip", "stop"),
    )
    add("--evaluate", "Train nothing: evaluate the checkpoint of --resume, or the zero-shot head without one.", **OFF)
    add(
        "--wise-ft",
        "At the end, evaluate the weights between the zero-shot classifier and the fine-tuned one (0 to 1 by 0.1). "
        "Needs --head zero-shot.",
        **OFF,
    )
    add(
        "--results",
        "Folder of the final results, one file a data set, with a summary of all; 'none' keeps none.",
        default="results",
        metavar="DIR",
    )


def _add_classifier(parser: Parser) -> None:
    add = parser.section("classifier")
    add(
        "--head",
        "How the linear head begins: at random, on the pooled features before the projection; or as the zero-shot "
        "classifier, on the projected features.",
        default="random",
        **one_of("random", "zero-shot"),
    )
    add(
        "--drop-path",
        "Stochastic depth: the rate at which the last block's branches are dropped; less before it.",
        default=0.0,
        type=FRACTION_BELOW_1,
    )
    add(
        "--vision-guided-reduction",
        "Reduce tokens in fine-tuning and its evaluation too, guided by the image alone.",
        **OFF,
    )


def _add_augmentation(parser: Parser) -> None:
    add = parser.section("augmentation")
    add(
        "--crop-scale",
        "Smallest and largest area of the random crop, as a share of the picture.",
        default=[0.08, 1.0],
        type=FRACTION_ABOVE_0,
        nargs=2,
    )
    add(
        "--crop-ratio",
        "Smallest and largest width / height of the random crop.",
        default=[3 / 4, 4 / 3],
        type=POSITIVE,
        nargs=2,
    )
    add("--hflip", "How often a picture is mirrored.", default=0.5, type=FRACTION)
    add(
        "--auto-augment",
        "A policy by timm's name: rand-m9-mstd0.5-inc1 is RandAugment as most recipes have it.",
        metavar="POLICY",
    )
    add("--color-jitter", "Strength of random changes of colour; not with a policy.", default=0.0, type=NOT_NEGATIVE)
    add("--random-erasing", "How often a rectangle of a picture is erased.", default=0.0, type=FRACTION)
    add(
        "--erasing-mode",
        "What a rectangle is filled with: noise, one random colour, or the mean colour.",
        default="pixel",
        **one_of("pixel", "rand", "const"),
    )
    add(
        "--train-interpolation",
        "How pictures are resized in training.",
        default="bicubic",
        **one_of("bicubic", "bilinear", "random"),
    )
    add("--mixup", "Mixup's alpha; 0: none.", default=0.0, type=NOT_NEGATIVE)
    add("--cutmix", "Cutmix's alpha; 0: none.", default=0.0, type=NOT_NEGATIVE)
    add("--mixup-prob", "How often a batch is mixed at all.", default=1.0, type=FRACTION)
    add("--mixup-switch-prob", "With both: how often it is cutmix.", default=0.5, type=FRACTION)
    add(
        "--label-smoothing",
        "Share of the target that is spread over all classes.",
        default=0.0,
        type=FRACTION_BELOW_1,
    )


def _add_global_batch(parser: Parser) -> None:
    parser.section("global batch")(
        "--global-batch",
        "Samples of one optimizer step over all processes; not used where --batch-size is given. Without either, "
        "--batch-size is 64.",
        type=POSITIVE_COUNT,
    )


_PAIRS = "is for image-text pairs: name the labelled images with --data NAME=PATH"
_OTHER_SETS = "is for pre-training: the test split of --data is evaluated, and more data sets with --also NAME=PATH"
_LOCKING = "locks a tower, and full fine-tuning trains all of the image tower: leave it out"
_CONTRASTIVE = "belongs to the contrastive losses of pre-training: leave it out"
_CAPTION = "weighs the image against its caption, and fine-tuning has none: leave it out"
_REFUSED = {
    **dict.fromkeys(
        (
            "--train-data", "--train-data-upsampling-factors", "--train-num-samples", "--dataset-type",
            "--dataset-resampled", "--csv-separator", "--csv-img-key", "--csv-caption-key",
        ),
        _PAIRS,
    ),
    **dict.fromkeys(
        ("--val-data", "--val-num-samples", "--zeroshot-data", "--imagenet-val", "--imagenet-v2"), _OTHER_SETS
    ),
    "--zeroshot-frequency": "is for pre-training: use --val-frequency",
    **dict.fromkeys(
        (
            "--lock-image", "--lock-image-unlocked-groups", "--lock-image-freeze-bn-stats", "--lock-text",
            "--lock-text-unlocked-layers", "--lock-text-freeze-layer-norm",
        ),
        _LOCKING,
    ),
    "--token-reduction": "is for pre-training: add --vision-guided-reduction to reduce tokens in fine-tuning",
    "--full-tokens-last": "is for pre-training: fine-tuning uses all tokens, unless --vision-guided-reduction is given",
    "--spread": "is for pre-training: adaptive reduction depends on the rest of the batch",
    "--lam": _CAPTION,
    "--text-scale": _CAPTION,
    "--image-decode": "is for pre-training: the transforms of fine-tuning are timm's, which are not changed",
    "--aug-cfg": "is for pre-training: use --crop-scale, --auto-augment, --color-jitter and the like",
    **dict.fromkeys(
        (
            "--siglip", "--loss-dist-impl", "--local-loss", "--gather-with-grad", "--distill-model",
            "--distill-pretrained",
        ),
        _CONTRASTIVE,
    ),
}  # fmt: skip
_REDUCTION = (
    "stage_depths", "keep_ratio", "keep_count", "merge", "scoring_depth", "target_rrt", "keep_rate", "reduce_layers",
    "merge_per_layer", "prop_attn",
)  # fmt: skip
# What a classifier is. With --evaluate and without --model, these are as in the checkpoint.
_CLASSIFIER_OPTIONS = (
    "model", "pretrained", "pretrained_image", "force_context_length", "force_image_size", "force_quick_gelu",
    "force_custom_text", "image_mean", "image_std", "image_interpolation", "image_resize_mode", "head",
    "vision_guided_reduction", *_REDUCTION, "ema_decay",
)  # fmt: skip


def _complete(args: argparse.Namespace) -> None:
    def forbid(wrong: bool, sentence: str) -> None:
        if wrong:
            raise UserError(sentence)

    loads = args.evaluate and args.resume is not None
    forbid(args.data is None, "--data is missing: name the labelled images, as in --data cifar10=/data/cifar10.")
    forbid(
        args.model is None and not loads,
        "--model is missing: give the model's name, and its checkpoint with --pretrained.",
    )
    forbid(
        args.evaluate and args.resume is None and args.head != "zero-shot",
        "--evaluate needs a checkpoint of fine-tuning in --resume, or --head zero-shot.",
    )
    check_training(args, trains=not args.evaluate)
    own_weights = args.model is None or ":" in args.model  # local-dir:... and hf-hub:... bring them along
    forbid(
        not (own_weights or args.pretrained or args.pretrained_image or (loads and not args.wise_ft)),
        "--pretrained is missing: give a checkpoint file of pre-training, or the name of pretrained weights.",
    )
    forbid(
        args.wise_ft and args.model is not None and args.head != "zero-shot",
        "--wise-ft starts from the zero-shot classifier, so it needs --head zero-shot.",
    )
    forbid(
        args.wise_ft and args.evaluate and not loads,
        "--wise-ft needs the fine-tuned weights: give their checkpoint in --resume.",
    )
    given = [name for name in _REDUCTION if getattr(args, name) is not None]
    forbid(
        bool(given) and args.model is not None and not args.vision_guided_reduction,
        f"--{(given or [''])[0].replace('_', '-')} needs --vision-guided-reduction: else no token is removed.",
    )
    forbid(
        args.auto_augment is not None and args.color_jitter > 0,
        "--color-jitter has no effect with --auto-augment, which changes colours itself: leave one out.",
    )
    for flag, (low, high) in (("--crop-scale", args.crop_scale), ("--crop-ratio", args.crop_ratio)):
        forbid(low > high, f"{flag} takes the smaller number first, not {low:g} {high:g}.")
    if args.batch_size is None and args.global_batch is None:
        args.batch_size = 64
    fill_optimizer_defaults(args, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8)


FINETUNING = Command(
    usage="torchrun --nproc_per_node N -m training.finetune [options]\n       python -m training.finetune [options]",
    description="Fine-tune the image tower of a CLIP model for classification, or evaluate what was (--evaluate).",
    sections=(_add_labelled_data, _add_classifier, _add_augmentation, _add_global_batch, *SECTIONS),
    complete=_complete,
    refused=_REFUSED,
    defaults={
        "--model": None, "--epochs": 10, "--wd": 0.1, "--warmup": "1ep", "--batch-size": None,
        "--force-patch-dropout": 0.0,
    },
)  # fmt: skip


# ---------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """Fine-tunes, or evaluates, and returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)

    def work(args: argparse.Namespace, ranks: Ranks) -> None:
        with ranks.agree():
            if args.model is None:
                args = _as_in_checkpoint(words, args.resume)
            if args.batch_size is None:
                args.batch_size = share_of(args.global_batch, ranks.world_size, args.accum_freq)
        run(args, ranks, FINETUNING, finetuning)

    return command_line(FINETUNING, work, words)


def share_of(global_batch: int, world_size: int, accum_freq: int) -> int:
    """Samples of one batch on each process.

    Raises:
        UserError: the global batch cannot be divided.
    """
    size, rest = divmod(global_batch, world_size * accum_freq)
    if rest or not size:
        raise UserError(
            f"The global batch of {global_batch} cannot be divided by {world_size} process(es) x --accum-freq "
            f"{accum_freq} = {world_size * accum_freq}: change one of them, or give --batch-size."
        )
    return size


def _as_in_checkpoint(words: list[str], resume: str) -> argparse.Namespace:
    """The options, with those that say what the classifier is as they are in a checkpoint's configuration."""
    if resume == "latest":
        raise UserError("--evaluate needs --model, or a checkpoint file in --resume that says which model it is of.")
    config = checkpoint.load(resume).get("config", {})
    if "head" not in config:
        raise UserError(f"{resume} is not a checkpoint of fine-tuning; give one of training.finetune, or --model.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint.yaml"
        file.write_text(yaml.safe_dump({name: config[name] for name in _CLASSIFIER_OPTIONS if name in config}))
        return parse_args(["--config", str(file), *words], FINETUNING)


def finetuning(args: argparse.Namespace, ranks: Ranks, resume: str | None) -> Parts:
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
        args.token_reduction = "none"
        if args.vision_guided_reduction:
            args.token_reduction = own_reduction(args.model).get("method", "elip")
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


def load_data_sets(args: argparse.Namespace) -> tuple[LabelledImages | None, dict[str, LabelledImages]]:
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
    args: argparse.Namespace, data: LabelledImages, visual: nn.Module, *, rank: int, world_size: int
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
        identity={"dataset_type": "labelled", "sources": [data.name], "fingerprint": data.fingerprint(times=False)},
        description="\n".join(lines),
        stall_seconds=args.stall_seconds,
    )


# ---------------------------------------------------------------------- the end


def _finish(
    args: argparse.Namespace,
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
    args: argparse.Namespace, task: ClassificationTask, prefix: str, weights_hash: str, metrics: dict[str, float]
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
