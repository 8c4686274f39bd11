"""What the tests of captioned image sets have in common."""

import json

import pytest

from training.data.sets.captioned import CaptionOptions, load_captions
from training.errors import UserError

from .layout_files import encoded, write_folder


def write_images(root, names, mode="RGB"):
    write_folder(root, {name: picture(10 * number % 256, mode=mode) for number, name in enumerate(names)})


def picture(number, format="JPEG", mode="RGB"):
    return encoded((number,) * 3 if mode == "RGB" else number, format, mode, size=(8, 6))


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def load(spec, **options):
    return load_captions(str(spec), CaptionOptions(**options))


def contents(data):
    """Image name and captions of each image."""
    captions = [[] for _ in range(len(data))]
    for caption, image in zip(data.captions, data.image_of.tolist(), strict=True):
        captions[image].append(caption)
    return [(data.images.name(i), texts) for i, texts in enumerate(captions)]


def names(data, root):
    return [name.removeprefix(f"{root}/") for name, _ in contents(data)]


def refused(spec, message, **options):
    with pytest.raises(UserError) as error:
        load(spec, **options)
    assert message in str(error.value), str(error.value)
    assert "\n" not in str(error.value)
