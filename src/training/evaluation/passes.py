"""The one pass of every evaluation: whole batches on all processes, halved when memory runs out, gathered in order."""
from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from open_clip import get_input_dtype
from open_clip_train.precision import get_autocast
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.pixels import Images, stack, to_device
from ..data.sets.labelled import Images as ImageSet
from ..distributed import Ranks
from ..errors import UserError, reason


class NotFinite(UserError):
    """What a model makes of some input is no number; the sentence names the input."""


@dataclass(frozen=True)
class EncodeSettings:
    """How images and texts are read and encoded; `batch_size` and `workers` are those of one process.

    on_broken: a broken picture is left out ("skip"), or ends the pass with its name ("stop"). progress: show a bar.
    """

    batch_size: int
    workers: int
    precision: str
    on_broken: str = "skip"
    progress: bool = False
    description: str = ""

    @classmethod
    def of(cls, options: Any, description: str) -> EncodeSettings:
        """As the options of a command have them; a progress bar on a terminal, unless they say."""
        progress = sys.stderr.isatty() if options.progress is None else options.progress
        options = (options.batch_size, options.workers, options.precision, options.on_broken)
        return cls(*options, progress, description)


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, out of any nesting of DistributedDataParallel and `torch.compile`."""
    for wrapped in ("_orig_mod", "module"):
        inner = getattr(model, wrapped, None)
        if isinstance(inner, nn.Module):
            return unwrap(inner)
    return model


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """The unwrapped model in eval mode without gradients; afterwards each of its modules is in its earlier mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield unwrap(model)
    finally:
        for module, training in modes:
            module.training = training


def image_encoder(model: nn.Module, compiled: bool = False) -> Callable[[Tensor], Tensor]:
    """(B, 3, H, W) to normalized float32 image features (B, D), with all tokens."""

    def encode(images: Tensor) -> Tensor:
        return model.encode_image(images, normalize=True).float()

    return torch.compile(encode) if compiled else encode


class Halving:
    """A function of tensors (B, ...), row by row, called on half of a batch once the device runs out of memory."""

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        self.limit = sys.maxsize  # rows that may fit

    def __call__(self, *batch: Tensor) -> Tensor:
        while True:
            rows = min(len(batch[0]), self.limit)
            try:
                parts = zip(*(tensor.split(rows) for tensor in batch), strict=True)
                return torch.cat([self.function(*part) for part in parts])
            except RuntimeError as error:
                no_memory = any(words in str(error) for words in ("out of memory", "can't allocate memory"))
                if not no_memory or rows <= 1:
                    raise
            # Outside of the except block, where the error still holds the tensors of the failed call.
            self.limit = (rows + 1) // 2
            logging.warning(f"Out of memory with a batch of {rows}; going on with {self.limit}.")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def run_pass(
    function: Callable[..., Tensor],
    batches: Iterable[tuple[Tensor, Sequence[Tensor]]],
    *,
    ranks: Ranks,
    precision: str,
    name: Callable[[int], str],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Places (b,) int64 and the function's rows (b, ...) on the CPU, batch by batch; NotFinite for a row that is none.

    function: see `Halving`; runs without gradients and under the precision's autocast.
    batches: this process's: places in the whole set, and the function's arguments.
    name: what the row of a place is called, such as "the features of a/b.png".
    """
    autocast = get_autocast(precision, device_type=ranks.device.type)
    function = Halving(function)
    for places, arguments in batches:
        with torch.inference_mode(), autocast():
            rows = function(*arguments).cpu()
        check_finite(rows, places, name)
        yield places, rows


def check_finite(rows: Tensor, places: Tensor, name: Callable[[int], str]) -> None:
    """Raises NotFinite with the name of the first row (b, ...) that has a NaN or is infinite."""
    finite = rows.isfinite().reshape(len(rows), -1).all(dim=1)
    if not finite.all():
        what = name(int(places[~finite][0]))
        raise NotFinite(f"{what[0].upper()}{what[1:]} are not finite; take --precision fp32, or other weights.")


def gather_rows(batches: Iterable[tuple[Tensor, Tensor]], ranks: Ranks) -> tuple[Tensor, Tensor | None]:
    """Places (n,) in ascending order and rows (n, ...) of all processes; None for rows if there are none.

    The same on every process; a collective call, in which a `UserError` of one process is raised on all.
    """
    mine = []
    with ranks.agree():
        mine += batches
    parts = [part for some in ranks.gather(mine) for part in some]
    if not parts:
        return torch.empty(0, dtype=torch.int64), None
    places, rows = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    order = places.argsort()
    return places[order], rows[order]


def deal(count: int, batch_size: int, ranks: Ranks) -> Sequence[Tensor]:
    """Places of this process's batches: dealt whole, so that rounding is the same for any number of processes."""
    return torch.arange(count).split(batch_size)[ranks.rank :: ranks.world_size]


def bar(batches: Iterable, ranks: Ranks, settings: EncodeSettings) -> Iterable:
    shown = settings.progress and ranks.is_main
    return tqdm(batches, desc=settings.description, unit="batch", leave=False, disable=not shown)


@dataclass
class ImagePass:
    """Iterates once over this process's share of images; see `run_pass`.

    function: (B, 3, H, W), on the device and in the precision's input type, to (B, ...).
    transform: from an RGB picture to (3, H, W), normalised floats or (`PixelTransform`) pixels.
    skipped: names of the broken pictures that this process has left out so far.
    """

    function: Callable[[Tensor], Tensor]
    images: ImageSet
    transform: Callable[[Image.Image], Tensor]
    ranks: Ranks
    settings: EncodeSettings
    skipped: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return run_pass(
            self.function, self._batches(), ranks=self.ranks, precision=self.settings.precision,
            name=lambda place: f"the features of {self.images.name(place)}",
        )  # fmt: skip

    def _batches(self) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
        settings, device = self.settings, self.ranks.device
        batches = deal(len(self.images), settings.batch_size, self.ranks)
        loader = DataLoader(
            _Batches(self.images, self.transform, batches),
            batch_size=None,
            num_workers=min(settings.workers, len(batches)),
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # otherwise it draws from the global one, and what follows would differ
        )
        for images, places, broken in bar(loader, self.ranks, settings):
            if broken and settings.on_broken == "stop":
                name, why = broken[0]
                raise UserError(f"{name} cannot be read ({why}); mend it, or take --on-broken skip.")
            self.skipped += [name for name, _ in broken]
            if len(places):
                yield places, (to_device(images, device, get_input_dtype(settings.precision)),)

    def all_skipped(self) -> list[str]:
        """What all processes have skipped, with a warning if that is any. Collective; UserError if it is everything."""
        count = len(self.images)
        skipped = sorted(name for names in self.ranks.gather(self.skipped) for name in names)
        if len(skipped) == count:
            raise UserError(f"None of the {count} images can be read; the first is {skipped[0]}.")
        if skipped and self.ranks.is_main:
            shown = ", ".join(skipped[:3]) + (", ..." if len(skipped) > 3 else "")
            logging.warning(f"{len(skipped)} of {count} images cannot be read and are left out: {shown}")
        return skipped


@dataclass
class _Batches(Dataset):
    """Item k: of the k-th batch the images that can be read and their places, and (name, why) of the others."""

    images: ImageSet
    transform: Callable[[Image.Image], Tensor]
    batches: Sequence[Tensor]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k: int) -> tuple[Images | None, Tensor, list[tuple[str, str]]]:
        good, places, broken = [], [], []
        for place in self.batches[k].tolist():
            try:
                image = self.images.load(place)
            except Exception as error:  # broken files make PIL raise almost anything, from OSError to SyntaxError
                broken.append((self.images.name(place), f"{type(error).__name__}: {reason(error)}"))
            else:
                good.append(self.transform(image))
                places.append(place)
        return stack(good, self.transform) if good else None, torch.tensor(places, dtype=torch.int64), broken


def collect(image_pass: ImagePass) -> tuple[Tensor, Tensor, list[str]]:
    """Rows (n, ...) of a whole pass, their places (n,) in ascending order, and the names of what was skipped.

    The same on every process; a collective call. UserError: no image can be read, or one is broken and none may be.
    """
    places, rows = gather_rows(image_pass, image_pass.ranks)
    return rows, places, image_pass.all_skipped()


def encode_places(
    function: Callable[[Tensor], Tensor], count: int, name: Callable[[int], str], ranks: Ranks, settings: EncodeSettings
) -> Tensor:
    """Rows (count, ...) of a function of places (b,), as of `run_pass`, on the CPU of every process. Collective."""
    batches = ((places, (places,)) for places in bar(deal(count, settings.batch_size, ranks), ranks, settings))
    return gather_rows(run_pass(function, batches, ranks=ranks, precision=settings.precision, name=name), ranks)[1]
