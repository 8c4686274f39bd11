"""Zero-shot classification: a classifier out of prompts, and what it scores; in training and for the command."""
from __future__ import annotations

from collections.abc import Callable

import open_clip
from PIL import Image
from torch import Tensor, nn

from ..data.sets.labelled import LabelledImages
from ..data.sets.registry import load_data
from ..distributed import Ranks
from .metrics import outcomes, summary
from .passes import EncodeSettings, ImagePass, encode_places, evaluation_mode, gather_rows, image_encoder
from .results import digest_of

CLASSES_PER_BATCH = 10  # prompts of this many classes go through the text tower together


def zero_shot_classifier(
    model: nn.Module, tokenizer: Callable, data: LabelledImages, *, ranks: Ranks, precision: str
) -> Tensor:
    """(D, C) float32 on the CPU: the mean text feature of each class's prompts, normalized; NotFinite if one is none.

    A collective call, which shares the work.
    """
    with evaluation_mode(model) as encoder:

        def encode(places: Tensor) -> Tensor:
            names = [data.classnames[i] for i in places]
            return open_clip.build_zero_shot_classifier(
                encoder, tokenizer, names, data.templates, num_classes_per_batch=len(names), device=ranks.device
            ).T.float()

        rows = encode_places(
            encode, len(data.classnames), lambda place: f"the text features of the class {data.classnames[place]!r}",
            ranks, EncodeSettings(CLASSES_PER_BATCH, 0, precision),
        )  # fmt: skip
        return rows.T.contiguous()


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
    with evaluation_mode(model) as encoder:
        images = ImagePass(encode or image_encoder(encoder), data.images, preprocess, ranks=ranks, settings=settings)
        scored = ((places, outcomes(features @ classifier, data.labels[places])) for places, features in images)
        places, found = gather_rows(scored, ranks)
    classes, skipped = len(data.classnames), len(images.all_skipped())
    return {**summary(found, data.labels[places], classes), "classes": classes, "skipped": skipped}


def load_zero_shot_data(options: object) -> dict[str, LabelledImages]:
    """The data sets of `--imagenet-val`, `--imagenet-v2` and `--zeroshot-data` that are set, by metric prefix."""
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
    """Zero-shot metrics for the trainer of `load_zero_shot_data`, the same on every process. A collective call.

    Keys: `imagenet-zeroshot-val-top1` and `-top5`, `imagenetv2-...` (as in OpenCLIP), `zeroshot-val-top1`, `-top5`,
    `-mean_per_class_recall`, `-classes` and `-num_samples`.
    """
    settings = EncodeSettings(options.batch_size, options.workers, options.precision)
    metrics, made = {}, {}
    for prefix, images in data.items():
        key = prompts_key(images)  # ImageNet and ImageNet-V2 share theirs
        if key not in made:
            made[key] = zero_shot_classifier(model, tokenizer, images, ranks=ranks, precision=options.precision)
        result = classify(model, made[key], images, preprocess, ranks=ranks, settings=settings)
        keys = ("top1", "top5", "mean_per_class_recall", "classes", "num_samples")
        metrics |= {f"{prefix}-val-{key}": result[key] for key in keys[: None if prefix == "zeroshot" else 2]}
    return metrics
