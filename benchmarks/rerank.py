"""How many pairs of image and text a fusion model compares in a second: what pairs share once, or pair by pair.

    python benchmarks/rerank.py --out benchmarks/results/rerank_cpu.md
    python benchmarks/rerank.py --model METER-B-32 --image-size 224 --out benchmarks/results/every_pair_cpu.md

Three ways, in turn, several times each; the median of each counts. The weights are random: they change no time. ALBEF
and BLIP rank shortlists of states that are there; of METER, whose release runs both towers for each pair, towers are
timed too.
"""
from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from telling import positive
from torch import Tensor

from open_clip_elip.fusion.base import FusionModel
from open_clip_elip.identity import ModelError, create, describe
from training.distributed import Ranks
from training.evaluation.rerank import score_pairs


def pair_by_pair(model: FusionModel, images: Tensor, tokens: Tensor, chunk: int) -> list[Tensor]:
    """As the released programs: the image, pixels or states, once for each text."""
    towers, found = images.ndim == 4, []
    states = None if towers else model.text_states(tokens)
    for image in images:
        for part in torch.arange(len(tokens)).split(chunk):
            copies = image.expand(len(part), *image.shape)
            seen = model.image_states(copies) if towers else copies
            read = model.text_states(tokens[part]) if towers else states[part]
            found.append(model.match(read, tokens[part], model.read(seen))[:, 1])
    return found


def once(model: FusionModel, images: Tensor, tokens: Tensor, precision: str) -> list[Tensor]:
    """As `training.retrieval` does it."""
    tokens = tokens[(tokens != model.pad).sum(dim=1).argsort()]
    images = model.to_match(images) if images.ndim == 4 else images
    pairs, batch = torch.arange(len(images) * len(tokens)), [(torch.arange(len(images)), images)]
    more = {"ranks": Ranks(images.device), "precision": precision, "name": str}
    return [scores for _, scores in score_pairs(model, tokens, pairs, batch, **more)]


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="ALBEF-B-16")
    parser.add_argument("--image-size", type=positive, default=384)
    parser.add_argument("--images", type=positive, default=2)
    parser.add_argument("--texts", type=positive, default=32, help="that each image is compared with")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a Markdown file")
    options = parser.parse_args(argv)
    try:
        identity = describe(options.model, force_image_size=options.image_size)
    except ModelError as error:
        parser.error(str(error))
    if identity.family == "clip":
        parser.error(f"{options.model} has no fusion layers that compare pairs; name another --model")
    device, towers = torch.device(options.device), identity.family == "meter"
    torch.manual_seed(0)
    model = create(identity, device=device, pretrained_text=False).eval()
    columns = model.caption_length
    tokens = torch.randint(1000, 2000, (options.texts, columns), device=device)
    lengths = torch.randint(9, 17, (options.texts, 1), device=device)  # COCO's captions: 12 tokens and some
    tokens[torch.arange(columns, device=device) >= lengths] = model.pad
    images = torch.randn(options.images, 3, *identity.preprocess["size"], device=device)
    images = images if towers else model.image_states(images)
    short = tokens[:, : int(lengths.max())]
    ways = {
        f"pair by pair, {columns} tokens (as released)": lambda: pair_by_pair(model, images, tokens, options.texts),
        "pair by pair, cut at the longest": lambda: pair_by_pair(model, images, short, options.texts),
        "what pairs share once, cut (as here)": lambda: once(model, images, tokens, "fp32"),
    }
    seconds = {way: [] for way in ways}
    for number in range(options.rounds + 1):
        for way, run in ways.items():
            begin = time.perf_counter()
            scores = torch.cat(run()).cpu()
            if number:  # the first round warms up
                seconds[way].append(time.perf_counter() - begin)
            assert len(scores) == options.images * options.texts
    count = options.images * options.texts
    rates = {way: count / statistics.median(times) for way, times in seconds.items()}
    first, *_ = rates.values()
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"`{options.model}`, {options.image_size} px, {options.images} images x "
        f"{options.texts} texts of 9 to 16 tokens, float32; {where}, torch {torch.__version__}; median of "
        f"{options.rounds} rounds, the three ways in turn. Both towers are {'' if towers else 'not '}in it.", "",
        "| | pairs/s | |", "|---|---|---|",
        *(f"| {way} | {rate:.1f} | x {rate / first:.1f} |" for way, rate in rates.items()),
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        command = shlex.join(["python", "benchmarks/rerank.py", *(sys.argv[1:] if argv is None else argv)])
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(f"# Pairs a second\n\n`{command}`\n\n{text}")


if __name__ == "__main__":
    main()
