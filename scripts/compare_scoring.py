"""How many of the tokens that ELIP keeps a cheaper way to score them would keep too, on trained weights.

    python scripts/compare_scoring.py logs/quickstart/checkpoints/epoch_6.pt 'data/openmoji-64/val/{00000..00003}.tar'

Each stage scores the same tokens in each way, those that the exact scoring has left, and all ways keep as many. `keys
of the layer before` are those that this layer computed for itself; the guided `[CLS]` queries them. `by chance` is what
as many tokens drawn at random have in common with the exact ones. Any family; on the CPU.
"""
from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from open_clip_elip import Elip
from open_clip_elip.blocks import run_block
from open_clip_elip.profile.report import Rows, markdown_table
from open_clip_elip.reduction import Removal
from open_clip_elip.reduction.elip import cls_attention
from open_clip_elip.reduction.merge import best
from open_clip_elip.visualize.trace import text_guidance
from training.data.sets.captioned import load_captions
from training.distributed import Ranks
from training.errors import UserError
from training.evaluation.loaded import load_model
from training.options.evaluation import EvaluationOptions

BATCH = 32


class Compared:
    """Watches an ELIP, and notes, by way and stage (its first layer, from 1 on), the share (B,) of tokens in common."""

    guidance: Tensor | None = None  # of the batch that is run

    def __init__(self, exact: Elip, blocks: Sequence[nn.Module]):
        self.exact, self.blocks, self.stages = exact, blocks, {stage.first: stage for stage in exact.stages}
        depths = sorted({stage.depth for stage in exact.stages})
        ways = {f"`scoring_depth` {depth}": {"scoring_depth": depth} for depth in range(1, depths[-1])}
        ways["`lam` 1: by the image alone"] = {"lam": 1.0}
        self.ways = {name: Elip(replace(exact.config, **changes), len(blocks)) for name, changes in ways.items()}
        self.shares: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        self.entered: dict[int, Tensor] = {}  # what the layer before a stage was given
        for first in filter(None, self.stages):
            blocks[first - 1].register_forward_pre_hook(partial(self.enter, first))
        exact.watch = self.compare

    def enter(self, first: int, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.entered[first] = args[0]

    def compare(self, removal: Removal) -> None:
        stage, scores = self.stages[removal.layer], removal.scores
        layers = self.blocks[stage.first : stage.first + stage.depth]
        keep = int(removal.into.max()) + (not self.exact.config.merge)
        kept, found = (removal.into < keep).float() * (removal.into >= 0), {}
        for name, way in self.ways.items():
            found[name] = way.score(layers, removal.x, self.guidance, run_block)
        query = self.exact.fuse(removal.x, self.guidance)[:, :1]
        before = torch.cat([query, self.entered[stage.first][:, 1:]], dim=1)
        found["keys of the layer before"] = cls_attention(self.blocks[stage.first - 1], before)
        with torch.autocast("cpu", torch.bfloat16):
            found["all in bfloat16"] = self.exact.score(layers, removal.x, self.guidance, run_block)
        for name, others in found.items():
            self.shares[name][stage.first + 1].append(kept.gather(1, best(others, keep)).mean(dim=1))
        self.shares["by chance"][stage.first + 1].append(scores.new_full((len(kept),), keep / scores.shape[1]))

    def table(self) -> Rows:
        stages = list(self.shares["by chance"])
        rows: Rows = [("", *(f"stage of layer {number}" for number in stages))]
        for name, shares in self.shares.items():
            rows.append((name, *(f"{torch.cat(shares[number]).mean():.1%}" for number in stages)))
        return rows


@torch.no_grad()
def compare(checkpoint: str, data: str) -> Rows:
    """UserError: the checkpoint or the data cannot be used."""
    options = EvaluationOptions(pretrained=checkpoint, data=[data], device="cpu", precision="fp32")
    model, tokenizer, preprocess, *_ = load_model(options, Ranks(torch.device("cpu")), pairs=True)
    exact = getattr(model.tower, "reduction", None)
    if not isinstance(exact, Elip):
        raise UserError(f"{checkpoint} is no model with ELIP, so nothing is scored; take another.")
    compared = Compared(exact, model.visual.transformer.resblocks)
    pairs = load_captions(data)
    first = dict(zip(reversed(pairs.image_of.tolist()), reversed(pairs.captions), strict=True))  # caption of an image
    for rows in torch.arange(len(pairs)).split(BATCH):
        image = torch.stack([preprocess(pairs.images.load(row)) for row in rows.tolist()])
        text = tokenizer([first[row] for row in rows.tolist()])
        compared.guidance = text_guidance(model, text)
        model.tower.tokens(image, compared.guidance, reduce=True)
    return compared.table()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint")
    parser.add_argument("data", help="pairs, as training.retrieval takes them")
    args = parser.parse_args(argv)
    try:
        print(markdown_table(compare(args.checkpoint, args.data)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
