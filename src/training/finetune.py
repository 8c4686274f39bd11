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
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import checkpoint, wise_ft
from .command import run_command
from .data.pairs import LabelEncoding
from .data.sets.labelled import LabelledImages
from .data.sets.registry import load_data
from .distributed import Ranks, end, seed_everything
from .ema import Ema
from .errors import UserError
from .evaluation.results import Results
from .evaluation.scores import METRICS, check_classes
from .evaluation.zero_shot import zero_shot_classifier
from .models import build_model
from .options import parse
from .run import Parts, run
from .tasks.augment import Augmentation, Mix, train_transform
from .tasks.classification import (
    ClassificationTask,
    FinetuningOptions,
    add_drop_path,
    random_classifier,
    zero_shot_head,
)


# The options that say what a classifier is. With --evaluate and without --model they are as in the checkpoint.
_OF_CLASSIFIER = ("pretrained", "head", "vision_guided_reduction", "ema_decay")


def main(argv: Sequence[str] | None = None) -> int:
    """Fine-tunes, or evaluates, and returns the exit code."""

    def work(options: FinetuningOptions, ranks: Ranks) -> None:
        with ranks.agree():
            options.batch_size = options.batch_size or share_of(options.global_batch, ranks.world_size, options.accum_freq)
        run(options, ranks, finetuning)

    return run_command(FinetuningOptions, work, argv, __doc__)


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
        identity, model, (_, transform), tokenizer = build_model(options, ranks.device)
    data = next(iter(tests.values()))
    common = {"num_classes": len(data.classnames), "reduce": options.vision_guided_reduction}
    if options.head == "random":
        classifier = random_classifier(model, **common)
    else:
        weights = None
        if resume is None or options.wise_ft:  # else they come from the checkpoint
            weights = zero_shot_classifier(model, tokenizer, data, ranks=ranks, precision=options.precision)
        classifier = zero_shot_head(model, weights=weights, **common)
    del model
    start = wise_ft.whole_weights(classifier) if options.wise_ft else None
    with ranks.agree():
        add_drop_path(classifier.visual, options.drop_path)
        train_data = None
        if train is not None:
            encoding = LabelEncoding(train_transform(Augmentation.of(options), classifier.visual.preprocess_cfg))
            train_data = build_labelled_data(options, train, encoding, **place)
    seed_everything(options.seed + ranks.rank)
    task = ClassificationTask(options, ranks, Mix.of(options, len(data.classnames)), tests, transform)
    return Parts(identity, classifier, task, train_data, partial(_finish, options, ranks, task, results, start))


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
            "data": name,
            "split": data.split,
            "data_fingerprint": data.fingerprint(),
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
