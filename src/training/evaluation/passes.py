"""One pass over images with a model, on all processes: decode, transform, encode, in whole batches."""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from open_clip import get_input_dtype
from open_clip_train.precision import get_autocast
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.pixels import stack, to_device
from ..distributed import Ranks
from ..errors import UserError
from .metrics import gather_ordered
from ..data.sets.labelled import Images

SKIP, STOP = "skip", "stop"


@dataclass(frozen=True)
class EncodeSettings:
    """How images are read and encoded.

    Attributes:
        batch_size: images of one process in one step.
        workers: decoding processes of each process; 0 decodes in the process itself.
        precision: one of OpenCLIP's names.
        on_broken: leave a broken picture out ("skip") or end with its name ("stop").
        progress: show a progress bar on the main process.
        description: what the bar says.
    """

    batch_size: int
    workers: int
    precision: str
    on_broken: str = SKIP
    progress: bool = False
    description: str = ""


class Halving:
    """Calls a function on a batch; when the device runs out of memory, on halves of it, from then on.

    Args:
        function: maps tensors (B, ...) to a tensor (B, ...), each row by itself.
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
    text = str(error)
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in text or "out of memory" in text


class ImagePass:
    """Iterates once over images: pairs of their places (b,) int64 and the function's outputs (b, ...) on the CPU.

    Batches are `batch_size` consecutive places. They are dealt to the processes whole, so that a batch, and with it
    rounding, is the same for any number of processes.

    Args:
        function: (B, 3, H, W), on the device and in the precision's input type, to (B, ...); runs without gradients
            and under the precision's autocast.
        images: what to encode.
        transform: from an RGB picture to (3, H, W), normalised floats or (`PixelTransform`) pixels.
        ranks: this process among the others.
        settings: see `EncodeSettings`.
        rows: (n,) numbers of the images to encode; default all. Places then count in `rows`.

    Attributes:
        skipped: names of the broken pictures that this process has left out so far.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        images: Images,
        transform: Callable[[Image.Image], Tensor],
        *,
        ranks: Ranks,
        settings: EncodeSettings,
        rows: Tensor | None = None,
    ):
        self.function, self.ranks, self.settings = Halving(function), ranks, settings
        self.count = len(images) if rows is None else len(rows)
        self.decoded = _Decoded(images, transform, rows)
        self.skipped: list[str] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Raises UserError for a broken picture with `on_broken` "stop", on the process that meets it."""
        settings, device = self.settings, self.ranks.device
        autocast = get_autocast(settings.precision, device_type=device.type)
        input_dtype = get_input_dtype(settings.precision)
        batches = torch.arange(self.count).split(settings.batch_size)
        batches = batches[self.ranks.rank :: self.ranks.world_size] if self.count else ()
        loader = DataLoader(
            self.decoded,
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=min(settings.workers, len(batches)),
            collate_fn=self.decoded.collate,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # otherwise it draws from the global one, and what follows would differ
        )
        bar = tqdm(
            loader, desc=settings.description, unit="batch", leave=False,
            disable=not (settings.progress and self.ranks.is_main),
        )  # fmt: skip
        for images, index, broken in bar:
            if broken and settings.on_broken == STOP:
                name, reason = broken[0]
                raise UserError(f"{name} cannot be read ({reason}); mend it, or take --on-broken skip.")
            self.skipped += [name for name, _ in broken]
            if not len(index):
                continue
            images = to_device(images, device, input_dtype)
            with torch.inference_mode(), autocast():
                outputs = self.function(images)
            yield index, outputs.cpu()


def collect(image_pass: ImagePass) -> tuple[Tensor, Tensor, list[str]]:
    """Outputs (n, ...) of a whole pass, their places (n,) in ascending order, and the names of what was skipped.

    The same on every process; a collective call.

    Raises:
        UserError: on all processes, if no image could be read, or none may be broken and one is.
    """
    ranks, index, outputs = image_pass.ranks, [torch.empty(0, dtype=torch.int64)], []
    with ranks.agree():
        for places, values in image_pass:
            index.append(places)
            outputs.append(values)
    index = torch.cat(index)
    rows = {"outputs": torch.cat(outputs), "index": index} if outputs else {}
    gathered = gather_ordered(rows, index, ranks.world_size)
    skipped = all_skipped(image_pass)
    if not gathered:
        raise UserError(f"None of the {image_pass.count} images can be read; the first is {skipped[0]}.")
    return gathered["outputs"], gathered["index"], skipped


def all_skipped(image_pass: ImagePass) -> list[str]:
    """Names of the broken pictures that all processes have left out, with a warning if there are any. Collective."""
    skipped = sorted(name for names in image_pass.ranks.gather(image_pass.skipped) for name in names)
    if skipped and image_pass.ranks.is_main:
        shown = ", ".join(skipped[:3]) + (", ..." if len(skipped) > 3 else "")
        logging.warning(f"{len(skipped)} of {image_pass.count} images cannot be read and are left out: {shown}")
    return skipped


class _Decoded(Dataset):
    """Item i: (image (3, H, W), i), or (name, what is wrong with it)."""

    def __init__(self, images: Images, transform: Callable[[Image.Image], Tensor], rows: Tensor | None):
        self.images, self.transform, self.rows = images, transform, rows

    def __len__(self) -> int:
        return len(self.images) if self.rows is None else len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, int] | tuple[str, str]:
        row = i if self.rows is None else int(self.rows[i])
        try:
            image = self.images.load(row)
        except Exception as error:  # broken files make PIL raise almost anything, from OSError to SyntaxError
            text = str(error).splitlines()[0][:200] if str(error) else ""
            return self.images.name(row), f"{type(error).__name__}: {text}" if text else type(error).__name__
        return self.transform(image), i

    def collate(self, samples: Sequence[tuple]) -> tuple[NamedTuple | None, Tensor, list[tuple[str, str]]]:
        """Images (B, 3, H, W) and places (B,) of the good samples, and the broken ones."""
        good = [sample for sample in samples if not isinstance(sample[0], str)]
        images = stack([image for image, _ in good], self.transform) if good else None
        index = torch.tensor([i for _, i in good], dtype=torch.int64)
        return images, index, [sample for sample in samples if isinstance(sample[0], str)]
