"""Image-text retrieval with several captions an image, in both directions: COCO, Flickr30K and the like.

    python -m training.retrieval --model ViT-B-16-ELIP --pretrained epoch_32.pt --data coco=data/coco
    torchrun --nproc_per_node 4 -m training.retrieval -- --model ViT-B-16 --pretrained openai \
        --data coco=data/coco flickr30k=data/flickr30k --equal-captions-are-hits

docs/retrieval.md says what `--data` may be and what is measured.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from open_clip_train.precision import get_autocast
from torch import Tensor
from tqdm import tqdm

from .command import run_command
from .distributed import Ranks, end
from .evaluation.options import EvaluationOptions
from .options.parser import FILE, POSITIVE_COUNT, forbid, one_of, option
from .data.sets.captioned import CaptionedImages, CaptionOptions, load_captions
from .evaluation.command import (
    LoadedModel,
    described,
    encode_settings,
    image_encoder,
    load_model,
    open_results,
    table,
)
from .evaluation.passes import EncodeSettings, Halving, ImagePass, collect
from .evaluation.metrics import caption_retrieval_metrics, gather_ordered

DIRECTIONS = {"TR": "image_to_text", "IR": "text_to_image"}


def evaluate_retrieval(
    data: CaptionedImages,
    encode_image: Callable[[Tensor], Tensor],
    encode_text: Callable[[Tensor], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    preprocess: Callable,
    *,
    ranks: Ranks,
    settings: EncodeSettings,
    equal_captions_are_hits: bool = False,
) -> tuple[dict[str, float], list[str]]:
    """Retrieval in both directions, the same on every process and for every number of processes; collective.

    Args:
        encode_image: (B, 3, H, W) to normalized float32 features (B, D); it never sees a caption.
        encode_text: tokens (B, T) to normalized float32 features (B, D).
        equal_captions_are_hits: a caption is right for every image that has one with the same text, see
            `CaptionedImages.same_text`.

    Returns:
        The metrics of `caption_retrieval_metrics`, `num_images` and `num_captions`; and the names of the images that
        cannot be read, which are left out with their captions.

    Raises:
        UserError: as `collect`.
    """
    bar = settings.description
    image_pass = ImagePass(
        encode_image, data.images, preprocess, ranks=ranks, settings=replace(settings, description=f"{bar} images")
    )
    image, kept, skipped = collect(image_pass)
    text = encode_captions(
        encode_text, tokenizer, data.captions, ranks=ranks, settings=replace(settings, description=f"{bar} captions")
    )
    metrics = None
    if ranks.is_main:  # only there: on another kind of device the last digits could differ
        row_of = torch.full((len(data),), -1)
        row_of[kept] = torch.arange(len(kept))
        image_of = row_of[data.image_of]
        good = image_of >= 0
        texts = data.same_text()[good] if equal_captions_are_hits else None
        features = (image, text[good], image_of[good], texts)
        metrics = {
            **caption_retrieval_metrics(*(None if rows is None else rows.to(ranks.device) for rows in features)),
            "num_images": len(image),
            "num_captions": int(good.sum()),
        }
    return ranks.broadcast(metrics), skipped


def encode_captions(
    encode_text: Callable[[Tensor], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    captions: Sequence[str],
    *,
    ranks: Ranks,
    settings: EncodeSettings,
) -> Tensor:
    """(N, D) features of N >= 1 captions on the CPU, the same on every process; collective.

    As with images, whole batches of consecutive captions go to a process, so that rounding is the same for any number
    of processes, and running out of memory halves them.
    """
    autocast = get_autocast(settings.precision, device_type=ranks.device.type)
    batches = torch.arange(len(captions)).split(settings.batch_size)[ranks.rank :: ranks.world_size]
    encode = Halving(encode_text)
    features = []
    show = settings.progress and ranks.is_main
    for batch in tqdm(batches, desc=settings.description, unit="batch", leave=False, disable=not show):
        tokens = tokenizer([captions[i] for i in batch]).to(ranks.device)
        with torch.inference_mode(), autocast():
            features.append(encode(tokens).cpu())
    index = torch.cat(batches) if batches else torch.empty(0, dtype=torch.int64)
    rows = {"text": torch.cat(features)} if features else {}
    return gather_ordered(rows, index, ranks.world_size)["text"]


# ---------------------------------------------------------------------------------------------------- command line


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
    txt_captions: str | None = option(
        None, "What a .txt in shards is: a caption a line, or one.", one_of("lines", "whole"))
    csv_separator: str | None = option(None, "Of a CSV file. Without it: a tab if its header has one, else a comma.")
    csv_img_key: str = option("filepath", "CSV column with the images.", metavar="COLUMN")
    csv_caption_key: str = option("title", "CSV column of captions.", metavar="COLUMN")

    def check(self) -> None:
        forbid(self.download, "--download fetches no captioned images; get the data from its site and name its folder.")
        several = self.images is not None and len(self.data) > 1
        forbid(several, f"--images is the folder of one set's pictures, but --data names {len(self.data)}; run each.")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one sentence on stderr."""
    return run_command(RetrievalOptions, _work, argv, __doc__)


def _work(args: RetrievalOptions, ranks: Ranks) -> str:
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
        results = open_results(args, ranks)
        loaded = load_model(args, ranks)
    rows = [["", "split", "images", "captions", *(f"{name}@{k}" for name in DIRECTIONS for k in (1, 5, 10))]]
    for data in sets:
        what = _what(args, loaded, data)
        record = results.find(what) or results.add(what, *_evaluate(args, ranks, loaded, data))
        metrics = record["metrics"]
        recalls = [metrics[f"{direction}_R@{k}"] for direction in DIRECTIONS.values() for k in (1, 5, 10)]
        counts = [f"{metrics[name]:,}" for name in ("num_images", "num_captions")]
        rows.append([data.name, data.split, *counts, *(f"{recall:.2%}" for recall in recalls)])
    equal = ", equal captions are hits" if args.equal_captions_are_hits else ""
    return f"{loaded.name} {loaded.pretrained or ''}\n{table(rows)}\nTR: image to text, IR: text to image{equal}"


def _what(args: RetrievalOptions, loaded: LoadedModel, data: CaptionedImages) -> dict:
    what = described(args, "retrieval", loaded)
    own = {
        "equal_captions_are_hits": args.equal_captions_are_hits,
        "captions_per_image": args.captions_per_image,
    }
    return {
        **what,
        "data": data.name,
        "split": data.split,
        "data_fingerprint": data.fingerprint(),
        "settings": {**what["settings"], **own},
    }


def _evaluate(
    args: RetrievalOptions, ranks: Ranks, loaded: LoadedModel, data: CaptionedImages
) -> tuple[dict[str, float], dict]:
    """The metrics of a result, and what else is kept with it."""

    def encode_text(tokens: Tensor) -> Tensor:
        return loaded.model.encode_text(tokens, normalize=True).float()

    metrics, skipped = evaluate_retrieval(
        data,
        image_encoder(loaded.model, args, normalize=True),
        encode_text,
        loaded.tokenizer,
        loaded.preprocess,
        ranks=ranks,
        settings=encode_settings(args, data.name),
        equal_captions_are_hits=args.equal_captions_are_hits,
    )
    return metrics, {"skipped": skipped, "left_out": data.left_out}


if __name__ == "__main__":
    end(main())
