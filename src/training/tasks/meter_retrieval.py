"""METER's fine-tuning for retrieval: the true caption before false ones; evaluation of every pair."""
from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from open_clip_elip.fusion.meter import MeterRetriever
from open_clip_elip.fusion.steps import ranking_losses

from ..data.lists import read_pair
from ..data.pixels import picture_to_tensor, stack
from ..data.samples import Sample
from .base import Batch, Progress
from .downstream import Prepared, Setting
from .fused import FusedEncoding
from .meter import deal, draw_matches
from .momentum import DistilledTask
from .retrieval import evaluation_of

FALSE = 15  # captions for an image


class RankingEncoding(FusedEncoding):
    """Batches with "text" (B * 16, L): of each image its caption, then false ones, of samples that are drawn; and with
    "false_image", of another. By chance a drawn one is the own one.

    rows: what there is to draw from.
    """

    rows: Sequence[Sample]

    def encode(self, sample: Sample) -> tuple[list[Tensor], dict[str, Any]]:
        drawn = [self.rows[random.randrange(len(self.rows))] for _ in range(1 + FALSE)]
        pictures, fields = super().encode(sample)
        captions = [random.choice(other.fields[self.text]) for other in drawn[1:]]
        pictures.append(picture_to_tensor(drawn[0].images[0], self.transform))
        return pictures, fields | {self.text: [fields[self.text], *captions]}

    def collate(self, encoded: list[tuple[list[Tensor], dict[str, Any]]]) -> dict[str, Any]:
        false = stack([pictures[1] for pictures, _ in encoded], self.transform)
        return super().collate([(pictures[:1], fields) for pictures, fields in encoded]) | {"false_image": false}

    def texts(self, fields: Sequence[Mapping[str, Any]]) -> list[str]:
        return [text for one in fields for text in one[self.text]]


class RankingTask(DistilledTask):
    """See `steps.ranking_losses`. There is no twin.

    Args:
        reduce: remove tokens of the images, by each caption.
    """

    def __init__(self, model: MeterRetriever, reduce: bool = False):
        super().__init__(model, alpha=0)
        self.reduce = reduce

    def prepare(self, batch: Batch) -> Batch:
        batch = dict(batch)
        matches, false = draw_matches(len(batch["image"].pixels)), batch.pop("false_image")
        return batch | {"tokens": self.model.tokens_in(batch["text"])} | deal(batch["image"], false, matches)

    def losses(self, model: nn.Module, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        more = {name: batch[name] for name in ("seen", "matches", "tokens")}
        losses = model(batch["image"], batch["text"], ranking_losses, reduce=self.reduce, **more)
        return {"loss": losses["rank"] + losses["itm"], **losses}


def prepare(setting: Setting) -> Prepared:
    options, model = setting.options, setting.built.model
    model.tower.vision_guided = options.vision_guided_reduction
    task = RankingTask(model, options.vision_guided_reduction)
    lists = setting.lists().items()
    task.suite = setting.suite({name: evaluation_of(setting, name, file) for name, file in lists}, "r_mean")
    words = setting.words(setting.rules.caption, setting.rules.longest_caption)
    train = setting.train_data(read_pair, RankingEncoding(setting.transform(True), words, "caption"))
    if train is not None:
        train.encoding.rows = train.source.rows
    return Prepared(task, train)
