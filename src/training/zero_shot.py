"""Zero-shot classification of labelled images: the class whose prompts are nearest to the image wins.

    python -m training.zero_shot --model ViT-B-16-ELIP --pretrained epoch_32.pt --data imagenet/val
    torchrun --nproc_per_node 4 -m training.zero_shot --model ViT-B-16 --pretrained openai --data shards --json out.json
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist
from open_clip_train.precision import get_autocast
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .data.images import load_rgb
from .distributed import Ranks, init_ranks, launch_rank
from .errors import EXIT_USER_ERROR, UserError
from .evaluate import evaluation_mode
from .log import setup_logging
from .metrics import gather_ordered, mean_per_class_recall, predictions, topk_accuracy

DEFAULT_TEMPLATES = ("a photo of a {}.",)
FOLDER_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
SHARD_IMAGES = ("jpg", "jpeg", "png", "webp")
IMAGENET_V2_FOLDERS = ("ImageNetV2-matched-frequency", "imagenetv2-matched-frequency-format-val")
CLASSES_PER_BATCH = 10  # prompts of this many classes go through the text tower together


@dataclass(frozen=True)
class Picture:
    """Where the bytes of an image are (a whole file, or a range of a tar file) and its class."""

    path: Path
    label: int
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class LabelledImages:
    """Images with classes; nothing is decoded yet.

    pictures: in a fixed order, the same on every process. classnames: one name a class, `Picture.label` counts them.
    templates: prompts with "{}" for the class name, or functions of it.
    """

    pictures: Sequence[Picture]
    classnames: Sequence[str]
    templates: Sequence[str] | Sequence[Callable[[str], str]] = DEFAULT_TEMPLATES

    @classmethod
    def imagenet_val(cls, folder: str | Path) -> LabelledImages:
        """A folder of 1000 class folders whose sorted names (synsets) are in the order of ImageNet's classes."""
        return cls._imagenet(folder, _class_folders(Path(folder)))

    @classmethod
    def imagenet_v2(cls, folder: str | Path) -> LabelledImages:
        """Folders named 0 to 999, the class numbers, in `folder` or in the matched-frequency folder in it."""
        folder = next((p for name in IMAGENET_V2_FOLDERS if (p := Path(folder, name)).is_dir()), Path(folder))
        folders = _class_folders(folder)
        wrong = next((f.name for i, f in enumerate(folders) if f.name != str(i)), None)
        if wrong is not None:
            raise UserError(f"{folder} is not ImageNet-V2: its folders must be named 0 to 999, but there is {wrong}.")
        return cls._imagenet(folder, folders)

    @classmethod
    def from_folder(cls, folder: str | Path) -> LabelledImages:
        """Whatever `folder` holds: webdataset shards, class folders with names, ImageNet or ImageNet-V2.

        - `*.tar` with samples of `cls` (class number) and a png, jpg, jpeg or webp, and `classnames.txt`;
        - one folder a class, and `classnames.txt`: a name for each folder in sorted order (by number if all folders are
          numbers, else by text), or lines `folder<TAB>name`;
        - the same without `classnames.txt`, if the folders are ImageNet's synsets or ImageNet-V2's 0 to 999.

        `classnames.txt` has one name a line; `templates.txt`, if there, one prompt a line with {} for the name.

        Raises UserError for anything else, and where the numbers of classes differ.
        """
        folder = Path(folder)
        shards = sorted(folder.glob("*.tar"))
        folders = _class_folders(folder, required=not shards)
        if not (folder / "classnames.txt").is_file():
            if folders and not shards and all(re.fullmatch(r"n\d{8}", f.name) for f in folders):
                return cls.imagenet_val(folder)
            if folders and not shards and [f.name for f in folders] == [str(i) for i in range(1000)]:
                return cls.imagenet_v2(folder)
            raise UserError(f"{folder} has no classnames.txt; write one with the name of one class a line.")
        lines = _lines(folder / "classnames.txt")
        templates = _templates(folder / "templates.txt")
        if shards:
            return cls(_shard_pictures(shards, len(lines)), lines, templates)
        return cls(_folder_pictures(folder, folders), _folder_names(folder, folders, lines), templates)

    @classmethod
    def _imagenet(cls, folder: str | Path, folders: list[Path]) -> LabelledImages:
        names = open_clip.IMAGENET_CLASSNAMES
        if len(folders) != len(names):
            raise UserError(f"{folder} has {len(folders)} class folders, but ImageNet has {len(names)} classes.")
        return cls(_folder_pictures(folder, folders), names, open_clip.OPENAI_IMAGENET_TEMPLATES)


def load_zero_shot_data(args: argparse.Namespace) -> dict[str, LabelledImages]:
    """The data sets of `--imagenet-val`, `--imagenet-v2` and `--zeroshot-data` that are set, by metric prefix.

    Lists files without decoding any; UserError for bad ones, so that a run can fail before it trains.
    """
    sources = {
        "imagenet-zeroshot": (args.imagenet_val, LabelledImages.imagenet_val),
        "imagenetv2-zeroshot": (args.imagenet_v2, LabelledImages.imagenet_v2),
        "zeroshot": (args.zeroshot_data, LabelledImages.from_folder),
    }
    return {prefix: load(path) for prefix, (path, load) in sources.items() if path}


def run_zero_shot_suite(
    model: nn.Module,
    tokenizer: Callable,
    preprocess: Callable,
    args: argparse.Namespace,
    *,
    device: torch.device,
    rank: int,
    world_size: int,
    data: dict[str, LabelledImages] | None = None,
) -> dict[str, float]:
    """Zero-shot metrics for the trainer, the same on every process; {} if no flag asks for any.

    `data` is `load_zero_shot_data(args)`, read anew if not given. Keys: `imagenet-zeroshot-val-top1` and `-top5`,
    `imagenetv2-zeroshot-val-top1` and `-top5` (OpenCLIP's names), `zeroshot-val-top1`, `-top5`,
    `-mean_per_class_recall`, `-classes` and `-num_samples`. A collective call when `world_size` > 1.
    """
    common = {"device": device, "precision": args.precision, "rank": rank, "world_size": world_size}
    metrics = {}
    classifier, built_from = None, None
    for prefix, images in (load_zero_shot_data(args) if data is None else data).items():
        if (images.classnames, images.templates) != built_from:  # ImageNet and ImageNet-V2 share theirs
            classifier = zero_shot_classifier(model, tokenizer, images, **common)
            built_from = (images.classnames, images.templates)
        result = classify(
            model, classifier, images, preprocess, batch_size=args.batch_size, workers=args.workers, **common
        )
        keys = ["top1", "top5"]
        if prefix == "zeroshot":
            keys += ["mean_per_class_recall", "classes", "num_samples"]
        metrics |= {f"{prefix}-val-{key}": result[key] for key in keys}
    return metrics


def zero_shot_classification(
    model: nn.Module,
    tokenizer: Callable,
    data: LabelledImages,
    preprocess: Callable[[Image.Image], Tensor],
    *,
    device: torch.device,
    precision: str,
    batch_size: int,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, float]:
    """`top1`, `top5`, `mean_per_class_recall` (fractions), `num_samples`, `classes` and `skipped` (broken images).

    The same on every process and for every number of processes. Top-5 of fewer than five classes is 1. A collective
    call when `world_size` > 1. Raises UserError if no image can be read.
    """
    common = {"device": device, "precision": precision, "rank": rank, "world_size": world_size}
    classifier = zero_shot_classifier(model, tokenizer, data, **common)
    return classify(model, classifier, data, preprocess, batch_size=batch_size, workers=workers, **common)


def zero_shot_classifier(
    model: nn.Module,
    tokenizer: Callable,
    data: LabelledImages,
    *,
    device: torch.device,
    precision: str,
    rank: int,
    world_size: int,
) -> Tensor:
    """(D, C) float32 on the CPU: the mean text feature of each class's prompts, normalized. Processes share the work.

    A collective call when `world_size` > 1.
    """
    autocast = get_autocast(precision, device_type=torch.device(device).type)
    classes = torch.arange(len(data.classnames))
    # Whole batches go to a process, so that a batch, and with it rounding, is the same for any number of processes.
    mine = classes.split(CLASSES_PER_BATCH)[rank::world_size]
    index = torch.cat(mine) if mine else classes[:0]
    features = {}
    if mine:
        with evaluation_mode(model) as encoder, autocast():
            weights = open_clip.build_zero_shot_classifier(
                encoder,
                tokenizer=tokenizer,
                classnames=[data.classnames[i] for i in index],
                templates=data.templates,
                num_classes_per_batch=CLASSES_PER_BATCH,
                device=device,
            )
        features = {"weights": weights.T.float()}
    return gather_ordered(features, index, world_size)["weights"].T


def classify(
    model: nn.Module,
    classifier: Tensor,
    data: LabelledImages,
    preprocess: Callable[[Image.Image], Tensor],
    *,
    device: torch.device,
    precision: str,
    batch_size: int,
    workers: int,
    rank: int,
    world_size: int,
) -> dict[str, float]:
    """As `zero_shot_classification`, with a ready `classifier`: (D, C) float32 on the CPU."""
    device = torch.device(device)
    autocast = get_autocast(precision, device_type=device.type)
    input_dtype = open_clip.get_input_dtype(precision)
    batches = torch.arange(len(data.pictures)).split(batch_size)[rank::world_size]  # whole ones, as above
    loader = DataLoader(
        _Decoded(data.pictures, preprocess),
        batch_sampler=[batch.tolist() for batch in batches],
        num_workers=min(workers, len(batches)),
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
    )
    top1, top5, skipped, results = 0.0, 0.0, 0, []
    with evaluation_mode(model) as encoder:
        for images, target, index, broken in loader:
            skipped += broken
            if not len(index):
                continue
            images = images.to(device=device, dtype=input_dtype, non_blocking=True)
            with autocast():
                features = encoder.encode_image(images, normalize=True)
            logits = features.float().cpu() @ classifier
            hits = topk_accuracy(logits, target, ks=(1, 5))
            top1, top5 = top1 + hits[1], top5 + hits[5]
            results.append((index, predictions(logits), target))

    index, pred, target = map(torch.cat, zip(*results, strict=True)) if results else [torch.empty(0).long()] * 3
    gathered = gather_ordered({"pred": pred, "target": target}, index, world_size)
    counts = torch.tensor([[top1, top5, skipped]], dtype=torch.float64)
    counts = gather_ordered({"counts": counts}, torch.tensor([rank]), world_size)["counts"].sum(dim=0)
    top1, top5, skipped = counts.tolist()
    if not gathered:
        raise UserError(f"None of the {len(data.pictures)} images for zero-shot classification can be read.")
    if skipped:
        logging.warning(f"Zero-shot classification skipped {skipped:.0f} images that cannot be read.")
    num_samples = len(gathered["target"])
    return {
        "top1": top1 / num_samples,
        "top5": top5 / num_samples,
        "mean_per_class_recall": mean_per_class_recall(gathered["pred"], gathered["target"], len(data.classnames)),
        "num_samples": num_samples,
        "classes": len(data.classnames),
        "skipped": int(skipped),
    }


class _Decoded(Dataset):
    """Item i: (image (3, H, W), class, i), or None if the image is broken."""

    def __init__(self, pictures: Sequence[Picture], preprocess: Callable[[Image.Image], Tensor]):
        self.pictures, self.preprocess = pictures, preprocess

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int] | None:
        picture = self.pictures[i]
        try:
            image = load_rgb(picture.read())
        except Exception:  # broken files make PIL raise almost anything, from OSError to SyntaxError
            return None
        return self.preprocess(image), picture.label, i


def _collate(samples: list[tuple[Tensor, int, int] | None]) -> tuple[Tensor, Tensor, Tensor, int]:
    """Images (B, 3, H, W), classes (B,), places (B,) of the samples that are not None, and the number of the others."""
    good = [sample for sample in samples if sample is not None]
    images = torch.stack([image for image, _, _ in good]) if good else torch.empty(0)
    numbers = torch.tensor([numbers for _, *numbers in good], dtype=torch.int64).reshape(len(good), 2)
    return images, numbers[:, 0], numbers[:, 1], len(samples) - len(good)


def _class_folders(folder: Path, required: bool = True) -> list[Path]:
    """Folders in `folder`, by number if all their names are numbers, else by name; hidden ones do not count."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; check the path of the zero-shot data.")
    folders = [f for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")]
    if required and not folders:
        raise UserError(f"{folder} holds neither class folders nor .tar shards.")
    if all(re.fullmatch(r"[0-9]+", f.name) for f in folders):
        return sorted(folders, key=lambda f: (int(f.name), f.name))
    return sorted(folders, key=lambda f: f.name)


def _folder_pictures(folder: str | Path, folders: Sequence[Path]) -> list[Picture]:
    """All images at any depth under each class folder, hidden ones left out."""
    pictures = [
        Picture(path, label)
        for label, class_folder in enumerate(folders)
        for path in sorted(class_folder.rglob("*"))
        if path.suffix.lower() in FOLDER_IMAGES and not path.name.startswith(".")
    ]
    if not pictures:
        raise UserError(f"The class folders in {folder} hold no images.")
    return pictures


def _folder_names(folder: Path, folders: list[Path], lines: list[str]) -> list[str]:
    """The name of each class folder, from the lines of classnames.txt."""
    if len(lines) != len(folders):
        raise UserError(f"{folder} has {len(folders)} class folders, but its classnames.txt names {len(lines)}.")
    if not any("\t" in line for line in lines):
        return lines
    names = {name.strip(): title.strip() for name, _, title in (line.partition("\t") for line in lines)}
    missing = next((f.name for f in folders if not names.get(f.name)), None)
    if missing is not None:
        raise UserError(f"{folder / 'classnames.txt'} has no line 'folder<TAB>name' for the class folder {missing}.")
    return [names[f.name] for f in folders]


def _shard_pictures(shards: Sequence[Path], classes: int) -> list[Picture]:
    pictures = [picture for shard in shards for picture in _one_shard(shard)]
    if not pictures:
        raise UserError(f"The {len(shards)} shards in {shards[0].parent} hold no sample with 'cls' and an image.")
    out_of_range = next((p for p in pictures if not 0 <= p.label < classes), None)
    if out_of_range is not None:
        raise UserError(
            f"{out_of_range.path} has a sample of class {out_of_range.label}, "
            f"but classnames.txt names {classes} classes, 0 to {classes - 1}."
        )
    return pictures


def _one_shard(shard: Path) -> Iterator[Picture]:
    """Samples of a tar file: members with the same name up to the first dot after the last slash."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                parent, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not (member.isfile() and stem):
                    continue
                key, extension = f"{parent}/{stem}", extension.lower()
                samples.setdefault(key, {})[extension] = member
                if extension == "cls":
                    labels[key] = _label(tar.extractfile(member).read(), shard, member.name)
            tar.fileobj.seek(tar.offset)
            whole = tar.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.ReadError as error:
        if not samples:
            raise UserError(f"{shard} is not a readable tar file ({error}); mend or remove it.") from None
        whole = False
    if not whole:  # tarfile takes most kinds of damage for the end
        logging.warning(f"{shard} is cut off or damaged after {len(samples)} samples; the rest of it is not evaluated.")
    for i, (key, members) in enumerate(samples.items(), start=1):
        image = next((members[extension] for extension in SHARD_IMAGES if extension in members), None)
        if image is not None and key in labels:
            yield Picture(shard, labels[key], image.offset_data, image.size)
        elif whole or i < len(samples):
            kinds = ", .".join(SHARD_IMAGES)
            raise UserError(f"{shard}: the sample {key.lstrip('/')} needs a .cls file and an image (.{kinds}).")


def _label(content: bytes, shard: Path, member: str) -> int:
    try:
        return int(content)
    except ValueError:
        raise UserError(f"{shard}: {member} must hold a class number, but holds {content[:40]!r}.") from None


def _lines(path: Path) -> list[str]:
    """Stripped lines; blank ones are allowed at the end only, since a line's place says which class it is."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8.") from None
    if lines == [""]:
        raise UserError(f"{path} is empty; write one entry a line.")
    if "" in lines:
        raise UserError(f"{path} has nothing on line {lines.index('') + 1}; write one entry a line.")
    return lines


def _templates(path: Path) -> Sequence[str]:
    if not path.is_file():
        return DEFAULT_TEMPLATES
    templates = _lines(path)
    for template in templates:
        try:
            works = template.format("a") != template.format("b")
        except (IndexError, KeyError, ValueError, AttributeError):
            works = False
        if not works:
            raise UserError(f"{path}: the template {template!r} must have {{}} where the class name goes.")
    return templates


# ---------------------------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one sentence on stderr."""
    args = _parser().parse_args(argv)
    setup_logging(logging.WARNING, None, console=launch_rank() == 0)
    try:
        result = _run(args)
    except UserError as error:
        if launch_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if launch_rank() == 0:
        print(_table(args, result))
    return 0


def _run(args: argparse.Namespace) -> dict[str, float]:
    if args.batch_size < 1 or args.workers < 0:
        raise UserError("--batch-size must be at least 1 and --workers at least 0.")
    if args.json is not None and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise UserError(f"--json {args.json} cannot be written: name a file in a folder that exists.")
    try:
        device = torch.device(args.device)
    except RuntimeError:
        raise UserError(f"There is no device {args.device!r}; use cpu, cuda or mps.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device} is not available; use --device cpu.")
    ranks = init_ranks(args.device, None, None, False)
    with ranks.agree():
        data = LabelledImages.from_folder(args.data)
        model, tokenizer, preprocess = _load_model(args, ranks)
    result = zero_shot_classification(
        model,
        tokenizer,
        data,
        preprocess,
        device=ranks.device,
        precision=args.precision,
        batch_size=args.batch_size,
        workers=args.workers,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    if args.json is not None and ranks.is_main:
        named = {"model": args.model, "pretrained": args.pretrained, "data": str(args.data), **result}
        args.json.write_text(json.dumps(named, indent=2) + "\n")
    return result


def _load_model(args: argparse.Namespace, ranks: Ranks) -> tuple[nn.Module, Callable, Callable]:
    """Model with its weights, tokenizer and evaluation transform; UserError if they cannot be had."""
    from .model_setup import check_model_name, creating  # registers the ELIP models

    if ":" not in args.model:  # local-dir:... and hf-hub:... bring their own weights
        name = args.model.replace("/", "-")
        check_model_name(name)
        if args.pretrained is None:
            raise UserError("--pretrained is missing: give a checkpoint file or the name of pretrained weights.")
        if not Path(args.pretrained).is_file() and not open_clip.is_pretrained_cfg(name, args.pretrained):
            raise UserError(f"--pretrained {args.pretrained} is neither a file nor a name of weights for {args.model}.")
    with creating(args.model, args.pretrained):
        model, _, preprocess = open_clip.create_model_and_transforms(
            args.model, args.pretrained, precision=args.precision, device=ranks.device, require_pretrained=True
        )
        return model, open_clip.get_tokenizer(args.model), preprocess


def _table(args: argparse.Namespace, result: dict[str, float]) -> str:
    classes, skipped = result["classes"], result["skipped"]
    rows = [
        ("model", f"{args.model} ({args.pretrained})" if args.pretrained else args.model),
        ("data", str(args.data)),
        ("images", f"{result['num_samples']}" + (f" ({skipped} broken ones skipped)" if skipped else "")),
        ("classes", f"{classes}"),
        ("top-1", f"{result['top1']:7.2%}   chance {1 / classes:.2%}"),
        ("top-5", f"{result['top5']:7.2%}   chance {min(1, 5 / classes):.2%}"),
        ("mean per-class recall", f"{result['mean_per_class_recall']:7.2%}"),
    ]
    return "\n".join(f"{name:<23}{value}" for name, value in rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.zero_shot", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a name open_clip knows (ELIP models too), or local-dir:...")
    parser.add_argument("--pretrained", help="checkpoint of this trainer or of OpenCLIP, or a tag open_clip knows")
    parser.add_argument("--data", required=True, type=Path, help="class folders or .tar shards with classnames.txt")
    parser.add_argument("--batch-size", type=int, default=64, help="images a process and step")
    parser.add_argument("--workers", type=int, default=4, help="decoding processes a process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    precisions = ("fp32", "amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16")
    default = "amp_bf16" if torch.cuda.is_available() else "fp32"
    parser.add_argument("--precision", choices=precisions, default=default, help="as in training")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
