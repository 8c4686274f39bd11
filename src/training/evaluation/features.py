"""Image features: extracted once, on all processes, kept on disk under a key of all that matters, read in chunks."""
from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from open_clip_elip import ImageTower
from open_clip_elip.clip import TextFirst

from ..data.sets.labelled import LabelledImages
from ..errors import UserError, reason
from ..files import written_whole
from ..options.linear_probe import FEATURE_FORMATS
from .passes import ImagePass
from .results import described_data, digest_of

DTYPES = dict(zip(FEATURE_FORMATS, (torch.float32, torch.bfloat16, torch.float16), strict=True))
_ON_DISK = {torch.float32: np.float32, torch.bfloat16: np.int16, torch.float16: np.float16}  # NumPy has no bfloat16
_FORMAT = 2  # raise when features would come out differently
# Numbers in the widest intermediate result of a chunk; with 1000 classes a chunk has 16,777 rows, 64 MiB of logits.
CHUNK_NUMBERS = 2**24


class FeatureSet(NamedTuple):
    """Features and classes of a data set, or some of its rows.

    features: (M, D) of any floating type, in memory or mapped from `path`. labels: (M,) int64 on the CPU.
    rows: (n,) int64 on the CPU, increasing: the rows that are meant. skipped: names of the pictures of others.
    """

    features: Tensor
    labels: Tensor
    rows: Tensor
    skipped: Sequence[str] = ()
    path: Path | None = None


@dataclass(frozen=True)
class FeatureRows:
    """Labelled rows of one or more matrices, one matrix after the other.

    Each use of a row copies it to `device` and converts it to float32 (float64 stays), so a matrix may be larger than
    the memory. The chunks do not depend on where the matrices are: results are the same to the last bit. Labels are
    below `num_classes`. With `shift` and `scale`, (D,) on the device, a row x is given as (x - shift) / scale.
    """

    parts: Sequence[FeatureSet]
    num_classes: int
    device: torch.device
    shift: Tensor | None = None
    scale: Tensor | None = None

    def __len__(self) -> int:
        return sum(len(part.rows) for part in self.parts)

    @property
    def width(self) -> int:
        return self.parts[0].features.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.parts[0].features.dtype, torch.float32)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows in order: features (b, D) and labels (b,), on the device."""
        size = max(1, CHUNK_NUMBERS // max(self.width, self.num_classes))
        for part in self.parts:
            for rows in part.rows.split(size):
                first, last = int(rows[0]), int(rows[-1])
                if last - first == len(rows) - 1:  # side by side: no copy
                    rows = slice(first, last + 1)
                x = part.features[rows].to(self.device).to(self.dtype)
                if self.shift is not None:
                    x = (x - self.shift) / self.scale
                yield x, part.labels[rows].to(self.device)

    def standardized(self) -> FeatureRows:
        """The same rows with mean 0 and variance 1 in each column (summed in float64); a constant column becomes 0."""
        mean = sum(x.double().sum(dim=0) for x, _ in self.chunks()) / len(self)
        variance = sum((x.double() - mean).square().sum(dim=0) for x, _ in self.chunks()) / len(self)
        # What rounding leaves of a constant column must not be blown up.
        constant = variance.sqrt() <= 1e-6 * mean.abs()
        scale = variance.sqrt().masked_fill(constant, 1)
        return replace(self, shift=mean.to(self.dtype), scale=scale.to(self.dtype))


def feature_encoder(model: nn.Module, layer: str, normalize: bool, compiled: bool = False) -> Callable:
    """(B, 3, H, W) to float32 features (B, D), with all tokens; the model stays as it is.

    layer: `projected` into the space that images and texts share, or `pooled`, what is projected there; UserError if
    the image tower does not offer it. normalize: to unit length.
    """
    forward = model.encode_image if layer == "projected" else _pooled(model)

    def encode(images: Tensor) -> Tensor:
        features = forward(images).float()
        return F.normalize(features, dim=-1) if normalize else features

    return torch.compile(encode) if compiled else encode


def _pooled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    visual = model.visual
    if isinstance(visual, VisionTransformer) and visual.pool_type != "none":
        return (model.tower if isinstance(model, TextFirst) else ImageTower(visual)).pooled
    if isinstance(visual, TimmModel) and "pool" not in dict(visual.head.named_children()):
        trunk = visual.trunk
        if len(visual.head):
            return trunk
        return lambda images: trunk.forward_head(trunk.forward_features(images), pre_logits=True)
    raise UserError(
        f"The image tower of this model ({type(visual).__name__}) has no features before a projection; take --layer "
        "projected."
    )


def extract_features(
    image_pass: ImagePass,
    data: LabelledImages,
    what: dict[str, Any],
    *,
    dtype: torch.dtype,
    folder: Path,
    redo: bool = False,
) -> FeatureSet:
    """The features of `data`, from `folder` if they are there, else (or with `redo`) put there. A collective call.

    A file, in NumPy's format, is there only when it is complete: its JSON, which says what it is, is written last. It
    has a row for each picture, zeros for those that cannot be read. No process holds more than a batch of features.

    image_pass: over the pictures of `data`, with a `feature_encoder`; not begun.
    what: all that the features depend on besides the data and `dtype`, in plain types.

    Raises UserError on all processes: as `collect`, no room on the disk, or a folder that not all processes see.
    """
    ranks, settings = image_pass.ranks, image_pass.settings
    key = {"format": _FORMAT, **what, **described_data(data), "dtype": str(dtype).removeprefix("torch.")}
    words = [re.sub(r"[^\w.-]+", "_", word) for word in (data.name, data.split) if word]
    path = folder / ("-".join([*words, digest_of(key)]) + ".npy")
    described = ranks.broadcast(_described(path, key) if ranks.is_main and not redo else None)
    if described is None:
        described = _extract(image_pass, data, path, key, dtype)
    else:
        logging.info(f"{settings.description}: using the features in {path}")
    with ranks.agree(), _disk_errors(folder):
        features = torch.from_numpy(np.load(path, mmap_mode="c")).view(dtype)
        if described["skipped"] and settings.on_broken == "stop":
            raise UserError(f"{described['skipped'][0]} cannot be read; mend it, or take --on-broken skip.")
    readable = torch.ones(len(data), dtype=torch.bool)
    readable[described["unreadable"]] = False
    return FeatureSet(features, data.labels, readable.nonzero()[:, 0], described["skipped"], path)


def _extract(image_pass: ImagePass, data: LabelledImages, path: Path, key: dict[str, Any], dtype: torch.dtype) -> dict:
    """Each process writes its rows into one file, which gets its name when all have. Returns what its JSON says."""
    ranks = image_pass.ranks
    partial = ranks.broadcast(path.with_name(f".{path.name}.{os.getpid()}.partial"))
    batches = iter(image_pass)
    with ranks.agree():
        first = list(islice(batches, 1))
    width = max(ranks.gather(first[0][1].shape[1] if first else 0))
    try:
        with ranks.agree(), _disk_errors(path.parent):
            if ranks.is_main and width:
                path.parent.mkdir(parents=True, exist_ok=True)
                np.lib.format.open_memmap(partial, "w+", _ON_DISK[dtype], (len(data), width))
        with ranks.agree(), _disk_errors(path.parent):
            read = [_write(partial, *batch, data, dtype) for batch in chain(first, batches)]
        skipped = image_pass.all_skipped()
        unreadable = set(range(len(data))).difference(*chain.from_iterable(ranks.gather(read)))
        found = {"skipped": skipped, "unreadable": sorted(unreadable), "labels": data.labels.tolist()}
        with ranks.agree(), _disk_errors(path.parent):
            if ranks.is_main:
                path.with_suffix(".json").unlink(missing_ok=True)
                partial.replace(path)
                with written_whole(path.with_suffix(".json")) as file:
                    file.write(json.dumps({**key, **found}).encode())
        return found
    finally:
        if ranks.is_main:
            with suppress(OSError):
                partial.unlink()


def _write(path: Path, places: Tensor, features: Tensor, data: LabelledImages, dtype: torch.dtype) -> list[int]:
    """Writes the rows of a batch; returns their places.

    Not by a map: a full disk would end the process, and machines that share a file overwrite each other's rows.
    """
    first, last = int(places[0]), int(places[-1])
    rows = torch.zeros(last + 1 - first, features.shape[1], dtype=dtype)
    rows[places - first] = features.to(dtype)
    finite = rows.isfinite().all(dim=1)
    if not finite.all():
        name = data.images.name(first + int(finite.logical_not().nonzero()[0]))
        raise UserError(f"The features of {name} are too large for this --feature-dtype; take float32.")
    with path.open("r+b") as file:
        file.seek(np.load(path, mmap_mode="r").offset + first * rows[0].nbytes)
        file.write(rows.view(torch.uint8).numpy())
    return places.tolist()


def _described(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """What the JSON beside whole features for this key says."""
    try:
        described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        np.load(path, mmap_mode="r")
        return described if key.items() <= described.items() else None
    except (OSError, ValueError, EOFError, AttributeError):
        return None


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"Not all processes see {folder}; give a --cache folder that all machines share.") from None
    except OSError as error:
        why = reason(error)
        raise UserError(f"The features cannot be written to {folder} ({why}); give another --cache.") from None
