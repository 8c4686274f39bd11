"""From an encoded picture to RGB pixels."""
from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from ..errors import reason

try:  # optional: the same pixels as Pillow's, sooner
    import simplejpeg
except (ImportError, ValueError):  # ValueError: made for another NumPy
    simplejpeg = None

# Encoded bytes, the path of a file, or something that gives the bytes or the picture.
ImageLike = bytes | str | Callable[[], Image.Image | bytes]


class Unreadable(Exception):
    """A picture cannot be decoded. The text says why, for people."""


@contextmanager
def decoding() -> Iterator[None]:
    """Whatever is raised in here becomes `Unreadable`: PIL raises nearly anything on damaged files."""
    try:
        yield
    except Exception as error:
        raise Unreadable("not an image" if isinstance(error, UnidentifiedImageError) else reason(error)) from error


def load_rgb(image: ImageLike | Image.Image, shrink: int = 1) -> Image.Image:
    """Decode completely, so that every error of a broken picture is raised here; whatever PIL raises.

    Transparent parts become white; 16-bit gray keeps its high byte, or the low one if there is nothing above it;
    everything else is converted by PIL.
    shrink: 2, 4 or 8 decodes a JPEG to a half, a quarter or an eighth of its sides, rounded up
    """
    if callable(image):
        image = image()
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    with image if isinstance(image, Image.Image) else Image.open(image) as picture:
        if shrink > 1:
            picture.draft(None, (picture.width // shrink, picture.height // shrink))
        picture.load()
        if picture.mode.startswith("I"):  # PIL would clip these to white
            deep = numpy.asarray(picture)
            picture = Image.fromarray((deep >> 8 * (deep.max() > 255)).clip(0, 255).astype(numpy.uint8))
        if picture.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = Image.new("RGB", picture.size, "white")
            white.paste(picture, mask=picture.getchannel("A"))
            return white
        return picture.convert("RGB")


class Picture:
    """An RGB picture whose `height` and `width` are known before it is decoded. Raises: Unreadable."""

    def __init__(self, image: ImageLike | Image.Image):
        with decoding():
            if callable(image):
                image = image()
            self._encoded = Path(image).read_bytes() if isinstance(image, str) else image
            if isinstance(self._encoded, bytes):
                image = Image.open(io.BytesIO(self._encoded))
            self.width, self.height = image.size
            is_jpeg = self._encoded is not image and isinstance(image, JpegImageFile)
            self.can_shrink = is_jpeg and image.mode in ("L", "RGB")

    def pixels(self, shrink: int = 1) -> numpy.ndarray:
        """(height, width, 3) uint8; with `shrink` (1, 2, 4 or 8) the sides are divided by it and rounded up."""
        if self.can_shrink and simplejpeg is not None:
            # The smallest of libjpeg's scales that is not below these sizes.
            sides = {"min_height": -(-self.height // shrink), "min_width": -(-self.width // shrink)}
            with suppress(Exception):  # damaged: whether it is still of use is for PIL to say, as everywhere else
                return simplejpeg.decode_jpeg(self._encoded, "RGB", **(sides if shrink > 1 else {}))
        with decoding():
            return numpy.array(load_rgb(self._encoded, shrink))
