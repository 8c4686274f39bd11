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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import checkpoint, wise_ft
from .command import run_command
from .data import build_labelled_data
from .data.pairs import LabelEncoding
from .data.sets.labelled import LabelledImages
from .data.sets.registry import load_data
from .distributed import Ranks, end, seed_everything
from .ema import Ema
from .errors import UserError
from .evaluation.loaded import hash_weights
from .evaluation.prompts import zero_shot_classifier
from .evaluation.results import Results, described_data
from .evaluation.scores import METRICS, check_classes
from .models import build_model, check_works_alone, described_reduction, token_reduction
from .options import parse
from .run import Parts, run
from .tasks.augment import Mix, train_transform
from .tasks.classification import (
    ClassificationTask,
    FinetuningOptions,
    add_drop_path,
    random_classifier,
    zero_shot_head,
)

# What a classifier is. With --evaluate and without --model, these options are as in the checkpoint.
_OF_CLASSIFIER = (
    "model", "pretrained", "pretrained_image", "force_context_length", "force_image_size", "force_quick_gelu",
    "force_custom_text", "image_mean", "image_std", "image_interpolation", "image_resize_mode", "head",
    "vision_guided_reduction", "ema_decay",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Fine-tunes, or evaluates, and returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)

    def work(options: FinetuningOptions, ranks: Ranks) -> None:
        with ranks.agree():
            if options.model is None:
                options = _as_in_checkpoint(words, options.resume)
                options.divide_global_batch(ranks.world_size)
        run(options, ranks, finetuning)

    return run_command(FinetuningOptions, work, words, __doc__)


def _as_in_checkpoint(words: list[str], resume: str) -> FinetuningOptions:
    """The options, with those that say what the classifier is as they are in a checkpoint's configuration."""
    if resume == "latest":
        raise UserError("--evaluate needs --model, or a checkpoint file in --resume that says which model it is of.")
    config = checkpoint.load(resume).get("config", {})
    if "head" not in config:
        raise UserError(f"{resume} is not a checkpoint of fine-tuning; give one of training.finetune, or --model.")
    given = {name: config[name] for name in _OF_CLASSIFIER if name in config}
    return parse(FinetuningOptions, words, given=given | {"token_reduction": token_reduction(config)})


def finetuning(options: FinetuningOptions, ranks: Ranks, resume: str | None) -> Parts:
    """A classifier, labelled images and their task; see `run.Build`."""
    place = {"rank": ranks.rank, "world_size": ranks.world_size}
    with ranks.agree():
        if options.download and ranks.local_rank == 0:
            load_data_sets(options)  # one process of each machine fetches what is not there, before the others look
    with ranks.agree():
        results = Results(None if options.results.lower() == "none" else Path(options.results), ranks)
        train, tests = load_data_sets(options)
        seed_everything(options.seed)
        # The model's reduction is guided by captions, so without the flag it is left out.
        reduces = options.vision_guided_reduction
        reduction = described_reduction(options) if reduces else {"method": "none"}
        of_model = replace(options, token_reduction=reduction)
        built = build_model(of_model, ranks.device, image_tower=options.head == "random")
        model = built.model
        if reduces:
            check_works_alone(model, options.model)
    data = next(iter(tests.values()))
    common = {"num_classes": len(data.classnames), "reduce": reduces}
    if options.head == "random":
        classifier = random_classifier(model, **common)
    else:
        weights = None
        if resume is None or options.wise_ft:  # else they come from the checkpoint
            weights = zero_shot_classifier(model, built.tokenizer, data, ranks=ranks, precision=options.precision)
        classifier = zero_shot_head(model, weights=weights, **common)
    start = wise_ft.whole_weights(classifier) if options.wise_ft else None
    with ranks.agree():
        add_drop_path(classifier.visual, options.drop_path)
        train_data = None
        if train is not None:
            encoding = LabelEncoding(train_transform(options, built.identity.preprocess))
            train_data = build_labelled_data(options, train, encoding, **place)
    seed_everything(options.seed + ranks.rank)
    task = ClassificationTask(options, ranks, Mix(options, len(data.classnames)), tests, built.transform)
    return Parts(built.identity, classifier, task, train_data, partial(_finish, options, ranks, task, results, start))


def load_data_sets(options: FinetuningOptions) -> tuple[LabelledImages | None, dict[str, LabelledImages]]:
    """The data to train on (None with `--evaluate`), and those to evaluate on by name, that of `--data` first.

    Raises:
        UserError: a data set cannot be had, has other classes, or has the name of another.
    """
    train = None if options.evaluate else load_data(options.data, split="train", download=options.download)
    specs = [options.test_data or options.data, *options.also]
    tests = [load_data(spec, split="test", download=options.download) for spec in specs]
    named: dict[str, LabelledImages] = {}
    for data in tests:
        check_classes(tests[0] if train is None else train, data)
        if data.name in named:
            raise UserError(f"Two data sets to evaluate on are called {data.name}; give each of them once.")
        named[data.name] = data
    return train, named


def _finish(
    options: FinetuningOptions,
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
            for what, own in _described(options, task, prefix, hash_weights(weights), metrics):
                results.add(what, own, {"run": None if folder is None else str(folder)})
    if start is not None:
        # The averages are what is taken from a run that keeps them.
        rows = wise_ft.curve(model, start, list(final.values())[-1], task.metrics)
        logging.info("WiSE-FT, from the zero-shot classifier (0) to the fine-tuned one (1)\n" + wise_ft.describe(rows))
        with ranks.agree():
            if ranks.is_main and folder is not None:
                wise_ft.write(rows, folder)


def _described(
    options: FinetuningOptions, task: ClassificationTask, prefix: str, weights_hash: str, metrics: dict[str, float]
) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
    """For each data set that was evaluated: what was done (see `Results`), and its metrics (`prefix`NAME-...)."""
    for name, data in task.data.items():
        own = {metric: metrics[key] for metric in METRICS if (key := f"{prefix}{name}-{metric}") in metrics}
        if not own:
            continue
        yield {
            "command": "finetune",
            "model": options.model,
            "pretrained": options.pretrained,
            "weights": weights_hash,
            **described_data(data),
            "settings": {
                "precision": options.precision,
                "transform": repr(task.transform),
                "on_broken": options.on_broken,
                "head": options.head,
                "vision_guided_reduction": options.vision_guided_reduction,
                "averaged": bool(prefix),
            },
        }, own


if __name__ == "__main__":
    end(main())
