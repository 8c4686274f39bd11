"""Fine-tuning for captions, behind a prompt; evaluation by beams and COCO's scores."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from open_clip_elip.fusion.objectives import places_to_write
from open_clip_elip.fusion.steps import written
from open_clip_elip.fusion.tokenizer import blip_caption

from ..data.lists import read_pair
from ..evaluation.captioning import PROMPT, Writer, check_tools, evaluate_writing
from ..evaluation.passes import EncodeSettings, evaluation_mode
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
    evaluations = {name: _evaluation(setting, name, file, writer) for name, file in lists.items()}
    model, suite = setting.built.model, setting.suite(evaluations, "chosen_by")
    task = CaptioningTask(model, len(writer.start(model.decode_id)), suite=suite)
    encoding = FusedEncoding(setting.transform(True), setting.words(prompted, LONGEST), "caption")
    return Prepared(task, setting.train_data(read_pair, encoding))


def _evaluation(setting: Setting, name: str, file: str, writer: Writer) -> Callable[[nn.Module], dict[str, float]]:
    options, data = setting.options, captions_of(setting, name, file)
    settings = EncodeSettings(options.batch_size, options.workers, options.precision, description=name)

    def evaluate(model: nn.Module) -> dict[str, float]:
        with evaluation_mode(model) as bare:
            return evaluate_writing(writer, bare, data, setting.transform(False), setting.ranks, settings)

    return evaluate
