"""Fine-tuning for retrieval: alignment with images that have several captions; evaluation by re-ranked shortlists."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..data.arrow import ENDING
from ..data.lists import Item, ReadItem, read_pair
from ..data.sets.captioned import CaptionedImages, CaptionOptions, load_captions
from ..errors import UserError
from ..evaluation.pairs import evaluate_captions
from ..evaluation.passes import EncodeSettings, evaluation_mode
from .alignment import AlignmentTask, check_step
from .downstream import Prepared, Setting
from .fused import FusedEncoding


def numbered() -> ReadItem:
    """Reads pairs as `read_pair`, with a number for each image ("numbers"), the same for one "image_id"."""
    known: dict[Any, int] = {}

    def read(item: Item) -> Any:
        found = read_pair(item)
        if isinstance(found, str):
            return found
        pictures, fields = found
        return pictures, fields | {"numbers": known.setdefault(str(fields["image_id"]), len(known))}

    return read


def prepare(setting: Setting) -> Prepared:
    options, ranks, model = setting.options, setting.ranks, setting.built.model
    check_step(options, ranks.world_size)
    model.tower.vision_guided = options.vision_guided_reduction
    evaluations = {name: evaluation_of(setting, name, file) for name, file in setting.lists().items()}
    task = AlignmentTask(
        model, queue_size=options.queue_size, gather=ranks.gather_tensor,
        everywhere=_everywhere(setting), suite=setting.suite(evaluations, "reranked_r_mean"), **setting.twin(),
    )  # fmt: skip
    words = setting.words(setting.rules.caption, setting.rules.longest_caption)
    encoding = FusedEncoding(setting.transform(True), words, "caption", ("numbers",))
    return Prepared(task, setting.train_data(numbered(), encoding))


def _everywhere(setting: Setting) -> Callable[[Tensor], Tensor] | None:
    """See `steps.align`."""
    everywhere = setting.options.all_rank_negatives
    if setting.built.identity.family == "blip":
        return setting.ranks.gather_with_gradient if everywhere else _own_rank
    if everywhere:
        raise UserError("--all-rank-negatives is for BLIP models: leave it out.")
    return None


def _own_rank(rows: Tensor) -> Tensor:
    return rows


def captions_of(setting: Setting, name: str, file: str) -> CaptionedImages:
    """A list to evaluate on: images with their captions."""
    root = None if file.endswith(ENDING) else setting.options.image_root
    try:
        return load_captions(file, CaptionOptions(images=None if root is None else Path(root)))
    except UserError as error:
        raise UserError(f"--{name}-data: {error}".replace("--images", "--image-root")) from error


def evaluation_of(setting: Setting, name: str, file: str) -> Callable[[nn.Module], dict[str, float]]:
    """See `evaluate_captions`."""
    options, data = setting.options, captions_of(setting, name, file)
    settings = EncodeSettings(options.batch_size, options.workers, options.precision, description=name)

    def evaluate(model: nn.Module) -> dict[str, float]:
        with evaluation_mode(model) as bare:
            words = setting.words(setting.rules.caption, bare.caption_length)
            more = {"ranks": setting.ranks, "settings": settings, "rerank_best": options.shortlist}
            return evaluate_captions(data, bare, words, setting.transform(False), **more)[0]

    return evaluate
