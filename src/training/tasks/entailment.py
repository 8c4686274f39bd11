"""Visual entailment (SNLI-VE): does an image entail a sentence, contradict it, or neither?"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from open_clip_elip.fusion.objectives import distilled

from ..data.arrow import LABELS
from ..data.lists import Item, ReadItem, text_of
from ..data.samples import Encoding
from .base import Batch, Progress
from .downstream import Prepared, Setting
from .fused import FusedEncoding, accuracy
from .momentum import DistilledTask


def read_item(item: Item) -> tuple[Sequence[str], dict[str, Any]] | str:
    """{"image": an id whose file is id.jpg, or a path; "sentence"; "label": one of `LABELS`}."""
    image, sentence, label = text_of(item, "image"), text_of(item, "sentence"), item.get("label")
    if image is None or sentence is None:
        return f'it has no "{"image" if image is None else "sentence"}"'
    if label not in LABELS:
        return f'its "label" is {label!r}, not one of {", ".join(LABELS)}'
    image = image if "." in image.rpartition("/")[2] else f"{image}.jpg"
    return (image,), {"text": sentence, "label": LABELS.index(label)}


class SentenceTask(DistilledTask):
    """Cross-entropy with the labels and with the twin's answers, of a `fusion.albef.AlbefClassifier`.

    Args:
        reduce: remove tokens of the images, guided by the sentences (Guo et al., Sec. 4.4.5).
        others: see `DistilledTask`.
    """

    def __init__(self, *args: Any, reduce: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.reduce = reduce

    def losses(self, model: nn.Module, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        image, text = batch["image"], batch["text"]
        teacher = None
        if self.twin is not None:
            with torch.no_grad():
                teacher = self.twin(image, text)
        logits = model(image, text, reduce=self.reduce)
        return {"loss": distilled(logits, batch["label"], teacher, self.weight(progress))}

    def rows(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """(B, 1 + classes) as `fused.accuracy` takes them."""
        logits = model(batch["image"], batch["text"], reduce=self.reduce).float()
        return torch.cat([batch["label"][:, None].float(), logits], dim=1)


def prepare(
    setting: Setting, read: ReadItem = read_item, ramp: int = 0, clean: Callable[[str], str] | None = None,
    change: Callable[[FusedEncoding], Encoding] | None = None,
) -> Prepared:  # fmt: skip
    """Also of other tasks with one label a sentence; `clean` its texts, `change` how samples are read in training."""
    task = SentenceTask(
        setting.built.model, reduce=setting.options.vision_guided_reduction, ramp=ramp, **setting.twin()
    )
    text = setting.words(clean or setting.rules.caption, setting.rules.longest_sentence)
    train, test = (FusedEncoding(setting.transform(train), text, "text", ("label",)) for train in (True, False))
    train = train if change is None else change(train)
    evaluations = {
        name: setting.evaluation(setting.rows(name, read), test, task.rows, accuracy) for name in setting.lists()
    }
    task.suite = setting.suite(evaluations, "accuracy")
    return Prepared(task, setting.train_data(read, train))
