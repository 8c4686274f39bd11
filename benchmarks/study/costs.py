"""What runs will cost, counted on the models that the trainer would build."""
from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from open_clip_elip.cost import step_cost
from training.durations import Duration
from training.errors import UserError
from training.data.sets.folders import list_shards
from training.models import build_model
from training.options import parse
from training.tasks.contrastive import PretrainingOptions, training_rrt

from .cells import Study, words


class Costs:
    """Operations of a pair and the default RRT; each model is built once."""

    def __init__(self, study: Study):
        self.study = study
        self.known: dict[str, float | None] = {}
        self.problems: dict[str, str] = {}  # by options: why the trainer would refuse them

    def flops(self, options: Mapping[str, Any]) -> float | None:
        """Operations of one pair on average over the run; None where they cannot be counted, or the trainer refuses."""
        key = json.dumps(options, sort_keys=True)
        if key not in self.known:
            try:
                self.known[key] = self._flops(dict(options))
            except UserError as error:
                self.known[key], self.problems[key] = None, str(error)
        return self.known[key]

    def _flops(self, options: dict[str, Any]) -> float | None:
        unmasked = options.pop("full-tokens-last", None)
        cost = step_cost(self.model(options), self.text_length)
        if cost is None or unmasked is None:
            return None if cost is None else cost.total
        share = _share(str(unmasked), self.study.samples)
        return (1 - share) * cost.total + share * self.flops({"token-reduction": {"method": "none"}})

    def rrt(self) -> float:
        """Ratio of removed tokens of the model's own reduction."""
        return self.default_rrt

    @cached_property
    def default_rrt(self) -> float:
        return training_rrt(self.model({}))

    @cached_property
    def text_length(self) -> int:
        """Columns of a caption's token ids on average, start and end included."""
        import open_clip

        captions = []
        for shard in list_shards(self.study.data / "train")[:2]:
            with tarfile.open(shard) as tar:
                captions += [tar.extractfile(m).read().decode() for m in tar if m.name.endswith(".txt")]
        tokens = open_clip.get_tokenizer(self.study.base["model"])(captions)
        return math.ceil((tokens != 0).sum(dim=1).double().mean().item())

    def model(self, options: Mapping[str, Any]) -> nn.Module:
        """As the trainer would build it."""
        line = ["--config", str(self.study.base_file), *words({**self.study.overrides, **options})]
        args = parse(PretrainingOptions, [*line, "--train-data", f"{self.study.data}/train/00000.tar"])
        return build_model(args, torch.device("cpu"))[0]


def _share(text: str, samples: int) -> float:
    """Of a run of `samples` samples."""
    try:
        duration = Duration.parse(text, "steps")
    except ValueError as error:
        raise UserError(str(error)) from None
    if duration.unit == "%":
        return duration.amount / 100
    if duration.unit == "samples":
        return min(1.0, duration.amount / samples)
    raise UserError(f"full-tokens-last must be in % or samples in the study, not {text}.")
