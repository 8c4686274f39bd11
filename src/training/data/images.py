"""From an encoded picture to RGB pixels."""
from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

try:  # optional: the same pixels as Pillow's, sooner
    import simplejpeg
except (ImportError, ValueError):  # ValueError: made for another NumPy
    simplejpeg = None

# Encoded bytes, the path of a file, or something that gives the bytes or the picture.
ImageLike = bytes | str | Callable[[], Image.Image | bytes]


class Unreadable(Exception):
    """A picture cannot be decoded. The text says why, for people."""

    @classmethod
    def because(cls, error: Exception) -> Unreadable:
        return cls("not an image" if isinstance(error, UnidentifiedImageError) else str(error) or repr(error))


def load_rgb(image: ImageLike | Image.Image, shrink: int = 1) -> Image.Image:
    """Decode completely, so that every error of a broken picture is raised here.

    Transparent parts become white; 16-bit gray keeps its high byte; everything else is converted by PIL.
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
            picture = Image.fromarray((numpy.asarray(picture) >> 8).clip(0, 255).astype(numpy.uint8))
        if picture.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = Image.new("RGB", picture.size, "white")
            white.paste(picture, mask=picture.getchannel("A"))
            return white
        return picture.convert("RGB")


class Picture:
    """An RGB picture whose size is known before it is decoded, if it is a JPEG; anything else is decoded at once.

    height, width: of the whole picture
    can_shrink: whether it can be decoded at a fraction of its size
    """

    def __init__(self, image: ImageLike | Image.Image):
        """Raises: Unreadable."""
        try:
            if callable(image):
                image = image()
            if isinstance(image, str):
                image = Path(image).read_bytes()
            self.can_shrink = False
            if isinstance(image, bytes):
                self._data, image = image, Image.open(io.BytesIO(image))
                self.can_shrink = isinstance(image, JpegImageFile) and image.mode in ("L", "RGB")
            self.width, self.height = image.size
            if not self.can_shrink:
                self._pixels = numpy.array(load_rgb(image))
        except Exception as error:  # PIL raises nearly anything on damaged files
            raise Unreadable.because(error) from error

    def pixels(self, shrink: int = 1) -> numpy.ndarray:
        """(height, width, 3) uint8; with `shrink` (1, 2, 4 or 8) the sides are divided by it and rounded up.

        Raises: Unreadable.
        """
        if not self.can_shrink:
            assert shrink == 1
            return self._pixels
        if simplejpeg is not None:
            # The smallest of libjpeg's scales that is not below these sizes.
            sides = {"min_height": -(-self.height // shrink), "min_width": -(-self.width // shrink)}
            with suppress(Exception):  # damaged: whether it is still of use is for PIL to say, as everywhere else
                return simplejpeg.decode_jpeg(self._data, "RGB", **(sides if shrink > 1 else {}))
        try:
            return numpy.array(load_rgb(self._data, shrink))
        except Exception as error:
            raise Unreadable.because(error) from error


def jpeg_decoder() -> str:
    """Which library decodes JPEGs for `Picture`, for people."""
    return "Pillow (simplejpeg, which is faster, is not installed)" if simplejpeg is None else "simplejpeg"
