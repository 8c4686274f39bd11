"""Zero-shot classification: a classifier out of prompts, and what it scores; in training and for the command."""
from __future__ import annotations

from collections.abc import Callable, Iterator

import open_clip
from open_clip_train.precision import get_autocast
from PIL import Image
from torch import Tensor, nn

from ..data.sets.labelled import LabelledImages
from ..data.sets.registry import load_data
from ..distributed import Ranks
from .passes import (
    EncodeSettings,
    ImagePass,
    check_finite,
    collect,
    deal,
    evaluation_mode,
    gather_rows,
    image_encoder,
)  # fmt: skip
from .results import digest_of
from .scores import outcomes, summary

CLASSES_PER_BATCH = 10  # prompts of this many classes go through the text tower together


def zero_shot_classifier(
    model: nn.Module, tokenizer: Callable, data: LabelledImages, *, ranks: Ranks, precision: str
) -> Tensor:
    """(D, C) float32 on the CPU: the mean text feature of each class's prompts, normalized.

    A collective call, which shares the work. Raises NotFinite if a class's feature is no number.
    """
    autocast = get_autocast(precision, device_type=ranks.device.type)

    def batches(encoder: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        for places in deal(len(data.classnames), CLASSES_PER_BATCH, ranks):
            with autocast():
                names = [data.classnames[i] for i in places]
                weights = open_clip.build_zero_shot_classifier(
                    encoder, tokenizer, names, data.templates, num_classes_per_batch=len(names), device=ranks.device
                )
            rows = weights.T.float().cpu()
            check_finite(rows, places, lambda place: f"the text features of the class {data.classnames[place]!r}")
            yield places, rows

    with evaluation_mode(model) as encoder:
        return gather_rows(batches(encoder), ranks)[1].T.contiguous()


def prompts_key(data: LabelledImages) -> str:
    """A hash of the class names and of what the templates make of a name."""
    shown = [t.format("\0") if isinstance(t, str) else t("\0") for t in data.templates]
    return digest_of([list(data.classnames), shown])


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
    """`summary` of the readable images, `classes`, and `skipped` (broken images).

    The same on every process and for every number of processes. A collective call. Raises as `collect`.

    classifier: (D, C) float32 on the CPU. encode: as `image_encoder` of the model, which is the default.
    """

    def scores(features: Tensor, places: Tensor) -> Tensor:
        return outcomes(features @ classifier, data.labels[places])

    with evaluation_mode(model) as encoder:
        images = ImagePass(encode or image_encoder(encoder), data.images, preprocess, ranks=ranks, settings=settings)
        found, places, skipped = collect(images, scores)
    classes = len(data.classnames)
    return {**summary(found, data.labels[places], classes), "classes": classes, "skipped": len(skipped)}


def load_zero_shot_data(options: object) -> dict[str, LabelledImages]:
    """The data sets of `--imagenet-val`, `--imagenet-v2` and `--zeroshot-data` that are set, by metric prefix.

    Lists files without decoding any; UserError for bad ones, so that a run can fail before it trains.
    """
    sources = {
        "imagenet-zeroshot": (options.imagenet_val, "imagenet={}"),
        "imagenetv2-zeroshot": (options.imagenet_v2, "imagenet-v2={}"),
        "zeroshot": (options.zeroshot_data, "{}"),
    }
    return {prefix: load_data(spec.format(path)) for prefix, (path, spec) in sources.items() if path}


def run_zero_shot_suite(
    model: nn.Module,
    tokenizer: Callable,
    preprocess: Callable,
    options: object,
    *,
    ranks: Ranks,
    data: dict[str, LabelledImages],
) -> dict[str, float]:
    """Zero-shot metrics for the trainer, the same on every process; {} if there is no data. A collective call.

    `data` is `load_zero_shot_data(options)`. Keys: `imagenet-zeroshot-val-top1` and `-top5`, `imagenetv2-...` (as in
    OpenCLIP), `zeroshot-val-top1`, `-top5`, `-mean_per_class_recall`, `-classes` and `-num_samples`.
    """
    settings = EncodeSettings(options.batch_size, options.workers, options.precision)
    metrics, made = {}, {}
    for prefix, images in data.items():
        key = prompts_key(images)  # ImageNet and ImageNet-V2 share theirs
        if key not in made:
            made[key] = zero_shot_classifier(model, tokenizer, images, ranks=ranks, precision=options.precision)
        result = classify(model, made[key], images, preprocess, ranks=ranks, settings=settings)
        keys = ["top1", "top5"]
        if prefix == "zeroshot":
            keys += ["mean_per_class_recall", "classes", "num_samples"]
        metrics |= {f"{prefix}-val-{key}": result[key] for key in keys}
    return metrics
