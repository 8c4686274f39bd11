"""The one pass of every evaluation: whole batches on all processes, halved when memory runs out, gathered in order."""
from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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

SKIP, STOP = "skip", "stop"


class NotFinite(UserError):
    """What a model makes of some input is no number; the sentence names the input."""


@dataclass(frozen=True)
class EncodeSettings:
    """How images and texts are read and encoded.

    `batch_size` and `workers` (0 decodes in the process itself) are those of one process. With `on_broken` a broken
    picture is left out ("skip") or ends the pass with its name ("stop"). `description` is what the progress bar says.
    """

    batch_size: int
    workers: int
    precision: str
    on_broken: str = SKIP
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


def check_weights(model: nn.Module, name: str) -> None:
    """Raises NotFinite with the name of the first tensor that has a NaN or is infinite."""
    for key, value in model.state_dict().items():
        if not value.isfinite().all():
            raise NotFinite(f"The weights of {name} are not finite (the first is {key}); take those of another step.")


class Halving:
    """Calls a function on a batch; when the device runs out of memory, on halves of it, from then on.

    The function maps tensors (B, ...) to a tensor (B, ...), each row by itself.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        self.limit: int | None = None  # rows that are known to fit, once the memory has run out

    def __call__(self, *batch: Tensor) -> Tensor:
        while True:
            rows = min(len(batch[0]), self.limit or len(batch[0]))
            try:
                parts = zip(*(tensor.split(rows) for tensor in batch), strict=True)
                return torch.cat([self.function(*part) for part in parts])
            except RuntimeError as error:
                if not out_of_memory(error) or rows <= 1:
                    raise
            # Outside of the except block, where the error still holds the tensors of the failed call.
            self.limit = (rows + 1) // 2
            logging.warning(f"Out of memory with a batch of {rows}; going on with {self.limit}.")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def out_of_memory(error: RuntimeError) -> bool:
    return any(words in str(error) for words in ("out of memory", "can't allocate memory"))


def run_pass(
    function: Callable[..., Tensor],
    batches: Iterable[tuple[Tensor, Sequence[Tensor]]],
    *,
    ranks: Ranks,
    precision: str,
    name: Callable[[int], str],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Places (b,) int64 and the function's rows (b, ...) on the CPU, batch by batch.

    function: see `Halving`; runs without gradients and under the precision's autocast.
    batches: this process's: places in the whole set, and the function's arguments.
    name: what the row of a place is called, such as "the features of a/b.png".

    Raises NotFinite for a row with a NaN or an infinite number.
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
    places, rows = [torch.empty(0, dtype=torch.int64)], []
    with ranks.agree():
        for index, values in batches:
            places.append(index)
            rows.append(values)
    parts = ranks.gather((torch.cat(places), torch.cat(rows) if rows else None))
    places = torch.cat([part for part, _ in parts])
    order = places.argsort()
    rows = [part for _, part in parts if part is not None]
    return places[order], torch.cat(rows)[order] if rows else None


def deal(count: int, batch_size: int, ranks: Ranks) -> Sequence[Tensor]:
    """Places of this process's batches, each of `batch_size` consecutive ones.

    Batches are dealt whole, so that a batch, and with it rounding, is the same for any number of processes.
    """
    return torch.arange(count).split(batch_size)[ranks.rank :: ranks.world_size] if count else ()


def bar(batches: Iterable, ranks: Ranks, settings: EncodeSettings) -> Iterable:
    shown = settings.progress and ranks.is_main
    return tqdm(batches, desc=settings.description, unit="batch", leave=False, disable=not shown)


class ImagePass:
    """Iterates once over this process's share of images; see `run_pass`.

    function: (B, 3, H, W), on the device and in the precision's input type, to (B, ...).
    transform: from an RGB picture to (3, H, W), normalised floats or (`PixelTransform`) pixels.
    skipped: names of the broken pictures that this process has left out so far.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        images: ImageSet,
        transform: Callable[[Image.Image], Tensor],
        *,
        ranks: Ranks,
        settings: EncodeSettings,
    ):
        self.function, self.images, self.transform = function, images, transform
        self.ranks, self.settings = ranks, settings
        self.skipped: list[str] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Raises UserError for a broken picture with `on_broken` "stop", on the process that meets it."""

        def name(place: int) -> str:
            return f"the features of {self.images.name(place)}"

        precision = self.settings.precision
        return run_pass(self.function, self._batches(), ranks=self.ranks, precision=precision, name=name)

    def _batches(self) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
        settings, device = self.settings, self.ranks.device
        input_dtype = get_input_dtype(settings.precision)
        batches = deal(len(self.images), settings.batch_size, self.ranks)
        loader = DataLoader(
            _Decoded(self.images, self.transform),
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=min(settings.workers, len(batches)),
            collate_fn=partial(_collate, transform=self.transform),
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # otherwise it draws from the global one, and what follows would differ
        )
        for images, index, broken in bar(loader, self.ranks, settings):
            if broken and settings.on_broken == STOP:
                name, why = broken[0]
                raise UserError(f"{name} cannot be read ({why}); mend it, or take --on-broken skip.")
            self.skipped += [name for name, _ in broken]
            if len(index):
                yield index, (to_device(images, device, input_dtype),)

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


def collect(
    image_pass: ImagePass, then: Callable[[Tensor, Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor, list[str]]:
    """Rows (n, ...) of a whole pass, their places (n,) in ascending order, and the names of what was skipped.

    The same on every process; a collective call. `then` makes of the rows of a batch and their places what is kept.

    Raises UserError, on all processes, if no image could be read, or none may be broken and one is.
    """
    batches = image_pass if then is None else ((places, then(rows, places)) for places, rows in image_pass)
    places, rows = gather_rows(batches, image_pass.ranks)
    return rows, places, image_pass.all_skipped()


def encode_texts(
    function: Callable[[Tensor], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    texts: Sequence[str],
    *,
    ranks: Ranks,
    settings: EncodeSettings,
) -> Tensor:
    """(N, D) features of N >= 1 texts, by a `function` of tokens (B, T); on the CPU of every process. Collective."""

    def batches() -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
        for places in bar(deal(len(texts), settings.batch_size, ranks), ranks, settings):
            yield places, (tokenizer([texts[i] for i in places]).to(ranks.device),)

    def name(place: int) -> str:
        return f"the features of the text {texts[place]!r}"

    return gather_rows(run_pass(function, batches(), ranks=ranks, precision=settings.precision, name=name), ranks)[1]


class _Decoded(Dataset):
    """Item i: (image (3, H, W), i), or (name, what is wrong with it)."""

    def __init__(self, images: ImageSet, transform: Callable[[Image.Image], Tensor]):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int] | tuple[str, str]:
        try:
            image = self.images.load(i)
        except Exception as error:  # broken files make PIL raise almost anything, from OSError to SyntaxError
            return self.images.name(i), f"{type(error).__name__}: {reason(error)}"
        return self.transform(image), i


def _collate(samples: Sequence[tuple], transform: Callable) -> tuple[Images | None, Tensor, list[tuple[str, str]]]:
    """Images and places (B,) of the good samples, and the broken ones."""
    good = [sample for sample in samples if not isinstance(sample[0], str)]
    images = stack([image for image, _ in good], transform) if good else None
    index = torch.tensor([i for _, i in good], dtype=torch.int64)
    return images, index, [sample for sample in samples if isinstance(sample[0], str)]
