"""How many pairs of image and text ALBEF-B-16 compares in a second: an image's keys and values once, or pair by pair.

    python benchmarks/rerank.py --out benchmarks/results/rerank_cpu.md

Three ways, in turn, several times each; the median of each counts. The weights are random: they change no time.
"""
from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from open_clip_elip.fusion.albef import Albef
from open_clip_elip.identity import describe
from training.distributed import Ranks
from training.evaluation.rerank import score_pairs


def pair_by_pair(model: Albef, images: Tensor, tokens: Tensor, chunk: int) -> list[Tensor]:
    """As the released program: the image's states once for each text, and from each of them keys and values."""
    states = model.text_states(tokens)
    return [
        model.match(states[part], tokens[part], model.read(image.expand(len(part), -1, -1)))[:, 1]
        for image in images
        for part in torch.arange(len(tokens)).split(chunk)
    ]


def once(model: Albef, images: Tensor, tokens: Tensor, precision: str) -> list[Tensor]:
    """As `training.retrieval --rerank` does it."""
    tokens = tokens[(tokens != 0).sum(dim=1).argsort()]
    pairs, batch = torch.arange(len(images) * len(tokens)), [(torch.arange(len(images)), images)]
    more = {"ranks": Ranks(images.device), "precision": precision, "name": str}
    return [scores for _, scores in score_pairs(model, tokens, pairs, batch, **more)]


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="ALBEF-B-16")
    parser.add_argument("--image-size", type=int, default=384)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--texts", type=int, default=32, help="that each image is compared with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a Markdown file")
    options = parser.parse_args(argv)
    identity = describe(options.model, force_image_size=options.image_size)
    config, device = identity.config, torch.device(options.device)
    torch.manual_seed(0)
    model = Albef(config["embed_dim"], config["vision_cfg"], config["text_cfg"], language_head=False).eval().to(device)
    tokens = torch.randint(1000, 2000, (options.texts, 30), device=device)
    lengths = torch.randint(9, 17, (options.texts, 1), device=device)  # COCO's captions: 12 tokens and some
    tokens[torch.arange(30, device=device) >= lengths] = model.pad
    images = model.image_states(torch.randn(options.images, 3, *identity.preprocess["size"], device=device))
    short = tokens[:, : int(lengths.max())]
    ways = {
        "pair by pair, 30 tokens (as released)": lambda: pair_by_pair(model, images, tokens, options.texts),
        "pair by pair, cut at the longest": lambda: pair_by_pair(model, images, short, options.texts),
        "keys and values once, cut (as here)": lambda: once(model, images, tokens, "fp32"),
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
        f"`{options.model}`, {options.image_size} px ({images.shape[1]} image tokens), {options.images} images x "
        f"{options.texts} texts of 9 to 16 tokens, float32; {where}, torch {torch.__version__}; median of "
        f"{options.rounds} rounds, the three ways in turn. Image and text towers are not in it.", "",
        "| | pairs/s | |", "|---|---|---|",
        *(f"| {way} | {rate:.1f} | x {rate / first:.1f} |" for way, rate in rates.items()),
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(f"# Re-ranking\n\n`python benchmarks/rerank.py`\n\n{text}")


if __name__ == "__main__":
    main()
