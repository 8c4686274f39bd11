"""The work of `training.retrieval`."""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..data.sets.captioned import CaptionOptions, load_captions
from ..distributed import Ranks
from ..errors import UserError
from ..evaluation.loaded import load_model
from ..evaluation.pairs import evaluate_captions
from ..evaluation.passes import EncodeSettings
from ..evaluation.rerank import RECALLS
from ..evaluation.results import Results, described
from ..options.retrieval import RetrievalOptions

DIRECTIONS = {"TR": "image_to_text", "IR": "text_to_image"}


def work(options: RetrievalOptions, ranks: Ranks, argv: Sequence[str]) -> str:
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
