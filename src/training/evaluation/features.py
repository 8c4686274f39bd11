"""Image features of a data set: extracted once, on all processes, and kept on disk under a key of all that matters."""
from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from open_clip_elip import ImageTower
from open_clip_elip.clip import Shortcuts

from ..data.sets.labelled import LabelledImages
from ..errors import UserError, reason
from ..files import written_whole
from .feature_rows import FeatureSet
from .passes import STOP, ImagePass
from .results import described_data, digest_of

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ON_DISK = {torch.float32: np.float32, torch.bfloat16: np.int16, torch.float16: np.float16}  # NumPy has no bfloat16
_FORMAT = 2  # raise when features would come out differently


def feature_encoder(model: nn.Module, layer: str, normalize: bool, compiled: bool = False) -> Callable:
    """(B, 3, H, W) to float32 features (B, D), with all tokens; the model stays as it is.

    layer: `projected` into the space that images and texts share, or `pooled`, what is projected there (CLIP's probes
    use these); UserError if the image tower does not offer it. normalize: to unit length.
    """
    forward = model.encode_image if layer == "projected" else _pooled(model)

    def encode(images: Tensor) -> Tensor:
        features = forward(images).float()
        return F.normalize(features, dim=-1) if normalize else features

    return torch.compile(encode) if compiled else encode


def _pooled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    visual = model.visual
    if isinstance(visual, VisionTransformer) and visual.pool_type != "none":
        return (model.tower if isinstance(model, Shortcuts) else ImageTower(visual)).pooled
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
    """The features of `data`, from `folder` if they are there, else computed and put there. A collective call.

    A file, in NumPy's format, is there only when it is complete: its JSON, which says what it is, is written last. It
    has a row for each picture, zeros for those that cannot be read. No process holds more than a batch of features.

    Args:
        image_pass: over the pictures of `data`, with a `feature_encoder`; not begun.
        what: all that the features depend on besides the data and `dtype`, in plain types.
        redo: compute them anew.

    Raises:
        UserError: on all processes: no picture can be read, one is broken and none may be (`settings.on_broken`),
            features that are not finite, no room on the disk, or a folder that not all processes see.
    """
    ranks, settings = image_pass.ranks, image_pass.settings
    key = {"format": _FORMAT, **what, **described_data(data), "dtype": str(dtype).removeprefix("torch.")}
    words = [re.sub(r"[^\w.-]+", "_", word) for word in (data.name, data.split) if word]
    path = folder / ("-".join([*words, digest_of(key)]) + ".npy")
    with ranks.agree():
        found = ranks.broadcast(ranks.is_main and not redo and _is_complete(path, key))
    if found:
        log.info(f"{settings.description}: using the features in {path}")
    else:
        _extract(image_pass, data, path, key, dtype)
    with ranks.agree(), _disk_errors(folder):
        described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        features = torch.from_numpy(np.load(path, mmap_mode="c")).view(dtype)
        if described["skipped"] and settings.on_broken == STOP:
            raise UserError(f"{described['skipped'][0]} cannot be read; mend it, or take --on-broken skip.")
    readable = torch.ones(len(data), dtype=torch.bool)
    readable[described["unreadable"]] = False
    return FeatureSet(features, data.labels, readable.nonzero()[:, 0], described["skipped"], path)


def _extract(image_pass: ImagePass, data: LabelledImages, path: Path, key: dict[str, Any], dtype: torch.dtype) -> None:
    """Each process writes its rows into one file, which gets its name when all have."""
    ranks = image_pass.ranks
    partial = ranks.broadcast(path.with_name(f".{path.name}.{os.getpid()}.partial"))
    try:
        batches = iter(image_pass)
        with ranks.agree():
            first = next(batches, None)
        width = max(ranks.gather(0 if first is None else first[1].shape[1]))
        with ranks.agree(), _disk_errors(path.parent):
            if ranks.is_main and width:
                path.parent.mkdir(parents=True, exist_ok=True)
                needed, free = len(data) * width * dtype.itemsize, shutil.disk_usage(path.parent).free
                if free < needed:
                    raise UserError(
                        f"The features need {needed / 1e9:.1f} GB in {path.parent}, but {free / 1e9:.1f} GB are free; "
                        "give another --cache, or --feature-dtype bf16."
                    )
                np.lib.format.open_memmap(partial, "w+", _ON_DISK[dtype], (len(data), width))
        places = torch.empty(0, dtype=torch.int64)
        with ranks.agree(), _disk_errors(path.parent):
            if first is not None:
                places = _write_rows(partial, chain([first], batches), data, dtype)
        skipped = image_pass.all_skipped()
        unreadable = sorted(set(range(len(data))).difference(*(part.tolist() for part in ranks.gather(places))))
        more = {"skipped": skipped, "unreadable": unreadable, "labels": data.labels.tolist()}
        with ranks.agree(), _disk_errors(path.parent):
            if ranks.is_main:
                path.with_suffix(".json").unlink(missing_ok=True)
                partial.replace(path)
                with written_whole(path.with_suffix(".json")) as file:
                    file.write(json.dumps({**key, **more}).encode())
    finally:
        if ranks.is_main:
            with suppress(OSError):
                partial.unlink()


def _write_rows(
    path: Path, batches: Iterable[tuple[Tensor, Tensor]], data: LabelledImages, dtype: torch.dtype
) -> Tensor:
    """The places of the rows.

    They are written, not mapped: there a full disk would end the process, and machines that share a file by pages would
    overwrite each other's rows.
    """
    begin, written = np.load(path, mmap_mode="r").offset, []
    with path.open("r+b") as file:
        for places, features in batches:
            first, last = int(places[0]), int(places[-1])
            rows = torch.zeros(last + 1 - first, features.shape[1], dtype=dtype)
            rows[places - first] = features.to(dtype)
            finite = rows.isfinite().all(dim=1)
            if not finite.all():
                name = data.images.name(first + int(finite.logical_not().nonzero()[0]))
                raise UserError(f"The features of {name} are too large for this --feature-dtype; take float32.")
            file.seek(begin + first * rows[0].nbytes)
            file.write(rows.view(torch.uint8).numpy())
            written.append(places)
    return torch.cat(written)


def _is_complete(path: Path, key: dict[str, Any]) -> bool:
    try:
        described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        np.load(path, mmap_mode="r")
        return key.items() <= described.items()
    except (OSError, ValueError, EOFError, AttributeError):
        return False


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"Not all processes see {folder}; give a --cache folder that all machines share.") from None
    except OSError as error:
        why = reason(error)
        raise UserError(f"The features cannot be written to {folder} ({why}); give another --cache.") from None
