"""Image-text retrieval with several captions an image, in both directions: COCO, Flickr30K and the like.

    python -m training.retrieval --model ViT-B-16-ELIP --pretrained epoch_32.pt --data coco=data/coco
    torchrun --nproc_per_node 4 -m training.retrieval -- --model ViT-B-16 --pretrained openai \
        --data coco=data/coco flickr30k=data/flickr30k --equal-captions-are-hits
    python -m training.retrieval --model ALBEF-B-16 --pretrained ALBEF.pth --data coco=data/coco --rerank 256

docs/retrieval.md says what `--data` may be and what is measured.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .command import run_command
from .data.sets.captioned import CaptionOptions, load_captions
from .distributed import Ranks, end
from .errors import UserError
from .evaluation.loaded import load_model
from .evaluation.options import EvaluationOptions
from .evaluation.pairs import evaluate_captions
from .evaluation.passes import EncodeSettings
from .evaluation.rerank import RECALLS
from .evaluation.results import Results, described
from .options.kinds import FILE, POSITIVE_COUNT, one_of
from .options.parser import forbid, option

DIRECTIONS = {"TR": "image_to_text", "IR": "text_to_image"}


@dataclass
class RetrievalOptions(EvaluationOptions, title="captions", command="training.retrieval"):
    data: list[str] = option(
        [], "A data set's folder (coco=DIR, flickr30k=DIR), a JSON or CSV file of captions, or webdataset shards.",
        metavar="[NAME=]PATH", nargs="+", path=True)
    split: str | None = option(None, "Of the data set, several joined with +. Without it: test, if there are splits.")
    images: Path | None = option(
        None, "The pictures, if they are not beside the captions.", FILE, metavar="DIR", path=True)
    captions_per_image: int | None = option(
        None, "Take no more than the first N captions of each image.", POSITIVE_COUNT)
    equal_captions_are_hits: bool = option(False, "A caption is right for every image that has one with the same text.")
    rerank: int | None = option(
        None, "Of each image and each caption, rank the K nearest again by what an ALBEF or BLIP model says of "
        "each pair.",
        POSITIVE_COUNT, metavar="K")
    txt_captions: str | None = option(
        None, "What a .txt in shards is: a caption a line, or one.", one_of("lines", "whole"))
    csv_separator: str | None = option(
        None, "Of a CSV file. Without it: a tab if its header has one, else a comma.",
        needs="csv_data")
    csv_img_key: str = option("filepath", "CSV column with the images.", metavar="COLUMN", needs="csv_data")
    csv_caption_key: str = option("title", "CSV column of captions.", metavar="COLUMN", needs="csv_data")

    @property
    def csv_data(self) -> bool:
        return any(spec.lower().endswith((".csv", ".tsv")) for spec in self.data)

    def check(self) -> None:
        forbid(self.download, "--download fetches no captioned images; get the data from its site and name its folder.")
        several = self.images is not None and len(self.data) > 1
        forbid(several, f"--images is the folder of one set's pictures, but --data names {len(self.data)}; run each.")


def work(options: RetrievalOptions, ranks: Ranks) -> str:
    """Evaluates on each data set that is not finished yet; returns the table of all."""
    reading = CaptionOptions(
        split=options.split,
        images=options.images,
        per_image=options.captions_per_image,
        txt=options.txt_captions,
        csv_separator=options.csv_separator,
        csv_image_column=options.csv_img_key,
        csv_caption_column=options.csv_caption_key,
    )
    with ranks.agree():
        sets = [load_captions(spec, reading) for spec in options.data]
        results = Results(options.results, ranks, options.redo)
        loaded = load_model(options, ranks, pairs=True)
        model, tokenizer = loaded.model, loaded.tokenizer
        if options.rerank and not (hasattr(model, "match") and hasattr(model, "encode_image")):
            what = "has none" if hasattr(model, "encode_image") else "compares every pair anyhow"
            raise UserError(f"--rerank is for models with fusion layers, such as ALBEF-B-16; {options.model} {what}.")
        if hasattr(model, "caption_length"):
            tokenizer = partial(tokenizer, context_length=model.caption_length)
    rows = [["", "split", "images", "captions", *(f"{name}@{k}" for name in DIRECTIONS for k in RECALLS)]]
    own = {name: getattr(options, name) for name in ("equal_captions_are_hits", "captions_per_image")}
    if options.rerank:
        own["rerank"] = options.rerank
    for data in sets:
        what = described("retrieval", options, loaded.described, data, **own)
        record = results.find(what)
        if record is None:
            metrics, skipped = evaluate_captions(
                data, model, tokenizer, loaded.preprocess, ranks=ranks, settings=EncodeSettings.of(options, data.name),
                equal_captions_are_hits=options.equal_captions_are_hits, compiled=options.torchcompile,
                rerank_best=options.rerank,
            )  # fmt: skip
            record = results.add(what, metrics, {"skipped": skipped, "left_out": data.left_out})
        metrics = record["metrics"]
        counts = [f"{metrics[name]:,}" for name in ("num_images", "num_captions")]
        for kind, name in (("", data.name), ("reranked_", f"{data.name}, best {options.rerank} re-ranked")):
            if not kind or options.rerank:
                recalls = [metrics.get(f"{kind}{way}_R@{k}") for way in DIRECTIONS.values() for k in RECALLS]
                shown = ("-" if recall is None else f"{recall:.2%}" for recall in recalls)
                rows.append([name, data.split, *counts, *shown])
    equal = ", equal captions are hits" if options.equal_captions_are_hits else ""
    legend = f"TR: image to text, IR: text to image{equal}"
    return f"{options.model} {options.pretrained or ''}\n{results.shown(rows, legend)}"


main = partial(run_command, RetrievalOptions, work, about=__doc__)  # of an argv; returns the exit code

if __name__ == "__main__":
    end(main())
