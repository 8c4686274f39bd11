"""What pre-training is evaluated on as it goes: validation pairs, and zero-shot classification."""
from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..data import ValData
from ..data.sets.labelled import LabelledImages
from ..distributed import Ranks
from ..plan import is_due
from .pairs import evaluate_pairs
from .prompts import run_zero_shot_suite


@dataclass
class Suite:
    options: Any  # those of pre-training
    ranks: Ranks
    tokenizer: Callable
    transform: Callable  # of evaluation
    val_data: ValData | None
    zero_shot_data: dict[str, LabelledImages]  # images to classify, by the prefix of their metrics

    def __post_init__(self):
        options = self.options
        if self.val_data is not None and options.batch_size == 1 and not options.siglip:
            logging.warning("clip_val_loss is that of batches of --batch-size 1, which have no contrast: it is 0.")

    def __call__(self, model: nn.Module, epoch: int, last: bool) -> dict[str, float]:
        """What is due after `epoch`; see `Task.evaluate`."""
        options, metrics = self.options, {}
        if self.val_data is not None and is_due(epoch, options.val_frequency, last):
            metrics |= evaluate_pairs(model, self.val_data, options, self.ranks, options.val_rerank)
        if self.zero_shot_data and is_due(epoch, options.zeroshot_frequency, last):
            metrics |= run_zero_shot_suite(
                model, self.tokenizer, self.transform, options, ranks=self.ranks, data=self.zero_shot_data
            )
        return metrics

    @staticmethod
    def score(metrics: dict[str, float]) -> float | None:
        """Zero-shot top-1 (ImageNet's first), else the mean R@1 of the two directions."""
        retrieval = ("image_to_text_R@1", "text_to_image_R@1")
        for names in (("imagenet-zeroshot-val-top1",), ("zeroshot-val-top1",), retrieval):
            if metrics.keys() >= set(names):
                return sum(metrics[name] for name in names) / len(names)
        return None
