"""Options of image-text retrieval."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .evaluation import EvaluationOptions
from .kinds import FILE, POSITIVE_COUNT, one_of
from .parser import forbid, option


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
