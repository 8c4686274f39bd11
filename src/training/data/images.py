"""From an encoded picture to RGB pixels."""

import io
from collections.abc import Callable

import numpy
from PIL import Image

# Encoded bytes, the path of a file, or something that makes the picture.
ImageLike = bytes | str | Callable[[], Image.Image]


def load_rgb(image: ImageLike) -> Image.Image:
    """Decode completely, so that every error of a broken picture is raised here.

    Transparent parts become white; 16-bit gray keeps its high byte; everything else is converted by PIL.
    """
    if isinstance(image, bytes):
        picture = Image.open(io.BytesIO(image))
    elif isinstance(image, str):
        picture = Image.open(image)
    else:
        picture = image()
    with picture:
        picture.load()
        if picture.mode.startswith("I"):  # PIL would clip these to white
            picture = Image.fromarray((numpy.asarray(picture) >> 8).clip(0, 255).astype(numpy.uint8))
        if picture.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = Image.new("RGB", picture.size, "white")
            white.paste(picture, mask=picture.getchannel("A"))
            return white
        return picture.convert("RGB")
