"""Options of writing captions."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .evaluation import EvaluationOptions
from .kinds import FILE, FRACTION, POSITIVE, POSITIVE_COUNT, SEED
from .parser import forbid, option

PROMPT = "a picture of "


@dataclass
class CaptionCommandOptions(EvaluationOptions, title="captions", command="training.caption"):
    data: list[str] = option(
        [], "Pictures: files, folders, shards, or images with captions as training.retrieval takes them.",
        metavar="[NAME=]PATH", nargs="+", path=True, spellings=("--image",))
    split: str | None = option(None, "Of a data set with captions. Without it: test, if there are splits.")
    images: Path | None = option(
        None, "The pictures, if they are not beside the captions.", FILE, metavar="DIR", path=True)
    out: str | None = option(
        None, "Where the captions go: .csv, or JSON as COCO's server takes it. Without it: they are printed.",
        metavar="FILE", path=True)
    prompt: str = option(PROMPT, "What each caption begins with, without being written.", metavar="TEXT")
    beams: int = option(3, "Texts that are followed at a time; 1: the likeliest word each time.", POSITIVE_COUNT)
    longest: int = option(20, "Most tokens, start and prompt included.", POSITIVE_COUNT)
    shortest: int = option(5, "Fewest tokens before the end, start and prompt included.", POSITIVE_COUNT)
    repetition_penalty: float = option(1.0, "Above 1 a word is less likely to come again.", POSITIVE)
    nucleus: float | None = option(
        None, "Draw each word from the likeliest ones that together have this probability; 0.9 is usual.", FRACTION)
    seed: int = option(0, "Of the draws.", SEED, needs="nucleus")
    score: bool = option(False, "Compare with the captions that the images have: BLEU, METEOR, ROUGE-L, CIDEr.")
    spice: bool = option(False, "SPICE too, which fetches a large model the first time.", needs="score")

    def check(self) -> None:
        forbid(self.download, "--download fetches no pictures; name their folder.")
        unused = self.vision_guided_reduction
        forbid(unused, "Captions are written from all tokens of an image: leave out --vision-guided-reduction.")
