"""Zero-shot evaluation of ours against OpenCLIP's own: prompts and images a second.

    python benchmarks/evaluation.py                                    # a CPU; under 5 minutes on 2 cores
    python benchmarks/evaluation.py --model ViT-B-16-ELIP --precision amp_bf16 --images 20000 --batch-size 512 \\
        --workers 8 --compile                                          # a GPU

The weights are the same on both sides. OpenCLIP's side is plain OpenCLIP: `build_zero_shot_classifier`, and the loop of
its trainer (`open_clip_train.zero_shot.run`) over an ImageFolder. Ours is what `python -m training.zero_shot` runs.
Compared are the classifier from prompts, images as tensors to features, and JPEG files to accuracies. Both take turns;
a ratio is the median over the rounds of (our rate / OpenCLIP's in the same round). Features are compared too: they are
the same, but with --vision-guided-reduction and --image-decode.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip_train import zero_shot as open_clip_zero_shot
from open_clip_train.precision import get_autocast
from PIL import Image
from telling import common_parser, count_rounds, tell
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from open_clip_elip import with_shortcuts
from open_clip_elip.identity import ModelError
from open_clip_elip.identity import describe as describe_model
from open_clip_elip.profile.measure import in_turn, ratios, spread
from open_clip_elip.profile.models import Candidate, ProfileError, find_device
from open_clip_elip.profile.report import describe_machine, machine, make_folder
from open_clip_elip.registry import plain_name
from training.data.pixels import FAST, PLAIN, REDUCED
from training.data.sets.labelled import ImageFiles, LabelledImages
from training.data.transforms import with_decoding
from training.distributed import Ranks
from training.errors import UserError
from training.evaluation.passes import EncodeSettings, image_encoder
from training.evaluation.prompts import classify, zero_shot_classifier
from training.work.zero_shot import TEMPLATES

PROMPTS, TENSORS, FILES = "prompts to classifier", "tensors to features", "JPEG files to accuracy"
UNITS = {PROMPTS: "prompts/s", TENSORS: "images/s", FILES: "images/s"}
OURS, THEIRS = "ours", "open_clip"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one sentence on stderr."""
    args = _parser().parse_args(argv)
    begin, results = time.perf_counter(), []
    try:
        device = find_device(args.device)
        make_folder(args.results)
        if not 5 <= args.classes <= 1000 or args.images < 1:
            raise ProfileError("--classes must lie between 5 (for top-5) and 1000, and --images be at least 1.")
        with tempfile.TemporaryDirectory() as folder:
            contests, checks = prepare(args, device, Path(folder))
            for i, (work, (functions, amount)) in enumerate(contests.items()):
                left = args.minutes * 60 - (time.perf_counter() - begin)
                results.append(compare(work, functions, amount, args, device, left / (len(contests) - i)))
    except (ModelError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    setting = machine(device) | {
        "model": args.model, "batch_size": args.batch_size, "workers": args.workers, "precision": args.precision,
        "compile": args.compile, "image_decode": args.image_decode, "images": args.images, "image_pixels": args.pixels,
        "classes": args.classes, "templates": args.templates, "vision_guided_reduction": args.vision_guided_reduction,
    }  # fmt: skip
    text, found = describe(setting, results, checks), {"setting": setting, "results": results, "checks": checks}
    tell(args, f"evaluation_{device.type}", "Zero-shot evaluation", text, table(results), found)
    return 0


def prepare(args: argparse.Namespace, device: torch.device, folder: Path) -> tuple[dict, dict[str, Any]]:
    """For each kind of work both sides' functions and how many prompts or images there are, and what both agree on."""
    ours = Candidate.parse(args.model).build(device, args.precision).eval()
    stem = plain_name(args.model)
    plain = Candidate(stem, describe_model(args.model, token_reduction={"method": "none"}))
    theirs = plain.build(device, args.precision).eval()
    if type(theirs) not in (open_clip.CLIP, open_clip.CustomTextCLIP):
        raise ProfileError(f"{args.model} has no plain OpenCLIP model to compare with.")
    ours.load_state_dict(theirs.state_dict())
    ours = with_shortcuts(ours)
    if args.vision_guided_reduction:
        if ours.reduction is None:
            raise ProfileError(f"--vision-guided-reduction needs an ELIP model; {args.model} is none.")
        ours.tower.vision_guided = True
    preprocess = image_transform_v2(PreprocessCfg(**theirs.visual.preprocess_cfg), is_train=False)
    our_preprocess = with_decoding(preprocess, args.image_decode)
    tokenizer = open_clip.get_tokenizer(args.model)
    data = write_images(folder, args)
    ranks, settings = Ranks(device), EncodeSettings(args.batch_size, args.workers, args.precision)
    autocast = get_autocast(args.precision, device_type=device.type)

    def our_classifier() -> torch.Tensor:
        return zero_shot_classifier(ours, tokenizer, data, ranks=ranks, precision=args.precision)

    def their_classifier() -> torch.Tensor:
        with autocast():
            return open_clip.build_zero_shot_classifier(
                theirs, tokenizer, data.classnames, data.templates, num_classes_per_batch=10, device=device
            )

    size = (args.batch_size, 3, *theirs.visual.image_size)
    tensors = torch.randn(size, generator=torch.Generator().manual_seed(0))
    tensors = tensors.to(device=device, dtype=open_clip.get_input_dtype(args.precision))
    encode = image_encoder(ours, args.compile)
    their_model = torch.compile(theirs) if args.compile else theirs

    def our_features() -> torch.Tensor:
        with torch.inference_mode(), autocast():
            return encode(tensors)

    def their_features() -> torch.Tensor:
        with torch.inference_mode(), autocast():
            return their_model(image=tensors)["image_features"]

    open_clip_zero_shot.accuracy = _hits
    classifier, their_weights = our_classifier(), their_classifier()
    loader = DataLoader(ImageFolder(folder, transform=preprocess), args.batch_size, num_workers=args.workers)
    flags = SimpleNamespace(device=str(device), precision=args.precision, batch_size=args.batch_size)

    def our_accuracy() -> float:
        return classify(ours, classifier, data, our_preprocess, ranks=ranks, settings=settings, encode=encode)["top1"]

    def their_accuracy() -> float:
        with redirect_stderr(StringIO()):  # its progress bar
            return open_clip_zero_shot.run(their_model, their_weights, loader, flags)[0]

    checks = {
        "classifier_difference": (classifier.to(device) - their_weights.float()).abs().max().item(),
        "feature_difference": (our_features() - their_features().float()).abs().max().item(),
        "top1": {OURS: our_accuracy(), THEIRS: their_accuracy()},
    }
    prompts = len(data.classnames) * len(data.templates)
    return {
        PROMPTS: ({THEIRS: their_classifier, OURS: our_classifier}, prompts),
        TENSORS: ({THEIRS: their_features, OURS: our_features}, args.batch_size),
        FILES: ({THEIRS: their_accuracy, OURS: our_accuracy}, args.images),
    }, checks


def _hits(output: torch.Tensor, target: torch.Tensor, topk: Sequence[int]) -> list[float]:
    """What OpenCLIP's own `accuracy` returns; that one fails with newer versions of NumPy."""
    hits = output.topk(max(topk), dim=1).indices == target[:, None]
    return [hits[:, :k].sum().item() for k in topk]


def write_images(folder: Path, args: argparse.Namespace) -> LabelledImages:
    """JPEG files of smooth noise, which compress as photographs do, in one folder a class."""
    generator = np.random.default_rng(0)
    width, height = args.pixels, args.pixels * 3 // 4
    names, labels = [], []
    for i in range(args.images):
        label = i * args.classes // args.images
        pixels = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        path = folder / f"{label:04d}" / f"{i:06d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
        names.append(str(path.relative_to(folder)))
        labels.append(label)
    classnames = open_clip.IMAGENET_CLASSNAMES[: args.classes]
    return LabelledImages(ImageFiles(folder, names), torch.tensor(labels), classnames, TEMPLATES[args.templates])


def compare(
    work: str,
    functions: dict[str, Callable[[], Any]],
    amount: int,
    args: argparse.Namespace,
    device: torch.device,
    seconds: float,
) -> dict[str, Any]:
    repeat = 10 if device.type == "cuda" and work == TENSORS else 1
    times = in_turn(functions, device=device, rounds=args.rounds, warmup=1, repeat=repeat, seconds=seconds)
    rounds = ratios(times[THEIRS], times[OURS])
    rates = {side: spread([amount / t for t in times[side]]) for side in (OURS, THEIRS)}
    return {"work": work, "unit": UNITS[work], "rate": rates, "ratio": spread(rounds), "rounds": rounds}


def describe(setting: dict[str, Any], results: Sequence[dict[str, Any]], checks: dict[str, Any]) -> str:
    compiled = ", image towers compiled" if setting["compile"] else ""
    reduced = " with vision-guided reduction" if setting["vision_guided_reduction"] else ""
    return (
        f"{describe_machine(setting)}.\n"
        f"{setting['model']}{reduced}, {setting['precision']}{compiled}; batch {setting['batch_size']}, workers: "
        f"{setting['workers']}, JPEGs of {setting['image_pixels']} px (decoding: {setting['image_decode']}); "
        f"{count_rounds(result['ratio'] for result in results)}.\n"
        f"Greatest difference of a feature {checks['feature_difference']:.1e}, of a class's weight "
        f"{checks['classifier_difference']:.1e}. Quartiles over the rounds in brackets."
    )


def table(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [["", "", "ours", "OpenCLIP", "ratio"]]
    for found in results:
        ratio = found["ratio"]
        rates = [f"{found['rate'][side]['median']:,.4g}" for side in (OURS, THEIRS)]
        ratio = f"{ratio['median']:.2f} ({ratio['low']:.2f} - {ratio['high']:.2f})"
        rows.append([found["work"], found["unit"], *rates, ratio])
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = common_parser(__doc__)
    add = parser.add_argument
    add("--model", default="ViT-S-16-ELIP", help="default: %(default)s")
    add("--images", type=int, default=64, metavar="N", help="JPEG files; default: %(default)s")
    add("--pixels", type=int, default=384, metavar="N", help="their width; default: %(default)s")
    add("--classes", type=int, default=20, metavar="N", help="ImageNet's first; default: %(default)s")
    add("--templates", choices=sorted(TEMPLATES), default="simple", help="default: %(default)s")
    add("--batch-size", type=int, default=32, metavar="N", help="default: %(default)s")
    add("--workers", type=int, default=1, metavar="N", help="decoding processes; default: %(default)s")
    add("--image-decode", choices=(PLAIN, FAST, REDUCED), default=PLAIN, help="of ours; default: %(default)s")
    add("--vision-guided-reduction", action="store_true", help="ours reduces image tokens, which is not exact")
    add("--compile", "--torchcompile", action="store_true", help="torch.compile both sides' image towers")
    return parser


if __name__ == "__main__":
    sys.exit(main())
