"""Zero-shot classification: the class whose prompts are nearest to the image wins.

    python -m training.zero_shot --model ViT-B-16-ELIP --pretrained epoch_32.pt --data imagenet=/data/imagenet
    torchrun --nproc_per_node 4 -m training.zero_shot --model ViT-B-16 --pretrained openai \\
        --data imagenet=/data/imagenet imagenet-v2=/data/imagenet-v2 imagenet-r=/data/imagenet-r cifar10=/data
"""
from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import open_clip
import torch
from open_clip_train.precision import get_autocast
from PIL import Image
from torch import Tensor, nn

from . import checkpoint
from .distributed import Ranks, end
from .errors import UserError
from .evaluation.pairs import evaluation_mode
from .evaluation.command import (
    LoadedModel,
    Parser,
    add_common_options,
    described,
    encode_settings,
    image_encoder,
    load_model,
    open_results,
    run_command,
    table,
)
from .data.sets.registry import load_data
from .evaluation.passes import EncodeSettings, ImagePass, all_skipped
from .data.sets.classnames import read_templates
from .data.sets.labelled import LabelledImages
from .evaluation.metrics import gather_ordered, mean_per_class_recall, predictions, topk_hits

CLASSES_PER_BATCH = 10  # prompts of this many classes go through the text tower together
TEMPLATES = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}


def zero_shot_classification(
    model: nn.Module,
    tokenizer: Callable,
    data: LabelledImages,
    preprocess: Callable[[Image.Image], Tensor],
    *,
    ranks: Ranks,
    settings: EncodeSettings,
) -> dict[str, float]:
    """`top1`, `top5`, `mean_per_class_recall` (fractions), `num_samples`, `classes` and `skipped` (broken images).

    The same on every process and for every number of processes. Top-5 of fewer than five classes is 1. A collective
    call.

    Raises:
        UserError: no image can be read, or one is broken and none may be.
    """
    classifier = zero_shot_classifier(model, tokenizer, data, ranks=ranks, precision=settings.precision)
    return classify(model, classifier, data, preprocess, ranks=ranks, settings=settings)


def zero_shot_classifier(
    model: nn.Module,
    tokenizer: Callable,
    data: LabelledImages,
    *,
    ranks: Ranks,
    precision: str,
) -> Tensor:
    """(D, C) float32 on the CPU: the mean text feature of each class's prompts, normalized. Processes share the work.

    A collective call.
    """
    autocast = get_autocast(precision, device_type=ranks.device.type)
    classes = torch.arange(len(data.classnames))
    # Whole batches go to a process, so that a batch, and with it rounding, is the same for any number of processes.
    mine = classes.split(CLASSES_PER_BATCH)[ranks.rank :: ranks.world_size]
    index = torch.cat(mine) if mine else classes[:0]
    features = {}
    if mine:
        with evaluation_mode(model) as encoder, autocast():
            weights = open_clip.build_zero_shot_classifier(
                encoder,
                tokenizer=tokenizer,
                classnames=[data.classnames[i] for i in index],
                templates=data.templates,
                num_classes_per_batch=CLASSES_PER_BATCH,
                device=ranks.device,
            )
        features = {"weights": weights.T.float()}
    return gather_ordered(features, index, ranks.world_size)["weights"].T


def classify(
    model: nn.Module,
    classifier: Tensor,
    data: LabelledImages,
    preprocess: Callable[[Image.Image], Tensor],
    *,
    ranks: Ranks,
    settings: EncodeSettings,
    encode: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """As `zero_shot_classification`, with a ready `classifier`: (D, C) float32 on the CPU.

    Args:
        encode: (B, 3, H, W) to normalized features (B, D); default the model's `encode_image`.
    """
    index, parts = [torch.empty(0, dtype=torch.int64)], []
    with evaluation_mode(model) as encoder:
        if encode is None:
            encode = _normalized(encoder)
        images = ImagePass(encode, data.images, preprocess, ranks=ranks, settings=settings)
        with ranks.agree():
            for places, features in images:
                logits, target = features.float() @ classifier, data.labels[places]
                index.append(places)
                parts.append(torch.cat([topk_hits(logits, target, (1, 5)), predictions(logits)[:, None]], dim=1))
    rows = {"scores": torch.cat(parts)} if parts else {}
    index = torch.cat(index)
    scores = gather_ordered({**rows, "index": index} if rows else {}, index, ranks.world_size)
    skipped = all_skipped(images)
    if not scores:
        raise UserError(f"None of the {len(data)} images can be read; the first is {skipped[0]}.")
    top1, top5, predicted = scores["scores"].unbind(dim=1)
    return {
        "top1": int(top1.sum()) / len(top1),
        "top5": int(top5.sum()) / len(top5),
        "mean_per_class_recall": mean_per_class_recall(predicted, data.labels[scores["index"]], len(data.classnames)),
        "num_samples": len(top1),
        "classes": len(data.classnames),
        "skipped": len(skipped),
    }


def _normalized(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda images: model.encode_image(images, normalize=True)


# ------------------------------------------------------------------------------------------------- in the trainer


def load_zero_shot_data(args: argparse.Namespace) -> dict[str, LabelledImages]:
    """The data sets of `--imagenet-val`, `--imagenet-v2` and `--zeroshot-data` that are set, by metric prefix.

    Lists files without decoding any; UserError for bad ones, so that a run can fail before it trains.
    """
    sources = {
        "imagenet-zeroshot": (args.imagenet_val, "imagenet={}"),
        "imagenetv2-zeroshot": (args.imagenet_v2, "imagenet-v2={}"),
        "zeroshot": (args.zeroshot_data, "{}"),
    }
    return {prefix: load_data(spec.format(path)) for prefix, (path, spec) in sources.items() if path}


def run_zero_shot_suite(
    model: nn.Module,
    tokenizer: Callable,
    preprocess: Callable,
    args: argparse.Namespace,
    *,
    ranks: Ranks,
    data: dict[str, LabelledImages] | None = None,
) -> dict[str, float]:
    """Zero-shot metrics for the trainer, the same on every process; {} if no flag asks for any. A collective call.

    `data` is `load_zero_shot_data(args)`, read anew if not given. Keys: `imagenet-zeroshot-val-top1` and `-top5`,
    `imagenetv2-zeroshot-val-top1` and `-top5` (OpenCLIP's names), `zeroshot-val-top1`, `-top5`,
    `-mean_per_class_recall`, `-classes` and `-num_samples`.
    """
    settings = EncodeSettings(args.batch_size, args.workers, args.precision)
    metrics = {}
    classifier, built_from = None, None
    for prefix, images in (load_zero_shot_data(args) if data is None else data).items():
        if (images.classnames, images.templates) != built_from:  # ImageNet and ImageNet-V2 share theirs
            classifier = zero_shot_classifier(model, tokenizer, images, ranks=ranks, precision=args.precision)
            built_from = (images.classnames, images.templates)
        result = classify(model, classifier, images, preprocess, ranks=ranks, settings=settings)
        keys = ["top1", "top5"]
        if prefix == "zeroshot":
            keys += ["mean_per_class_recall", "classes", "num_samples"]
        metrics |= {f"{prefix}-val-{key}": result[key] for key in keys}
    return metrics


# ---------------------------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one sentence on stderr."""
    return run_command(_parser(), evaluate, argv)


def evaluate(args: argparse.Namespace, ranks: Ranks) -> str:
    """Evaluates on each data set that is not finished yet; returns the table of all."""
    results = open_results(args, ranks)
    with ranks.agree():
        options = {"split": args.split, "download": args.download, "classnames": args.classnames}
        sets = [_with_templates(load_data(spec, **options), args) for spec in args.data]
        loaded = load_model(args, ranks)
    rows = [("data", "images", "classes", "top-1", "top-5", "mean per class", "chance")]
    encode = image_encoder(loaded.model, args, normalize=True)
    for data in sets:
        what = described(args, "zero_shot", loaded)
        what |= {"data": data.name, "split": data.split, "data_fingerprint": data.fingerprint()}
        what["settings"] |= {"prompts": _prompts_key(data)}
        record = results.find(what)
        if record is None:
            classifier = cached_classifier(loaded, data, results.folder, args.precision, ranks)
            metrics = classify(
                loaded.model,
                classifier,
                data,
                loaded.preprocess,
                ranks=ranks,
                settings=encode_settings(args, data.name),
                encode=encode,
            )
            record = results.add(what, metrics)
        rows.append(_row(data.name, record["metrics"]))
    return table(rows)


def cached_classifier(
    loaded: LoadedModel, data: LabelledImages, folder: Path | None, precision: str, ranks: Ranks
) -> Tensor:
    """`zero_shot_classifier`, kept in `folder`/classifiers for the same weights, names, prompts and precision.

    A collective call; only the main process reads and writes.
    """
    path = None
    if folder is not None:
        key = json.dumps([loaded.weights_hash, loaded.name, precision, _prompts_key(data)])
        path = folder / "classifiers" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    kept = None
    if path is not None and ranks.is_main and path.is_file():
        try:
            kept = checkpoint.load(path)["classifier"]
        except (UserError, KeyError):  # cut off: made anew
            kept = None
    kept = ranks.broadcast(kept)
    if kept is not None:
        return kept
    classifier = zero_shot_classifier(loaded.model, loaded.tokenizer, data, ranks=ranks, precision=precision)
    if path is not None and ranks.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save({"classifier": classifier.contiguous()}, path)
    return classifier


def _with_templates(data: LabelledImages, args: argparse.Namespace) -> LabelledImages:
    """With the templates of the flag in place of the data set's own."""
    if args.templates is not None:
        if args.templates not in TEMPLATES and not Path(args.templates).is_file():
            raise UserError(f"--templates {args.templates} is neither a file nor one of {', '.join(TEMPLATES)}.")
        templates = TEMPLATES.get(args.templates) or read_templates(Path(args.templates))
        data = replace(data, templates=templates)
    return data


def _prompts_key(data: LabelledImages) -> str:
    """A hash of the class names and of what the templates make of a name."""
    shown = [t.format("\0") if isinstance(t, str) else t("\0") for t in data.templates]
    return hashlib.sha256(json.dumps([list(data.classnames), shown]).encode()).hexdigest()[:16]


def _row(name: str, metrics: dict[str, float]) -> tuple[str, ...]:
    skipped = f" ({metrics['skipped']} skipped)" if metrics["skipped"] else ""
    accuracies = [f"{metrics[key]:.2%}" for key in ("top1", "top5", "mean_per_class_recall")]
    chance = f"{1 / metrics['classes']:.2%}"
    return (name, f"{metrics['num_samples']:,}{skipped}", f"{metrics['classes']:,}", *accuracies, chance)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m training.zero_shot", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_common_options(parser, data_help="data sets (docs/evaluation_data.md), such as imagenet=/data/imagenet")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="default: %(default)s")
    parser.add_argument(
        "--templates",
        metavar="openai|simple|FILE",
        help="prompts: OpenAI's 80 for ImageNet, its 7 best, or one a line with {} for the name; default: the data's",
    )
    parser.add_argument("--classnames", type=Path, metavar="FILE", help="names instead of the data's own: as classnames.txt")
    return parser


if __name__ == "__main__":
    end(main())
