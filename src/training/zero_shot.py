"""Zero-shot classification: the class whose prompts are nearest to the image wins.

    python -m training.zero_shot --model ViT-B-16-ELIP --pretrained epoch_32.pt --data imagenet=/data/imagenet
    torchrun --nproc_per_node 4 -m training.zero_shot --model ViT-B-16 --pretrained openai \\
        --data imagenet=/data/imagenet imagenet-v2=/data/imagenet-v2 imagenet-r=/data/imagenet-r cifar10=/data
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import open_clip
from torch import Tensor

from .data.sets.folders import read_lines, read_templates
from .data.sets.labelled import LabelledImages
from .data.sets.registry import load_data
from .distributed import Ranks, end
from .errors import UserError
from .evaluation.command import LoadedModel, Parser, add_common_options, load_model, run_command
from .evaluation.passes import EncodeSettings, check_weights, image_encoder
from .evaluation.prompts import classify, prompts_key, zero_shot_classifier
from .evaluation.results import Results, described, described_model, digest_of, keep, read_kept

TEMPLATES = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one sentence on stderr."""
    return run_command(_parser(), work, argv)


def work(args: argparse.Namespace, ranks: Ranks) -> str:
    """Evaluates on each data set that is not finished yet; returns the table of all."""
    with ranks.agree():
        results = Results.of(args, ranks)
        sets = [_with_prompts(load_data(spec, split=args.split, download=args.download), args) for spec in args.data]
        loaded = load_model(args, ranks)
        check_weights(loaded.model, loaded.name)
    rows = [("data", "images", "classes", "top-1", "top-5", "mean per class", "chance")]
    encode = image_encoder(loaded.model, args.compile)
    classifiers: dict[str, Tensor] = {}  # by prompts
    for data in sets:
        key = prompts_key(data)
        what = described("zero_shot", args, loaded, data, prompts=key)
        record = results.find(what)
        if record is None:
            if key not in classifiers:
                classifiers[key] = _classifier(args, loaded, data, results, ranks)
            settings = EncodeSettings.of(args, data.name)
            found = classify(
                loaded.model, classifiers[key], data, loaded.preprocess, ranks=ranks, settings=settings, encode=encode
            )
            record = results.add(what, found)
        rows.append(_row(data.name, record["metrics"]))
    return results.shown(rows)


def _classifier(
    args: argparse.Namespace, loaded: LoadedModel, data: LabelledImages, results: Results, ranks: Ranks
) -> Tensor:
    """`zero_shot_classifier`, kept in the folder of the results."""
    model, path, kept = described_model(args, loaded), None, None
    if results.folder is not None:
        key = digest_of([*(model[name] for name in ("model", "weights", "identity", "precision")), prompts_key(data)])
        path = results.folder / "classifiers" / f"{key}.pt"
        kept = read_kept(path, ranks, results.redo)
    if kept is not None:
        return kept["classifier"]
    classifier = zero_shot_classifier(loaded.model, loaded.tokenizer, data, ranks=ranks, precision=args.precision)
    if path is not None:
        keep({"classifier": classifier}, path, ranks, "--results")
    return classifier


def _with_prompts(data: LabelledImages, args: argparse.Namespace) -> LabelledImages:
    """With the names and templates of the flags in place of the data set's own."""
    if args.classnames is not None:
        if not args.classnames.is_file():
            raise UserError(f"There is no file {args.classnames}; check --classnames.")
        names = read_lines(args.classnames)
        if len(names) != len(data.classnames):
            raise UserError(f"{args.classnames} names {len(names)} classes; {data.name} has {len(data.classnames)}.")
        data = replace(data, classnames=names)
    if args.templates is not None:
        if args.templates not in TEMPLATES and not Path(args.templates).is_file():
            raise UserError(f"--templates {args.templates} is neither a file nor one of {', '.join(TEMPLATES)}.")
        templates = TEMPLATES.get(args.templates) or read_templates(Path(args.templates))
        data = replace(data, templates=templates)
    return data


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
    parser.add_argument("--classnames", type=Path, metavar="FILE", help="names, one a line, instead of the data's own")
    return parser


if __name__ == "__main__":
    end(main())
