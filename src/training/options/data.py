"""Options of image-caption pairs, and of loading any data."""
from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .config_file import SOURCE_SEPARATOR
from .parser import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE_COUNT,
    SEED,
    Kind,
    Section,
    forbid,
    key_values,
    one_of,
    option,
)  # fmt: skip

IMAGE_DECODE = one_of("plain", "fast", "reduced")


@dataclass
class PairOptions(Section, title="training data"):
    train_data: str | None = option(
        None, "Webdataset shards (shards/{000..999}.tar; several sources are joined with '::'), or a CSV file. Without "
        "it nothing is trained: the model is evaluated.", metavar="SHARDS|FILE.csv", path=True, joined=SOURCE_SEPARATOR)
    train_data_upsampling_factors: str | None = option(
        None, "One weight for each source of --train-data (1::2::0.5): how likely a shard of the source is drawn, "
        "compared with the others; 0: the source is not read. Needs --dataset-resampled. Without it all shards are "
        "equally likely.",
        metavar="F::F", joined=SOURCE_SEPARATOR)
    train_num_samples: int | None = option(
        None, "Training samples in one epoch. Needed for shards whose sizes are not noted beside them (sizes.json or "
        "__len__), and to set the epoch's length with --dataset-resampled.", POSITIVE_COUNT)
    dataset_type: str = option(
        "auto", "Format of the data; auto tells it from the file names. synthetic makes up its pairs and needs no "
        "--train-data.", one_of("webdataset", "csv", "synthetic", "auto"))
    dataset_resampled: bool = option(False, "Draw shards with replacement instead of reading each once an epoch.")
    csv_separator: str = option("\t", "What separates the columns of a CSV file.")
    csv_img_key: str = option("filepath", "Name of the CSV column with the image files.", metavar="COLUMN")
    csv_caption_key: str = option("title", "Name of the CSV column with the captions.", metavar="COLUMN")
    image_decode: str = option(
        "fast", "How images are decoded and resized. fast: as uint8 pixels, normalised on the device; what OpenCLIP's "
        "transform makes, but for rounding. reduced: also, JPEGs that are much larger than needed are decoded at a "
        "fraction of their size, an approximation. plain: OpenCLIP's transform itself.", IMAGE_DECODE)
    aug_cfg: dict[str, Any] = option(
        {}, "Training augmentation, for instance scale=(0.4,1.0) color_jitter=0.4 use_timm=True.",
        Kind(str, "KEY=VALUE", key_values), nargs="*")

    def check(self) -> None:
        if self.train_data_upsampling_factors is None:
            return
        forbid(not self.dataset_resampled, "--train-data-upsampling-factors needs --dataset-resampled.")
        factors = self.train_data_upsampling_factors.split(SOURCE_SEPARATOR)
        for factor in factors:
            try:
                NOT_NEGATIVE.convert(factor)
            except argparse.ArgumentTypeError as error:
                raise UserError(f"Every one of --train-data-upsampling-factors {error}.") from None
        forbid(not any(map(float, factors)), "--train-data-upsampling-factors must not all be 0.")
        sources = self.train_data.split(SOURCE_SEPARATOR) if self.train_data else []
        count = f"{len(factors)} factor(s) for {len(sources)} source(s) in --train-data: give one for each."
        forbid(len(factors) != len(sources), f"--train-data-upsampling-factors has {count}")


@dataclass
class LoadingOptions(Section, title="loading"):
    workers: int = option(4, "Processes that load data, for each training process.", COUNT)
    stall_seconds: float = option(
        60.0, "Say which worker and shard is waited for when a batch takes longer than this; 0: never.", NOT_NEGATIVE)
    seed: int = option(0, "Seed of everything that is drawn at random.", SEED)
