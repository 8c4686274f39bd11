"""The work of `training.zero_shot`."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import open_clip
from torch import Tensor

from ..data.sets.classnames import read_templates
from ..data.sets.labelled import LabelledImages
from ..data.sets.registry import load_data
from ..distributed import Ranks
from ..errors import UserError
from ..evaluation.loaded import LoadedModel, load_model
from ..evaluation.passes import EncodeSettings, image_encoder
from ..evaluation.prompts import classify, prompts_key, zero_shot_classifier
from ..evaluation.results import Results, described, digest_of
from ..options.zero_shot import ZeroShotOptions

TEMPLATES = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}


def work(options: ZeroShotOptions, ranks: Ranks, argv: Sequence[str]) -> str:
    """Evaluates on each data set that is not finished yet; returns the table of all."""
    with ranks.agree():
        results = Results(options.results, ranks, options.redo)
        found_as = {"split": options.split, "download": options.download, "classnames": options.classnames}
        sets = [_with_templates(load_data(spec, **found_as), options.templates) for spec in options.data]
        loaded = load_model(options, ranks)
    rows = [("data", "images", "classes", "top-1", "top-5", "mean per class", "chance")]
    encode = image_encoder(loaded.model, options.torchcompile)
    classifiers: dict[str, Tensor] = {}  # by prompts
    for data in sets:
        key = prompts_key(data)
        what = described("zero_shot", options, loaded.described, data, prompts=key)
        record = results.find(what)
        if record is None:
            if key not in classifiers:
                classifiers[key] = _classifier(options, loaded, data, results)
            settings = EncodeSettings.of(options, data.name)
            found = classify(
                loaded.model, classifiers[key], data, loaded.preprocess, ranks=ranks, settings=settings, encode=encode
            )
            record = results.add(what, found)
        rows.append(_row(data.name, record["metrics"]))
    return results.shown(rows)


def _classifier(options: ZeroShotOptions, loaded: LoadedModel, data: LabelledImages, results: Results) -> Tensor:
    """`zero_shot_classifier`, kept in the folder of the results."""

    def make() -> dict[str, Tensor]:
        model, tokenizer, *_ = loaded
        made = zero_shot_classifier(model, tokenizer, data, ranks=results.ranks, precision=options.precision)
        return {"classifier": made}

    name = f"{digest_of([loaded.described, prompts_key(data)])}.pt"
    path = None if results.folder is None else results.folder / "classifiers" / name
    return results.kept(path, "--results", make)["classifier"]


def _with_templates(data: LabelledImages, given: str | None) -> LabelledImages:
    """With the templates of the flag in place of the data set's own."""
    if given is None:
        return data
    if given not in TEMPLATES and not Path(given).is_file():
        raise UserError(f"--templates {given} is neither a file nor one of {', '.join(TEMPLATES)}.")
    return replace(data, templates=TEMPLATES.get(given) or read_templates(Path(given)))


def _row(name: str, metrics: dict[str, float]) -> tuple[str, ...]:
    skipped = f" ({metrics['skipped']} skipped)" if metrics["skipped"] else ""
    accuracies = [f"{metrics[key]:.2%}" for key in ("top1", "top5", "mean_per_class_recall")]
    chance = f"{1 / metrics['classes']:.2%}"
    return (name, f"{metrics['num_samples']:,}{skipped}", f"{metrics['classes']:,}", *accuracies, chance)
