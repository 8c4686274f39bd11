"""Options of every evaluation command: model, data, how to run, where results go."""
from __future__ import annotations

from dataclasses import dataclass

from .data import IMAGE_DECODE
from .kinds import COUNT, POSITIVE_COUNT, SWITCH, one_of
from .parser import Section, forbid, option
from .run import PRECISION


@dataclass
class EvaluationOptions(Section, title="model, data and results"):
    model: str | None = option(
        None, "A name that OpenCLIP knows (ELIP too), local-dir:FOLDER or hf-hub:REPOSITORY. Without it: the one that "
        "a checkpoint of this trainer names.", metavar="NAME")
    pretrained: str | None = option(
        None, "Checkpoint of this trainer or of OpenCLIP, or a tag that OpenCLIP knows.", metavar="FILE|TAG", path=True)
    force_image_size: list[int] | None = option(
        None, "Image size in pixels (one number, or height and width), not the model's.", POSITIVE_COUNT, nargs=(1, 2))
    text_tokenizer: str | None = option(
        None, "For a fusion model: a WordPiece vocabulary instead of its own, by name or folder.", metavar="NAME|DIR")
    ema: bool = option(False, "Take the averaged weights of a checkpoint of this trainer.")
    data: list[str] = option([], "Data sets (docs/evaluation_data.md).", metavar="[NAME=]PATH", nargs="+", path=True)
    download: bool = option(False, "Fetch data sets that torchvision can fetch (CIFAR, MNIST).")
    batch_size: int = option(64, "Images a process and step.", POSITIVE_COUNT)
    workers: int = option(4, "Decoding processes a process.", COUNT)
    device: str | None = option(None, "cpu, cuda or mps. Without it: cuda, or cpu where there is none.", metavar="NAME")
    precision: str | None = option(
        None, "Number format, of those of training.main. Without it: amp_bf16 with CUDA, else fp32.", PRECISION)
    vision_guided_reduction: bool = option(
        False, "Reduce the image tokens of an ELIP model as the image alone would have it: faster, not exact.")
    torchcompile: bool = option(False, "Compile the image tower with torch.compile.", spellings=("--compile",))
    image_decode: str = option("plain", "One of the ways of training.main, whose default is fast.", IMAGE_DECODE)
    on_broken: str = option("skip", "Leave images that cannot be read out, or stop.", one_of("skip", "stop"))
    results: str = option("results", "Where results go; none: nowhere.", metavar="DIR", path=True)
    redo: bool = option(False, "Do finished work again.")
    progress: bool | None = option(None, "Show progress bars. Without it: on a terminal only.", SWITCH)

    def check(self) -> None:
        forbid(not self.data, "--data is missing: name the data, as in --data imagenet=/data/imagenet.")
        forbid(not self.results, "--results is empty; name a folder, or none.")
