"""Image-text retrieval with several captions an image, in both directions: COCO, Flickr30K and the like.

    python -m training.retrieval --model ViT-B-16-ELIP --pretrained epoch_32.pt --data coco=data/coco
    torchrun --nproc_per_node 4 -m training.retrieval -- --model ViT-B-16 --pretrained openai \
        --data coco=data/coco flickr30k=data/flickr30k --equal-captions-are-hits

docs/retrieval.md says what `--data` may be and what is measured.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from .data.sets.captioned import CaptionedImages, CaptionOptions, load_captions
from .distributed import Ranks, end
from .errors import UserError
from .evaluation.command import LoadedModel, Parser, add_common_options, load_model, run_command
from .evaluation.pairs import evaluate_captions
from .evaluation.passes import EncodeSettings, check_weights, image_encoder
from .evaluation.results import Results, described

DIRECTIONS = {"TR": "image_to_text", "IR": "text_to_image"}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one sentence on stderr."""
    return run_command(_parser(), work, argv)


def work(args: argparse.Namespace, ranks: Ranks) -> str:
    if args.download:
        raise UserError("--download fetches no captioned images; get the data from its site and name its folder.")
    if args.captions_per_image is not None and args.captions_per_image < 1:
        raise UserError(f"--captions-per-image must be at least 1, not {args.captions_per_image}.")
    if args.images is not None and len(args.data) > 1:
        raise UserError(f"--images is the folder of one set's pictures, but --data names {len(args.data)}; run each.")
    options = CaptionOptions(
        split=args.split,
        images=args.images,
        per_image=args.captions_per_image,
        txt=args.txt_captions,
        csv_separator=args.csv_separator,
        csv_image_column=args.csv_img_key,
        csv_caption_column=args.csv_caption_key,
    )
    with ranks.agree():
        sets = [load_captions(spec, options) for spec in args.data]
        results = Results.of(args, ranks)
        loaded = load_model(args, ranks)
        check_weights(loaded.model, loaded.name)
    rows = [["", "split", "images", "captions", *(f"{name}@{k}" for name in DIRECTIONS for k in (1, 5, 10))]]
    for data in sets:
        own = ("equal_captions_are_hits", "captions_per_image")
        what = described("retrieval", args, loaded, data, **{name: getattr(args, name) for name in own})
        record = results.find(what) or results.add(what, *_evaluate(args, ranks, loaded, data))
        metrics = record["metrics"]
        recalls = [metrics[f"{direction}_R@{k}"] for direction in DIRECTIONS.values() for k in (1, 5, 10)]
        counts = [f"{metrics[name]:,}" for name in ("num_images", "num_captions")]
        rows.append([data.name, data.split, *counts, *(f"{recall:.2%}" for recall in recalls)])
    equal = ", equal captions are hits" if args.equal_captions_are_hits else ""
    legend = f"TR: image to text, IR: text to image{equal}"
    return f"{loaded.name} {loaded.pretrained or ''}\n{results.shown(rows, legend)}"


def _evaluate(
    args: argparse.Namespace, ranks: Ranks, loaded: LoadedModel, data: CaptionedImages
) -> tuple[dict[str, float], dict]:
    """The metrics of a result, and what else is kept with it."""

    def encode_text(tokens: Tensor) -> Tensor:
        return loaded.model.encode_text(tokens, normalize=True).float()

    metrics, skipped = evaluate_captions(
        data, image_encoder(loaded.model, args.compile), encode_text, loaded.tokenizer, loaded.preprocess,
        ranks=ranks, settings=EncodeSettings.of(args, data.name), equal_captions_are_hits=args.equal_captions_are_hits,
    )  # fmt: skip
    return metrics, {"skipped": skipped, "left_out": data.left_out}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m training.retrieval", description=__doc__.partition("\n")[0])
    add_common_options(
        parser,
        data_help="a data set's folder (coco=DIR, flickr30k=DIR), a JSON or CSV file of captions, or webdataset shards",
    )
    add = parser.add_argument
    add("--split", help="of the data set, several joined with + (default: test, where there are splits)")
    add("--images", type=Path, metavar="DIR", help="the pictures, if they are not beside the captions")
    add("--captions-per-image", type=int, metavar="N", help="take no more than the first N captions of each image")
    add(
        "--equal-captions-are-hits", action="store_true",
        help="a caption is right for every image that has one with the same text",
    )  # fmt: skip
    add("--txt-captions", choices=["lines", "whole"], help="what a .txt in shards is: a caption a line, or one")
    add("--csv-separator", metavar="TEXT", help="of a CSV file (default: a tab if its header has one, else a comma)")
    add("--csv-img-key", default="filepath", metavar="COLUMN", help="CSV column with the images (default: %(default)s)")
    add("--csv-caption-key", default="title", metavar="COLUMN", help="CSV column of captions (default: %(default)s)")
    return parser


if __name__ == "__main__":
    end(main())
