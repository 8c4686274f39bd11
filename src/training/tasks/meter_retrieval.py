"""METER's fine-tuning for retrieval: the true caption before false ones; evaluation of every pair."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip_elip.fusion.meter import MeterRetriever
from open_clip_elip.fusion.steps import ranking_losses

from ..data.false_pairs import FalsePairs
from ..data.lists import read_pair
from .base import Batch, Progress
from .downstream import Prepared, Setting
from .fused import FusedEncoding, trimmed
from .meter import deal, draw_matches
from .momentum import DistilledTask
from .retrieval import evaluation_of

FALSE = 15  # captions for an image


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
        own, false, pad = batch["text"], batch.pop("false_texts"), self.model.pad
        own = F.pad(own, (0, false.shape[2] - own.shape[1]), value=pad)
        text = trimmed(torch.cat([own[:, None], false], dim=1).flatten(0, 1), pad)
        dealt = deal(batch["image"], batch.pop("false_images"), draw_matches(len(own)))
        return batch | {"text": text, "tokens": self.model.tokens_in(text)} | dealt

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
    encoding = FalsePairs(FusedEncoding(setting.transform(True), words, "caption"), FALSE)
    return Prepared(task, setting.train_data(read_pair, encoding))
