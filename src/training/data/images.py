"""From an encoded picture to RGB pixels."""
from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy
from PIL import Image, UnidentifiedImageError

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
        self._data: bytes | None = None
        self._pixels: numpy.ndarray | None = None
        try:
            if callable(image):
                image = image()
            if isinstance(image, str):
                image = Path(image).read_bytes()
            size = jpeg_size(image) if isinstance(image, bytes) else None
            if size is None:
                self._pixels = numpy.array(load_rgb(image))
                size = self._pixels.shape[:2]
            else:
                self._data = image
        except Exception as error:  # PIL raises nearly anything on damaged files
            raise Unreadable.because(error) from error
        self.height, self.width = size
        self.can_shrink = self._data is not None

    def pixels(self, shrink: int = 1) -> numpy.ndarray:
        """(height, width, 3) uint8; with `shrink` (1, 2, 4 or 8) the sides are divided by it and rounded up.

        Raises: Unreadable.
        """
        if self._pixels is not None:
            assert shrink == 1
            return self._pixels
        if simplejpeg is not None:
            try:
                # The smallest of libjpeg's scales that is not below these sizes.
                sides = {"min_height": -(-self.height // shrink), "min_width": -(-self.width // shrink)}
                return simplejpeg.decode_jpeg(self._data, "RGB", **(sides if shrink > 1 else {}))
            except Exception:
                pass  # damaged: whether it is still of use is for PIL to say, as everywhere else
        try:
            return numpy.array(load_rgb(self._data, shrink))
        except Exception as error:
            raise Unreadable.because(error) from error


# Segments that may come before the size: tables, restart interval, APP0 to APP15, comment.
_SKIPPED_SEGMENTS = frozenset([0xC4, 0xCC, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE])
_SIZE_SEGMENTS = frozenset([0xC0, 0xC1, 0xC2])  # baseline, extended, progressive


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width in the header of a JPEG with 8 bits a channel, gray or of three channels.

    None for everything else (CMYK, 12 bits, damaged headers, sizes that PIL refuses or warns of, other formats).
    ITU-T T.81, annex B.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    place = 2
    while place + 9 < len(data):
        if data[place] != 0xFF:
            return None
        marker = data[place + 1]
        if marker == 0xFF:  # any number of these may fill up
            place += 1
        elif marker in _SIZE_SEGMENTS:
            height, width = struct.unpack_from(">HH", data, place + 5)
            bits, channels = data[place + 4], data[place + 9]
            limit = Image.MAX_IMAGE_PIXELS
            fits = height and width and (limit is None or height * width <= limit)
            return (height, width) if fits and bits == 8 and channels in (1, 3) else None
        elif marker in _SKIPPED_SEGMENTS:
            place += 2 + max(2, *struct.unpack_from(">H", data, place + 2))
        else:
            return None
    return None


def jpeg_decoder() -> str:
    """Which library decodes JPEGs for `Picture`, for people."""
    return "Pillow (simplejpeg, which is faster, is not installed)" if simplejpeg is None else "simplejpeg"
