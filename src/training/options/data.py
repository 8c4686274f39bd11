"""Options of image-caption pairs, and of loading any data."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .config_file import SOURCE_SEPARATOR
from .kinds import COUNT, KEY_VALUES, NOT_NEGATIVE, POSITIVE_COUNT, SEED, Kind, one_of
from .parser import Section, forbid, option

FACTORS = Kind(
    str, "a number of at least 0 for each source, joined with '::'", "F::F",
    lambda text: [NOT_NEGATIVE(factor) for factor in text.split(SOURCE_SEPARATOR)])  # fmt: skip
IMAGE_DECODE = one_of("plain", "fast", "reduced")


@dataclass
class PairOptions(Section, title="training data"):
    train_data: str | None = option(
        None, "Webdataset shards (shards/{000..999}.tar; several sources are joined with '::'), a CSV file, or JSON "
        "lists or METER's Arrow files (joined likewise). Without it nothing is trained: the model is evaluated.",
        metavar="SHARDS|FILE", path=True, joined=SOURCE_SEPARATOR,
        needs="!dataset_type=synthetic")
    train_data_upsampling_factors: str | None = option(
        None, "With --dataset-resampled: how likely a shard of each source is drawn (1::2::0.5), compared with the "
        "others; 0: never. Without it all shards are equally likely.", FACTORS, joined=SOURCE_SEPARATOR)
    train_num_samples: int | None = option(
        None, "Training samples in one epoch, where that is not noted beside the shards (sizes.json or __len__), or "
        "with --dataset-resampled.", POSITIVE_COUNT, needs="trains !csv_training_data")
    dataset_type: str = option(
        "auto", "Format of the data; auto tells it from file names; synthetic makes up pairs, without --train-data.",
        one_of("webdataset", "csv", "json", "synthetic", "auto"))
    image_root: str | None = option(
        None, "Folder that the pictures of JSON lists count from. Without it: that of each list.", metavar="DIR",
        path=True)
    dataset_resampled: bool = option(
        False, "Draw shards with replacement instead of reading each once an epoch.",
        needs="trains !csv_training_data !dataset_type=synthetic")
    shard_img_key: str | None = option(
        None, "Ending of the pictures in shards, all from the first dot on (input.jpg for KEY.input.jpg). Without it: "
        "jpg, jpeg, png or webp.", metavar="ENDING")
    shard_caption_key: str = option("txt", "Ending of the captions in shards, likewise.", metavar="ENDING")
    csv_separator: str = option(
        "\t", "What separates the columns of a CSV file; a comma if its header has no tab.",
        Kind(phrase="one character or more", allowed=bool), needs="csv_data")
    csv_img_key: str = option("filepath", "CSV column with the image files.", metavar="COLUMN", needs="csv_data")
    csv_caption_key: str = option("title", "CSV column with the captions.", metavar="COLUMN", needs="csv_data")
    image_decode: str = option(
        "fast", "How images are decoded and resized. fast: as uint8 pixels, normalised on the device; what OpenCLIP's "
        "transform makes, but for rounding. reduced: also, JPEGs much larger than needed are decoded at a fraction of "
        "their size, an approximation. plain: OpenCLIP's transform itself.", IMAGE_DECODE)
    aug_cfg: dict[str, Any] = option(
        {}, "Training augmentation: scale=(0.4,1.0) color_jitter=0.4 use_timm=True, ...", KEY_VALUES, nargs="*",
        needs="trains")

    @property
    def csv_training_data(self) -> bool:
        return self._is_csv(self.train_data)

    @property
    def csv_data(self) -> bool:
        return self._is_csv(self.train_data) or self._is_csv(getattr(self, "val_data", None))

    def _is_csv(self, path: str | None) -> bool:
        ends = str(path).lower().endswith((".csv", ".tsv"))
        return self.dataset_type == "csv" or (self.dataset_type == "auto" and ends)

    def check(self) -> None:
        if self.train_data_upsampling_factors is None:
            return
        forbid(not self.dataset_resampled, "--train-data-upsampling-factors needs --dataset-resampled.")
        factors = self.train_data_upsampling_factors.split(SOURCE_SEPARATOR)
        forbid(not any(map(float, factors)), "--train-data-upsampling-factors must not all be 0.")
        sources = self.train_data.split(SOURCE_SEPARATOR) if self.train_data else []
        count = f"{len(factors)} factor(s) for {len(sources)} source(s) in --train-data: give one for each."
        forbid(len(factors) != len(sources), f"--train-data-upsampling-factors has {count}")


@dataclass
class LoadingOptions(Section, title="loading"):
    workers: int = option(4, "Processes that load data, for each training process.", COUNT)
    stall_seconds: float = option(
        60.0, "Say what a batch waits for when it takes longer; 0: never.", NOT_NEGATIVE, needs="workers")
    seed: int = option(0, "Seed of everything that is drawn at random.", SEED)
