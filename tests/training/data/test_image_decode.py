"""Images as uint8 pixels: what OpenCLIP's transforms make of them, but for rounding."""
from __future__ import annotations

import io
import logging
import random
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import open_clip
import pytest
import torch
from benchmarks.photographs import jpeg, photograph
from open_clip.transform import image_transform
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory
from torchvision.transforms import Compose, Normalize, RandomRotation, ToTensor

from training.data import build_train_data, images
from training.data.images import Picture, Unreadable, load_rgb
from training.data.pixels import FAST, PLAIN, REDUCED, Images, Normalization, stack, to_device
from training.data.randomness import seed_globals
from training.data.samples import PairEncoding
from training.data.sets.labelled import ArrayImages
from training.data.transforms import PixelTransform, with_decoding
from training.distributed import Ranks
from training.evaluation.passes import EncodeSettings, ImagePass

from ..data_helpers import BROKEN_IMAGE, LetterTokenizer, data_args, keys, write_shard
from .sets.layout_files import encode

CPU = torch.device("cpu")
DECODERS = ["Pillow", pytest.param("simplejpeg", marks=pytest.mark.skipif(not images.simplejpeg, reason="optional"))]


@pytest.fixture(params=DECODERS)
def decoder(request, monkeypatch):
    if request.param == "Pillow":
        monkeypatch.setattr(images, "simplejpeg", None)


@pytest.fixture(scope="module")
def photographs():
    """By longer side: encoded photographs of several shapes."""
    return {size: [jpeg(photograph(seed, size)) for seed in range(count)] for size, count in ((256, 8), (1024, 4))}


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def in_levels(transform, normalized: torch.Tensor) -> torch.Tensor:
    """What a plain transform has made, as pixels from 0 to 255."""
    normalize = transform.transforms[-1]
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (normalize.mean, normalize.std))
    levels = (normalized * std + mean) * 255
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    return levels.round().long()


def differences(transform, decoding: str, pictures) -> torch.Tensor:
    """Absolute differences in levels, (n, 3, H, W), of a transform on pixels; each picture with its own randomness."""
    on_pixels, found = with_decoding(transform, decoding), []
    assert isinstance(on_pixels, PixelTransform)
    for seed, encoded in enumerate(pictures):
        seed_globals(seed)
        expected = in_levels(transform, transform(load_rgb(encoded)))
        after = random.getstate(), torch.get_rng_state()
        seed_globals(seed)
        pixels = on_pixels(encoded)
        assert pixels.dtype == torch.uint8
        assert random.getstate() == after[0] and torch.equal(torch.get_rng_state(), after[1])
        found.append((pixels.long() - expected).abs())
    return torch.stack(found)


TRANSFORMS = {
    "training": {"is_train": True},
    "strong crops": {"is_train": True, "aug_cfg": {"scale": (0.08, 1.0)}},
    "training, not square": {"is_train": True, "image_size": (160, 224)},
    "shortest": {"is_train": False},
    "shortest, not square": {"is_train": False, "image_size": (224, 160)},
    "longest": {"is_train": False, "resize_mode": "longest", "fill_color": 7},
    "squash": {"is_train": False, "resize_mode": "squash"},
    "bilinear": {"is_train": False, "interpolation": "bilinear"},
    "own normalisation": {"is_train": True, "mean": (0.5, 0.4, 0.3), "std": 0.2},
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_only_rounding_differs_from_the_plain_transform(name, photographs):
    transform = image_transform(**({"image_size": 224} | TRANSFORMS[name]))
    found = differences(transform, FAST, photographs[256] + photographs[1024][:2])
    assert found.max() <= 2
    assert (found > 1).float().mean() < 2e-5
    assert (found > 0).float().mean() < 0.02
    assert found.float().mean() < 0.02


def test_rounding_is_all_for_any_shape_and_contrast():
    """Noise of full contrast, where clipping between the two directions of the resize shows their order."""
    shapes = [(300, 60), (60, 300), (500, 130), (101, 100), (100, 102), (64, 64), (700, 260), (1, 1), (9, 500)]
    pictures = [encode(noise(*shape, seed), "PNG") for seed, shape in enumerate(shapes)]
    for is_train in (True, False):
        transform = image_transform(64, is_train, resize_mode=None if is_train else "squash")
        found = differences(transform, FAST, pictures)
        assert found.max() <= 2 and (found > 1).float().mean() < 1e-4 and (found > 0).float().mean() < 0.02


def test_changes_of_colour_draw_the_same_numbers(photographs):
    settings = {"color_jitter": (0.3, 0.3, 0.3, 0.1), "color_jitter_prob": 0.7, "gray_scale_prob": 0.5}
    with pytest.warns(UserWarning, match="Unused augmentation"):
        transform = image_transform(224, True, aug_cfg=settings)
    found = differences(transform, FAST, photographs[256])
    assert (found > 1).float().mean() < 5e-3  # a change of hue turns one level into several
    assert found.float().mean() < 0.05


def test_reduced_decoding_differs_by_little_and_only_where_it_is_used(photographs, monkeypatch):
    shrinks, pixels = [], Picture.pixels
    monkeypatch.setattr(Picture, "pixels", lambda self, shrink=1: (shrinks.append(shrink), pixels(self, shrink))[1])
    training, small = image_transform(224, is_train=True), image_transform(64, is_train=False)
    same = differences(training, FAST, photographs[256])
    assert torch.equal(differences(training, REDUCED, photographs[256]), same)
    differences(small, REDUCED, [encode(noise(300, 900), "PNG")])
    assert set(shrinks) == {1}
    shrinks.clear()
    found = differences(training, REDUCED, photographs[1024]).float()
    assert set(shrinks) == {2}
    assert 0.1 < found.mean() < 1.5 and found.square().mean().sqrt() < 4
    differences(small, REDUCED, photographs[1024])
    assert max(shrinks) >= 4


def test_transforms_with_unknown_parts_stay_as_they_are(caplog):
    caplog.set_level(logging.INFO)
    known = image_transform(32, is_train=True)
    assert with_decoding(known, PLAIN) is known
    on_pixels = with_decoding(known, FAST)
    assert with_decoding(on_pixels, REDUCED) is on_pixels
    assert repr(on_pixels) == f"fast({known!r})" and repr(with_decoding(known, REDUCED)) == f"reduced({known!r})"
    assert not caplog.records
    for transform, culprit in (
        (image_transform(32, is_train=True, aug_cfg={"use_timm": True, "re_prob": 0.3}), "RandomErasing"),
        (image_transform(32, is_train=True, aug_cfg={"use_timm": True}), "RandomResizedCropAndInterpolation"),
        (Compose([known.transforms[0], RandomRotation(5), *known.transforms[1:]]), "RandomRotation"),
        (len, "builtin_function_or_method"),
    ):
        assert with_decoding(transform, FAST) is transform
        assert culprit in caplog.messages[-1] and "--image-decode plain" in caplog.messages[-1]


# --- on the device ---


def test_normalised_on_the_device_as_before():
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    pixels = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).repeat(1, 1, 3).numpy()
    expected = Compose([ToTensor(), Normalize(mean, std)])(Image.fromarray(pixels))
    transform = SimpleNamespace(normalization=Normalization(mean, std))
    images = stack([torch.from_numpy(pixels).permute(2, 0, 1)] * 2, transform)
    batch = images.pixels
    assert batch.shape == (2, 3, 16, 16) and batch.is_contiguous(memory_format=torch.channels_last)
    before = batch.clone()
    normalized = to_device(images, CPU)
    assert normalized.dtype == torch.float32 and normalized.is_contiguous(memory_format=torch.channels_last)
    assert (normalized - expected).abs().max() <= 1e-6
    assert torch.equal(batch, before)
    half = to_device(images, CPU, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half, normalized.bfloat16())


def test_a_batch_may_hold_anything():
    class Answers(NamedTuple):
        scores: torch.Tensor
        texts: list[str]

    images, scores = stack([torch.rand(3, 4, 4, dtype=torch.float64)] * 2, len), torch.rand(2, 5)
    assert to_device(images, CPU) is images.pixels
    batch = {"image": [images, images], "key": ["a", "b"], "answers": Answers(scores, ["x"]), "more": {"n": (1, None)}}
    moved = to_device(batch, torch.device("meta"), torch.bfloat16)
    assert all(image.is_meta and image.dtype == torch.bfloat16 for image in moved["image"])
    assert moved["answers"].scores.is_meta and moved["answers"].scores.dtype == torch.float32
    assert moved["answers"].texts == ["x"] and moved["key"] == ["a", "b"] and moved["more"] == {"n": (1, None)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_the_gpu_normalises_as_the_cpu_does(dtype):
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    images = Images(pixels, Normalization((0.5, 0.4, 0.3), (0.3, 0.25, 0.2)))
    found = to_device(pin_memory(images), torch.device("cuda"), dtype)
    assert found.is_cuda and found.dtype == (dtype or torch.float32)
    expected = to_device(images, CPU, dtype)
    assert torch.allclose(found.cpu().float(), expected.float(), atol=1e-6 if dtype is None else 1e-2)


# --- decoding ---


def jpegs() -> dict[str, bytes]:
    picture = photograph(3, 200)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    return {
        "baseline": encode(picture, quality=80),
        "progressive": encode(picture, progressive=True, optimize=True),
        "444": encode(picture, subsampling=0),
        "gray": encode(picture.convert("L")),
        "odd size": encode(picture.resize((37, 61))),
        "rgb": encode(picture, keep_rgb=True),
        "turned": encode(picture, exif=exif),
        "restarts": encode(picture, restart_marker_blocks=4),
        "comments": encode(picture, comment=b"x" * 60000, icc_profile=b"y" * 100000),
    }


@pytest.mark.parametrize("kind", jpegs())
def test_jpegs_give_the_pixels_that_pil_gives(kind, decoder):
    encoded = jpegs()[kind]
    expected = load_rgb(encoded)
    picture = Picture(encoded)
    assert picture.can_shrink and (picture.height, picture.width) == (expected.height, expected.width)
    assert np.array_equal(picture.pixels(), np.asarray(expected))
    for shrink in (2, 4, 8):
        reduced = picture.pixels(shrink)
        assert reduced.shape == (-(-picture.height // shrink), -(-picture.width // shrink), 3)
        assert np.array_equal(reduced, np.asarray(load_rgb(encoded, shrink)))


def others() -> dict[str, bytes]:
    picture = photograph(4, 64)
    transparent = picture.convert("RGBA")
    transparent.putalpha(picture.convert("L"))
    deep = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) << 8)
    return {
        "cmyk": encode(picture.convert("CMYK")),
        "png": encode(picture, "PNG"),
        "palette": encode(picture.quantize(16), "PNG"),
        "alpha": encode(transparent, "PNG"),
        "gray with alpha": encode(transparent.convert("LA"), "PNG"),
        "16 bit": encode(deep, "PNG"),
        "webp": encode(picture, "WEBP"),
    }


@pytest.mark.parametrize("encoded", [pytest.param(encoded, id=kind) for kind, encoded in others().items()])
def test_other_pictures_are_decoded_as_before(encoded):
    picture = Picture(encoded)
    assert not picture.can_shrink and np.array_equal(picture.pixels(), np.asarray(load_rgb(encoded)))


def test_pictures_come_from_bytes_files_functions_and_pil(tmp_path):
    encoded = jpegs()["baseline"]
    (tmp_path / "a.jpg").write_bytes(encoded)
    sources = (encoded, str(tmp_path / "a.jpg"), lambda: encoded, lambda: Image.open(io.BytesIO(encoded)))
    for source in (*sources, load_rgb(encoded)):
        assert np.array_equal(Picture(source).pixels(), np.asarray(load_rgb(source)))
    with pytest.raises(Unreadable, match="No such file"):
        Picture(str(tmp_path / "b.jpg"))


def test_damaged_jpegs_are_used_or_refused_as_by_pil(decoder):
    good = jpegs()["baseline"]
    middle = len(good) // 2
    flipped = good[:middle] + bytes(byte ^ 0x5A for byte in good[middle : middle + 9]) + good[middle + 9 :]
    for encoded in (good + b"more", flipped, good[:middle] + b"\xff\xd9" + good[middle:]):
        assert np.array_equal(Picture(encoded).pixels(), np.asarray(load_rgb(encoded)))
    for encoded in (good[:10], good[:middle], good[:-2]):
        with pytest.raises(Unreadable, match="(?i)truncated"):
            Picture(encoded).pixels()
    for encoded in (b"", BROKEN_IMAGE, good[:2] + b"\0\0" + good[2:]):
        with pytest.raises(Unreadable, match="not an image"):
            Picture(encoded)


def test_what_pil_has_to_say_about_a_size_is_heard(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.warns(Image.DecompressionBombWarning):
        Picture(encode(noise(11, 11)))
    with pytest.raises(Unreadable, match="decompression bomb"):
        Picture(encode(noise(20, 20)))


# --- in the loader ---


def shards(folder) -> str:
    for shard in range(2):
        samples = {
            f"{shard}{n}": {"jpg": jpeg(photograph(10 * shard + n, 120)), "txt": f"caption {n}".encode()}
            for n in range(9)
        }
        samples[f"{shard}3"]["jpg"] = BROKEN_IMAGE
        samples[f"{shard}5"]["jpg"] = samples[f"{shard}5"]["jpg"][:-400]
        write_shard(folder / f"{shard}.tar", samples)
    return f"{folder}/{{0..1}}.tar"


def make_data(pattern: str, decoding: str, workers: int):
    args = data_args(train_data=pattern, train_num_samples=24, workers=workers, image_decode=decoding)
    encoding = PairEncoding(with_decoding(image_transform(32, is_train=True), decoding), LetterTokenizer())
    return build_train_data(args, encoding, rank=0, world_size=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_are_those_of_the_plain_path(tmp_path, workers):
    pattern = shards(tmp_path)
    plain_data, fast_data = (make_data(pattern, decoding, workers) for decoding in (PLAIN, FAST))
    plain, fast = list(plain_data.epoch(1)), list(fast_data.epoch(1))
    assert plain_data.report() == fast_data.report() and "unreadable image" in fast_data.report().skipped
    assert plain_data.state_dict() == fast_data.state_dict()
    assert "--image-decode fast, JPEGs decoded by" in fast_data.describe() and "JPEG" not in plain_data.describe()
    assert keys(fast) == keys(plain)
    for a, b in zip(fast, plain, strict=True):
        pixels, normalization = a["image"]
        assert pixels.dtype == torch.uint8 and pixels.is_contiguous(memory_format=torch.channels_last)
        assert b["image"].pixels.dtype == torch.float32 and b["image"].normalization is None
        levels = to_device(a["image"], CPU) - to_device(b["image"], CPU)
        levels = levels.mul(255 * torch.tensor(normalization.std).view(3, 1, 1)).abs()
        assert levels.max() < 2.1 and levels.mean() < 0.02


def test_evaluation_on_pixels_is_the_same_for_any_number_of_processes():
    data = ArrayImages(np.random.default_rng(0).integers(0, 256, (13, 40, 40, 3), dtype=np.uint8), "noise")
    plain = image_transform(32, is_train=False)
    on_pixels, settings = with_decoding(plain, FAST), EncodeSettings(batch_size=4, workers=0, precision="fp32")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 8, 8), torch.nn.Flatten())
    found = []
    for transform, world_size in ((on_pixels, 1), (on_pixels, 2), (plain, 1)):
        rows = {}
        for rank in range(world_size):
            images = ImagePass(model, data, transform, ranks=Ranks(CPU, rank, world_size=world_size), settings=settings)
            for index, outputs in images:
                rows |= dict(zip(index.tolist(), outputs, strict=True))
        found.append(torch.stack([rows[i] for i in range(len(data))]))
    assert torch.equal(found[0], found[1])
    assert torch.allclose(found[0], found[2], atol=0.02)
