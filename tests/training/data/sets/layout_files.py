"""Small files in the layouts of real data sets."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.sets.labelled import LabelledImages
from training.data.sets.registry import load_data
from training.errors import UserError


def message_of(spec, **options) -> str:
    """The sentence that `load_data` fails with."""
    with pytest.raises(UserError) as error:
        load_data(str(spec), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def encode(picture: Image.Image, format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def encoded(color, format: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (4, 4)) -> bytes:
    return encode(Image.new(mode, size, color), format, **({"quality": 95} if format == "JPEG" else {}))


def write_folder(root: Path, pictures: dict[str, bytes], **texts: str) -> Path:
    """Files, and text files such as classnames.txt."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    for name, text in texts.items():
        (root / f"{name}.txt").write_text(text, encoding="utf-8")
    return root


def make_folders(root: Path, names) -> Path:
    for name in names:
        (root / str(name)).mkdir(parents=True)
    return root


def write_shard(path: Path, members: dict[str, bytes | str] | list[tuple[str, bytes | str]], format=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def contents(data: LabelledImages) -> list[tuple[str, bytes]]:
    """(class name, encoded image) of each picture in files or shards."""
    return [(data.classnames[label], data.images.content(i)) for i, label in enumerate(data.labels.tolist())]


def write_idx(path: Path, values: np.ndarray) -> Path:
    """The format of MNIST's files, gzipped if `path` says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    content = bytes((0, 0, 8, values.ndim)) + sizes + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


class _Python2Pickler(pickle._Pickler):
    """Writes texts and bytes as Python 2 did, which made the files of CIFAR."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_python2_str(self, text):
        content = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + len(content).to_bytes(4, "little") + content)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_python2_str


def write_python2_pickle(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    _Python2Pickler(buffer, protocol=2).dump(content)
    path.write_bytes(buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    return path


def write_cifar10(folder: Path, pixels: np.ndarray, labels: list[int], names: list[str]) -> Path:
    """`pixels` (6 n, 3072) go to the five batches for training and the one for testing."""
    batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for batch, data, numbers in zip(batches, np.split(pixels, 6), np.split(np.array(labels), 6), strict=True):
        content = {"batch_label": batch, "labels": numbers.tolist(), "data": data, "filenames": ["x.png"] * len(data)}
        write_python2_pickle(folder / batch, content)
    meta = {"num_cases_per_batch": len(pixels) // 6, "label_names": names, "num_vis": pixels.shape[1]}
    write_python2_pickle(folder / "batches.meta", meta)
    return folder


def write_devkit(folder: Path, synsets: dict[int, str], labels: list[int]) -> Path:
    """`data/meta.mat` and the ground truth of the ILSVRC 2012 development kit, with an inner node of WordNet."""
    from scipy.io import savemat

    (folder / "data").mkdir(parents=True)
    rows = [*synsets.items(), (1001, "n00001740")]
    table = np.empty(
        (len(rows), 1), dtype=[(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "num_children")]
    )
    for row, (number, synset) in zip(table[:, 0], rows, strict=True):
        row["ILSVRC2012_ID"], row["WNID"], row["words"], row["num_children"] = float(number), synset, "x, y", 0.0
    savemat(folder / "data" / "meta.mat", {"synsets": table})
    truth = folder / "data" / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("".join(f"{label}\n" for label in labels))
    return folder


def write_kaggle_labels(path: Path, labels: dict[int, str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageId", "PredictionString"])
        for number, synset in labels.items():
            writer.writerow([f"ILSVRC2012_val_{number:08d}", f"{synset} 85 1 499 272 {synset} 1 2 3 4"])
    return path


def write_objectnet(root: Path, folders: dict[str, str], overlap: dict[str, str], lines: list[str], order) -> Path:
    """Mappings as in objectnet-1.0; `order` has the line of each of ImageNet's classes."""
    (root / "mappings").mkdir(parents=True)
    texts = {
        "folder_to_objectnet_label.json": json.dumps(folders),
        "objectnet_to_imagenet_1k.json": json.dumps(overlap),
        "pytorch_to_imagenet_2012_id.json": json.dumps({str(i): line for i, line in enumerate(order)}),
        "imagenet_to_label_2012_v2": "".join(f"{line}\n" for line in lines),
    }
    for name, text in texts.items():
        (root / "mappings" / name).write_text(text)
    make_folders(root / "images", folders)
    return root
