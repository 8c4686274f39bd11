"""Made-up JPEGs that decode and compress like photographs: noise in octaves, shapes with soft edges and shading."""
from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

RATIOS = (4 / 3, 3 / 2, 3 / 4, 1.0, 16 / 9)  # width / height
OCTAVE = 0.68  # amplitude of an octave against that of the next lower one
QUALITY = 90


def photograph(seed: int, long_side: int) -> Image.Image:
    """RGB, its longer side of this many pixels, everything else by chance."""
    rng = np.random.default_rng(seed)
    ratio = rng.choice(RATIOS)
    width, height = round(long_side * min(1, ratio)), round(long_side * min(1, 1 / ratio))
    pixels = np.full((height, width, 3), rng.uniform(90, 160, 3), dtype=np.float32)
    cells, amplitude = 3, 50.0
    while cells <= long_side:
        shape = [max(2, round(cells * side / long_side)) for side in (height, width)]
        octave = rng.standard_normal((*shape, 1)) + 0.35 * rng.standard_normal((*shape, 3))  # mostly gray
        planes = [Image.fromarray(octave[..., c].astype(np.float32)) for c in range(3)]
        planes = [np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in planes]
        pixels += amplitude * np.stack(planes, axis=-1)
        cells, amplitude = 2 * cells, OCTAVE * amplitude
    for _ in range(rng.integers(6, 14)):
        mask = np.asarray(_shape(rng, width, height), dtype=np.float32)[..., None] / 255
        pixels += mask * (pixels * rng.uniform(-0.8, -0.2) + rng.uniform(0, 200, 3).astype(np.float32))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _shape(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    x, y, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.03, 0.3) * max(width, height)
    if rng.random() < 0.5:
        flat = radius * rng.uniform(0.3, 1)
        draw.ellipse((x - radius, y - flat, x + radius, y + flat), fill=255)
    else:
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
        draw.polygon([(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles], fill=255)
    return mask.filter(ImageFilter.GaussianBlur(0.6))


def jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
