"""Captions that a model writes, and how they compare with people's, as COCO's server counts."""
from __future__ import annotations

import contextlib
import io
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.sets.labelled import Images
from ..distributed import Ranks
from ..errors import UserError
from ..options.caption import PROMPT
from .passes import EncodeSettings, ImagePass, collect

if TYPE_CHECKING:  # transformers is imported only where such a model is used
    from open_clip_elip.fusion.blip import BlipCaptioner


@dataclass
class Writer:
    """How captions are written; `how`: see `BlipCaptioner.write`."""

    pieces: Any  # the tokenizer of transformers
    prompt: str = PROMPT
    how: dict[str, Any] = field(default_factory=dict)

    def start(self, first: int) -> list[int]:
        """Ids that each caption begins with: the `first`, and the prompt's."""
        return [first, *self.pieces(self.prompt, add_special_tokens=False)["input_ids"]]

    def captions(
        self, model: BlipCaptioner, images: Images, transform: Callable, ranks: Ranks, settings: EncodeSettings
    ) -> tuple[dict[int, str], list[str]]:
        """Of images by their places, and the names of those that cannot be read; the same on every process."""
        start = self.start(model.decode_id)
        prompt = torch.tensor(start, device=ranks.device)

        def write(image: Tensor) -> Tensor:
            return model.write(image, prompt, self.pieces.sep_token_id, **self.how)

        rows, places, skipped = collect(ImagePass(write, images, transform, ranks, settings))
        texts = self.pieces.batch_decode(rows[:, len(start) :], skip_special_tokens=True)
        return dict(zip(places.tolist(), texts, strict=True)), skipped


def check_tools() -> None:
    """UserError unless captions can be scored here."""
    try:
        import pycocoevalcap  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("Captions are scored by pycocoevalcap: pip install 'open_clip_elip[captioning]'.") from None
    if shutil.which("java") is None:
        raise UserError("Captions are scored by programs in Java, and there is no java here: install one (17 will do).")


def score_captions(
    written: Mapping[int, str], people: Mapping[int, Sequence[str]], spice: bool = False
) -> dict[str, float]:
    """BLEU-1 to BLEU-4, METEOR, ROUGE-L, CIDEr, and SPICE if asked for (it fetches a model), of captions by image."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.spice.spice import Spice
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokenized(texts: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
        return PTBTokenizer().tokenize({image: [{"caption": one} for one in texts[image]] for image in written})

    names = {"METEOR": Meteor, "ROUGE-L": Rouge, "CIDEr": Cider} | ({"SPICE": Spice} if spice else {})
    with contextlib.redirect_stdout(io.StringIO()):  # what they say of themselves
        said, truth = tokenized({image: [text] for image, text in written.items()}), tokenized(people)
        bleu = Bleu(4).compute_score(truth, said)[0]
        found = {name: float(scorer().compute_score(truth, said)[0]) for name, scorer in names.items()}
    return {f"BLEU-{n}": float(value) for n, value in enumerate(bleu, 1)} | found


def evaluate_writing(
    writer: Writer, model: nn.Module, data: Any, transform: Callable, ranks: Ranks, settings: EncodeSettings
) -> tuple[dict[str, float], dict[int, str]]:
    """`score_captions` on `CaptionedImages`, by which of them the model is chosen (`chosen_by`), and `num_images`; and
    the captions by place."""
    written, _ = writer.captions(model, data.images, transform, ranks, settings)
    metrics = None
    with ranks.agree():
        if ranks.is_main:
            metrics = score_captions(written, people_of(data))
            metrics |= {"chosen_by": metrics["CIDEr"] + metrics["BLEU-4"], "num_images": float(len(written))}
    return ranks.broadcast(metrics), written


def image_ids(names: Sequence[str]) -> list[int | str]:
    """Of pictures, the last digits of their names as numbers, as COCO names them; of one that has none, its name."""
    digits = [re.findall(r"\d+", Path(name).stem) for name in names]
    found = [int(one[-1]) if one else name for one, name in zip(digits, names, strict=True)]
    if len({*found}) < len(found):
        logging.warning("Some pictures have the same number in their names: COCO's server cannot tell them apart.")
    return found


def people_of(data: Any) -> dict[int, list[str]]:
    """The captions of `CaptionedImages`, by image."""
    people: dict[int, list[str]] = {}
    for image, text in zip(data.image_of.tolist(), data.captions, strict=True):
        people.setdefault(image, []).append(text)
    return people
