"""Image features of a data set: extracted once, on all processes, and kept on disk under a key of all that matters."""
from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal

import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from open_clip_elip import ImageTower
from open_clip_elip.clip import Shortcuts

from ..distributed import Ranks
from ..errors import UserError
from ..files import written_whole
from .command import LoadedModel
from .passes import STOP, EncodeSettings, ImagePass, all_skipped
from ..data.sets.labelled import LabelledImages

log = logging.getLogger(__name__)

Layer = Literal["pooled", "projected"]
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
_ASSEMBLED_ROWS = 2**16  # rows in memory while the file is put together
_FORMAT = 1  # raise when features would come out differently


@dataclass(frozen=True)
class FeatureSet:
    """Features and classes of the readable pictures of a data set.

    Attributes:
        features: (n, D), mapped from the file: read when they are used.
        labels: (n,) int64.
        places: (n,) int64, ascending: where the pictures are in the data set.
        skipped: names of the pictures that could not be read.
        path: the safetensors file, with these three tensors.
    """

    features: Tensor
    labels: Tensor
    places: Tensor
    skipped: Sequence[str]
    path: Path


def feature_encoder(model: nn.Module, layer: Layer, normalize: bool, compiled: bool = False) -> Callable:
    """(B, 3, H, W) to float32 features (B, D), with all tokens; the model stays as it is.

    layer: `projected` into the space that images and texts share, or `pooled`, what is projected there (CLIP's probes
        use these). normalize: to unit length.

    Raises:
        UserError: the image tower does not offer that layer.
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
    loaded: LoadedModel,
    data: LabelledImages,
    *,
    layer: Layer,
    normalize: bool,
    dtype: torch.dtype,
    cache: Path,
    ranks: Ranks,
    settings: EncodeSettings,
    compiled: bool = False,
) -> FeatureSet:
    """The features of `data`, from `cache` if they are there, else computed and put there. A collective call.

    A file is there only when it is complete. No process holds more than a batch of features, and the main one
    `_ASSEMBLED_ROWS` rows, at a time; while they are put together the disk has them twice.

    Raises:
        UserError: on all processes: no picture can be read, one is broken and none may be (`settings.on_broken`),
            features that are not finite, no room on the disk, or a folder that not all processes see.
    """
    key = {
        "format": _FORMAT,
        "model": loaded.name,
        "weights": loaded.weights_hash,
        "data": data.name,
        "split": data.split,
        "data_fingerprint": data.fingerprint(),
        "transform": re.sub(r" at 0x[0-9a-f]+", "", loaded.transform_key),
        "layer": layer,
        "normalize": normalize,
        "precision": settings.precision,
        "vision_guided": hasattr(loaded.model, "tower") and loaded.model.tower.vision_guided,
        "dtype": str(dtype).removeprefix("torch."),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    words = [re.sub(r"[^\w.-]+", "_", word) for word in (data.name, data.split) if word]
    path = cache / ("-".join([*words, digest]) + ".safetensors")
    with ranks.agree():
        encoder = feature_encoder(loaded.model, layer, normalize, compiled)
        found = ranks.broadcast(ranks.is_main and _is_complete(path, key))
    if found:
        log.info(f"{settings.description}: using the features in {path}")
    else:
        _extract(encoder, loaded, data, path, key, dtype, ranks, settings)
    with ranks.agree():
        result = _open(path)
        if result.skipped and settings.on_broken == STOP:
            raise UserError(f"{result.skipped[0]} cannot be read; mend it, or take --on-broken skip.")
    return result


def _extract(
    encoder: Callable,
    loaded: LoadedModel,
    data: LabelledImages,
    path: Path,
    key: dict[str, Any],
    dtype: torch.dtype,
    ranks: Ranks,
    settings: EncodeSettings,
) -> None:
    """Each process writes its rows to a part of its own; then the main one puts them in order into one file."""
    image_pass = ImagePass(encoder, data.images, loaded.preprocess, ranks=ranks, settings=settings)
    folder = None
    try:
        with ranks.agree(), _disk_errors(path.parent):
            if ranks.is_main:
                path.parent.mkdir(parents=True, exist_ok=True)
                folder = Path(tempfile.mkdtemp(prefix=f"{path.stem}.", suffix=".partial", dir=path.parent))
        folder = ranks.broadcast(folder)
        with ranks.agree(), _disk_errors(path.parent), (folder / str(ranks.rank)).open("wb") as file:
            places, width = _write_part(file, image_pass, data, dtype)
        places, widths = ranks.gather(places), ranks.gather(width)
        skipped = all_skipped(image_pass)
        if not sum(map(len, places)):
            raise UserError(f"None of the {len(data)} images can be read; the first is {skipped[0]}.")
        with ranks.agree(), _disk_errors(path.parent):
            if ranks.is_main:
                parts = [_read_part(folder / str(rank), dtype, max(widths)) for rank in range(ranks.world_size)]
                _assemble(path, parts, places, data.labels)
                text = json.dumps({**key, "images": len(data), "skipped": skipped}, indent=2)
                with written_whole(path.with_suffix(".json")) as file:
                    file.write(text.encode())
    finally:
        if ranks.is_main and folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _write_part(
    file: IO[bytes], image_pass: ImagePass, data: LabelledImages, dtype: torch.dtype
) -> tuple[Tensor, int]:
    """Writes this process's features one after the other; their places in `data`, and D (0 if there are none)."""
    places, width = [torch.empty(0, dtype=torch.int64)], 0
    for index, features in image_pass:
        features = features.to(dtype)
        if not width:
            width = features.shape[1]
            _check_room(Path(file.name).parent, 2 * len(data) * width * dtype.itemsize)
        finite = features.isfinite().all(dim=1)
        if not finite.all():
            raise UserError(
                f"The features of {data.images.name(int(index[~finite][0]))} are not finite; take --precision fp32 "
                "and --feature-dtype float32, or other weights."
            )
        file.write(_bytes(features))
        places.append(index)
    return torch.cat(places), width


def _read_part(path: Path, dtype: torch.dtype, width: int) -> Tensor:
    """(n, D), mapped."""
    size = path.stat().st_size // dtype.itemsize
    # An empty file cannot be mapped.
    flat = torch.from_file(str(path), shared=False, size=size, dtype=dtype) if size else torch.empty(0, dtype=dtype)
    return flat.view(-1, width)


def _assemble(path: Path, parts: Sequence[Tensor], places: Sequence[Tensor], labels: Tensor) -> None:
    """One file with the rows of all parts in the order of their places, and with places and labels."""
    rank = torch.cat([torch.full_like(mine, i) for i, mine in enumerate(places)])
    row = torch.cat([torch.arange(len(mine)) for mine in places])
    place, order = torch.cat(list(places)).sort()
    rank, row = rank[order], row[order]

    def features() -> Iterator[Tensor]:
        for start in range(0, len(place), _ASSEMBLED_ROWS):
            stop = min(start + _ASSEMBLED_ROWS, len(place))
            rows = parts[0].new_empty(stop - start, parts[0].shape[1])
            for i, part in enumerate(parts):
                mine = (rank[start:stop] == i).nonzero()[:, 0]
                rows[mine] = part[row[start + mine]]
            yield rows

    shapes = {
        "features": (parts[0].dtype, [len(place), parts[0].shape[1]]),
        "labels": (torch.int64, [len(place)]),
        "places": (torch.int64, [len(place)]),
    }
    header, offset = {}, 0
    for name, (dtype, shape) in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    # Features aligned as in memory: matrix products on the CPU round differently according to this.
    text += b" " * (-(8 + len(text)) % 64)
    rows = chain(features(), [labels[place], place])
    with written_whole(path) as file:
        file.writelines(chain([len(text).to_bytes(8, "little"), text], map(_bytes, rows)))


def _is_complete(path: Path, key: dict[str, Any]) -> bool:
    """The JSON is written after the features."""
    try:
        described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        with safe_open(path, "pt"):
            return key.items() <= described.items()
    except (OSError, ValueError, AttributeError, SafetensorError):
        return False


def _open(path: Path) -> FeatureSet:
    try:
        described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        with safe_open(path, "pt") as file:
            tensors = [file.get_tensor(name) for name in ("features", "labels", "places")]
    except FileNotFoundError:
        raise UserError(f"Not all processes see {path}; give a --cache folder that all machines share.") from None
    return FeatureSet(*tensors, described["skipped"], path)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"The features need {needed / 1e9:.1f} GB in {folder.parent} while they are written, but {free / 1e9:.1f} "
            "GB are free; give another --cache, or --feature-dtype bf16."
        )


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"Not all processes see {folder}; give a --cache folder that all machines share.") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"The features cannot be written to {folder} ({reason}); give another --cache.") from None
