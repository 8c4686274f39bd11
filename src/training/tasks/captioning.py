"""Fine-tuning for captions, behind a prompt; evaluation by beams and COCO's scores."""
from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from open_clip_elip.fusion.objectives import places_to_write
from open_clip_elip.fusion.steps import written
from open_clip_elip.fusion.tokenizer import blip_caption

from ..data.lists import read_pair
from ..evaluation.captioning import Writer, check_tools, evaluate_writing, image_ids
from ..evaluation.passes import EncodeSettings, evaluation_mode
from ..options.caption import PROMPT
from .base import Batch, Progress
from .downstream import Prepared, Setting
from .fused import FusedEncoding
from .momentum import DistilledTask
from .retrieval import captions_of

LONGEST = 40  # tokens in training


def prompted(caption: str) -> str:
    return PROMPT + blip_caption(caption)


class CaptioningTask(DistilledTask):
    """Language modelling of what comes behind the prompt. There is no twin.

    Args:
        prompt: tokens of the prompt, `[DEC]` included.
    """

    def __init__(self, model: nn.Module, prompt: int, **kwargs: Any):
        super().__init__(model, alpha=0, **kwargs)
        self.prompt = prompt

    def prepare(self, batch: Batch) -> Batch:
        tokens = self.model.tokens_in(batch["text"])
        return batch | {"chosen": places_to_write(tokens.mask, self.prompt), "tokens": tokens}

    def losses(self, model: nn.Module, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        logits = model(batch["image"], batch["text"], batch["chosen"], batch["tokens"])
        return {"loss": written(logits, batch["text"], batch["chosen"])}


def prepare(setting: Setting) -> Prepared:
    writer, lists = Writer(setting.built.tokenizer.pieces), setting.lists()
    if lists:
        check_tools()
    evaluations = {name: WritingEvaluation(setting, name, file, writer) for name, file in lists.items()}
    model, suite = setting.built.model, setting.suite(evaluations, "chosen_by")
    task = CaptioningTask(model, len(writer.start(model.decode_id)), suite=suite)
    encoding = FusedEncoding(setting.transform(True), setting.words(prompted, LONGEST), "caption")
    last = next(reversed(evaluations.values()), None)
    return Prepared(task, setting.train_data(read_pair, encoding), last and setting.submission(last, last.submitted))


class WritingEvaluation:
    """Evaluation on a list: captions that are written, against people's."""

    def __init__(self, setting: Setting, name: str, file: str, writer: Writer):
        self.setting, self.name, self.writer = setting, name, writer
        self.data = captions_of(setting, name, file)
        self.written: dict[int, str] = {}  # by place in the list, after an evaluation

    def __call__(self, model: nn.Module) -> dict[str, float]:
        options, setting = self.setting.options, self.setting
        settings = EncodeSettings(options.batch_size, options.workers, options.precision, description=self.name)
        with evaluation_mode(model) as bare:
            more = bare, self.data, setting.transform(False), setting.ranks, settings
            metrics, self.written = evaluate_writing(self.writer, *more)
        return metrics

    def submitted(self) -> list[dict[str, Any]]:
        """What COCO's server takes: [{"image_id", "caption"}]."""
        ids = image_ids([self.data.images.name(place) for place in self.written])
        pairs = zip(ids, self.written.values(), strict=True)
        return [{"image_id": number, "caption": caption} for number, caption in pairs]
