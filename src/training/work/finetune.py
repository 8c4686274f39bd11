"""The work of `training.finetune`."""
from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from open_clip_elip import identity as identities

from .. import checkpoint, run_folder, wise_ft
from ..data import build_labelled_data
from ..data.samples import LabelEncoding
from ..data.sets.labelled import LabelledImages
from ..data.sets.registry import load_data
from ..distributed import Ranks, seed_everything
from ..ema import Ema
from ..errors import UserError
from ..evaluation.loaded import hash_weights
from ..evaluation.prompts import zero_shot_classifier
from ..evaluation.results import Results, described, described_model
from ..evaluation.scores import METRICS, check_classes
from ..models import Built, build_model, check_reduces, told
from ..options import parse, resolved
from ..options.finetune import FinetuningOptions
from ..options.model import reduction_of
from ..run import Parts, run
from ..tasks.augment import Mix, train_transform
from ..tasks.classification import ClassificationTask, Classifier, add_drop_path

# What a classifier is. With --evaluate and without --model, these options are as in the checkpoint.
_OF_CLASSIFIER = (
    "model", "pretrained", "pretrained_image", "head", "vision_guided_reduction", "ema_decay", "adapter",
    "adapter_rank", *identities.CHANGES,
)  # fmt: skip


def work(options: FinetuningOptions, ranks: Ranks, argv: Sequence[str]) -> None:
    """Trains, or evaluates; `argv`: the command line of the options."""
    with ranks.agree():
        if options.evaluate and options.resume is not None:
            options = _of_checkpoint(options, argv)
            options.divide_global_batch(ranks.world_size)
    keeps_files = not options.evaluate or options.wise_ft  # the results of an evaluation are in --results
    run(options if keeps_files else replace(options, logs="none"), ranks, finetuning)


def _of_checkpoint(options: FinetuningOptions, argv: Sequence[str]) -> FinetuningOptions:
    """The options of `--evaluate --resume`; without --model, what the classifier is is as in the checkpoint."""
    resume = run_folder.to_evaluate(options)
    if options.model is None:
        config = checkpoint.load(resume).get("config", {})
        if "head" not in config:
            raise UserError(f"{resume} is not a checkpoint of fine-tuning; give one of training.finetune, or --model.")
        given = {name: config[name] for name in _OF_CLASSIFIER if name in config}
        options = parse(FinetuningOptions, argv, given=given | {"token_reduction": reduction_of(config)})
    return options if options.wise_ft else replace(options, resume=resume)  # the curve belongs in the run's folder


def finetuning(options: FinetuningOptions, ranks: Ranks, resume: str | None) -> Parts:
    """A classifier, labelled images and their task; see `run.Build`."""
    with ranks.agree():
        if options.download and ranks.local_rank == 0:
            load_data_sets(options)  # one process of each machine fetches what is not there, before the others look
    with ranks.agree():
        results = Results(options.results, ranks)
        train, tests = load_data_sets(options)
        data, reduces = next(iter(tests.values())), options.vision_guided_reduction
        if train is not None and len(data.classnames) < 2:
            raise UserError(f"{train.name} has one class, so there is nothing to tell apart; take other data.")
        if train is not None and options.batch_size == 1 and (options.mixup or options.cutmix):
            raise UserError("A batch of one picture has none to mix it with: raise --batch-size, or do not mix.")
        seed_everything(options.seed)
        reduction = {"method": "none"}  # the model's own is guided by captions, so without the flag it is left out
        if reduces:
            with told():
                own = identities.describe(options.model, cache_dir=options.cache_dir).token_reduction
            reduction = {"method": own["method"] if own else "elip", **(reduction_of(vars(options)) or {})}
        of_model = replace(options, token_reduction=reduction)
        filled = resume is None or options.wise_ft  # else all weights come from the checkpoint
        built = build_model(of_model, ranks.device, image_tower=options.head == "random", filled=filled)
        if reduces:
            check_reduces(built.model, options.model)
    weights = None
    if options.head == "zero-shot" and filled:
        weights = zero_shot_classifier(built.model, built.tokenizer, data, ranks=ranks, precision=options.precision)
    classifier = Classifier(built.model, len(data.classnames), options.head, weights, reduce=reduces)
    start = wise_ft.whole_weights(classifier) if options.wise_ft else None
    with ranks.agree():
        add_drop_path(classifier.visual, options.drop_path)
        train_data = None
        if train is not None:
            encoding = LabelEncoding(train_transform(options, built.identity.preprocess))
            place = {"rank": ranks.rank, "world_size": ranks.world_size}
            train_data = build_labelled_data(options, train, encoding, **place)
    seed_everything(options.seed + ranks.rank)
    task = ClassificationTask(options, ranks, Mix(options, len(data.classnames)), tests, built.transform)
    return Parts(built.identity, classifier, task, train_data, partial(_finish, built, task, results, start))


def load_data_sets(options: FinetuningOptions) -> tuple[LabelledImages | None, dict[str, LabelledImages]]:
    """The data to train on (None with `--evaluate`), and those to evaluate on by name, that of `--data` first.

    UserError: a data set cannot be had, has other classes, or has the name of another.
    """
    train = None if options.evaluate else load_data(options.data, split="train", download=options.download)
    named: dict[str, LabelledImages] = {}
    for spec in [options.test_data or options.data, *options.also]:
        data = load_data(spec, split="test", download=options.download)
        check_classes(next(iter(named.values()), data) if train is None else train, data)
        if data.name in named:
            raise UserError(f"Two data sets to evaluate on are called {data.name}; give each of them once.")
        named[data.name] = data
    return train, named


def _finish(
    built: Built, task: ClassificationTask, results: Results, start: dict[str, Tensor] | None,
    model: nn.Module, averages: Ema | None, metrics: dict[str, float], folder: Path | None,
) -> None:  # fmt: skip
    """The final results, and the curve from the weights at the start (None: it was not asked for)."""
    options, ranks = task.options, task.ranks
    final = {"": wise_ft.whole_weights(model)}
    if averages is not None:
        final["ema/"] = {name: value.cpu() for name, value in averages.state_dict().items()}
    with ranks.agree():
        for prefix, weights in final.items():
            of_model = described_model(options, built.identity, hash_weights(weights), task.transform, built.tokenizer)
            for name, data in task.data.items():
                own = {metric: metrics[key] for metric in METRICS if (key := f"{prefix}{name}-{metric}") in metrics}
                if own:
                    what = described("finetune", options, of_model, data, head=options.head, averaged=bool(prefix))
                    results.add(what, own, {"run": None if folder is None else str(folder)})
    if start is not None:
        fine_tuned = list(final.values())[-1]  # the averages are what is taken from a run that keeps them
        rows = wise_ft.curve(model, start, fine_tuned, task.metrics)
        logging.info("WiSE-FT, from the zero-shot classifier (0) to the fine-tuned one (1)\n" + wise_ft.describe(rows))
        with ranks.agree():
            if ranks.is_main and folder is not None:
                described_as = {"config": resolved(options), "model": built.identity.to_dict()}
                mixtures = {
                    alpha: {"state_dict": wise_ft.interpolate(start, fine_tuned, alpha), **described_as}
                    for alpha in options.wise_ft_save
                }
                wise_ft.write(rows, folder, mixtures)
