"""METER's pre-training: masked language modelling, and matching with images that are drawn."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip_elip.fusion.meter import Meter
from open_clip_elip.fusion.objectives import CHOSEN, choose_words, replaced
from open_clip_elip.fusion.steps import meter_logits, meter_losses
from open_clip_elip.fusion.tokenizer import WordPieces

from ..data import ValData
from ..data.pixels import Images, to_device
from ..distributed import Ranks
from .base import Batch, Progress
from .counted import CountedTask
from .fused import ListEvaluation, ListSuite, trimmed

FIELDS = ("masked", "chosen", "labels", "seen", "matches", "tokens")  # of a batch, beside image and text


class MeterPretraining(CountedTask):
    """MLM + ITM, see `steps.meter_losses`. There is no twin.

    Args:
        tokenizer: that makes the batches' texts.
        whole_words: see `objectives.choose_words`; False: each token by itself, with the probability 15 %.
    """

    TERMS = 6  # images are drawn, too

    def __init__(self, model: Meter, tokenizer: WordPieces, *, whole_words: bool = True):
        super().__init__(model, alpha=0)
        self.lengths = max(2, model.context_length // 8), model.context_length // 2, model.context_length
        pieces, self.whole_words = tokenizer.pieces, whole_words
        words = pieces.convert_ids_to_tokens(list(range(len(pieces))))
        self.continues = torch.tensor([word.startswith("##") for word in words])
        self.outside = torch.tensor([number for number, word in enumerate(words) if word in ("[CLS]", "[SEP]")])
        self.special, self.mask_id = torch.tensor(pieces.all_special_ids), pieces.mask_token_id

    def prepare(self, batch: Batch) -> Batch:
        """Masks words, and deals out images: half of the texts, rounded down, get their own. Where the data draw no
        others, those of the batch serve."""
        batch, text = dict(batch), batch["text"]
        false, found = batch.pop("false_images", None), self.masked(text, torch.rand(3, *text.shape))
        return batch | found | deal(batch["image"], false, draw_matches(len(text)))

    def masked(self, text: Tensor, draws: Tensor) -> Batch:
        """Text and masked text as `steps.meter_losses` takes them, of (B, L) token ids as the tokenizer pads them;
        `draws` (3, B, L) uniform at random."""
        order, kind, words = draws
        if self.whole_words:
            chosen = choose_words(text, order, self.continues, self.outside)
        else:
            chosen = order < CHOSEN
        chosen = chosen & ~torch.isin(text, self.special)
        if self.model.tower.shortcuts:
            text = trimmed(text, self.model.pad)
        chosen, kind, words = (one[:, : text.shape[1]] for one in (chosen, kind, words))
        masked, chosen, labels = replaced(text, chosen, self.mask_id, kind, (words * len(self.continues)).long())
        tokens = self.model.tokens_in(text)
        return {"text": text, "masked": masked, "chosen": chosen, "labels": labels, "tokens": tokens}

    def losses(self, model: nn.Module, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        losses = model(batch["image"], batch["text"], meter_losses, **{name: batch[name] for name in FIELDS})
        return {"loss": losses["mlm"] + losses["itm"], **losses}

    def log(self, model: nn.Module) -> dict[str, float]:
        return {"rrt": model.tower.rrt()}

    def suite_on(self, data: ValData, frequency: int, ranks: Ranks, precision: str) -> ListSuite:
        """The best checkpoint has the largest sum of both accuracies."""
        evaluation = ListEvaluation(data, self.rows, accuracies, ranks, precision)
        return ListSuite({"val": evaluation}, frequency, "mlm_itm_accuracy")

    def rows(self, model: Meter, batch: Mapping[str, Any]) -> Tensor:
        """(B, 3) as `accuracies` takes them. Masks, and which images are false, depend on a sample's place alone."""
        places = batch["index"].tolist()
        seeded = [torch.Generator().manual_seed(place) for place in places]
        draws = torch.stack([torch.rand(3, batch["text"].shape[1], generator=one) for one in seeded], dim=1)
        found = self.masked(batch["text"].cpu(), draws)
        matches = torch.tensor([place % 2 for place in places])
        false = batch.get("false_images")
        if false is None and len(places) == 1:  # there is no other
            matches[:] = 1
        found |= deal(Images(batch["image"]), None if false is None else Images(false), matches)
        found = to_device(found, batch["text"].device)
        logits = meter_logits(
            model, **{name: found[name] for name in ("image", "text", "masked", "chosen", "seen", "tokens")}
        )
        words, judged = (one.argmax(dim=1) for one in logits)
        rows = torch.zeros(len(places), 3, device=words.device)
        where, right = found["chosen"] // found["text"].shape[1], words == found["labels"]
        rows.index_add_(0, where, F.pad(torch.stack([right, right >= 0], dim=1).float(), (0, 1)))
        rows[:, 2] = judged == found["matches"]
        return rows


def accuracies(rows: Tensor, places: Tensor) -> dict[str, float]:
    """Over masked tokens and over pairs, of rows (n, 3): masked tokens that are right, all of them; a right pair?"""
    right, count, judged = rows.sum(dim=0).tolist()
    found = {"mlm_accuracy": right / max(1.0, count), "itm_accuracy": judged / len(rows)}
    return found | {"mlm_itm_accuracy": sum(found.values())}


def draw_matches(count: int) -> Tensor:
    """(count,) 1 for half of the texts, rounded down, which are to see their own images, 0 for the others."""
    return (torch.arange(count) < count // 2).long()[torch.randperm(count)]


def deal(image: Images, false: Images | None, matches: Tensor) -> Batch:
    """Images as `steps.meter_losses` takes them.

    Args:
        image, false: of the B pairs, and those that were drawn for them; None: other pairs' are taken.
        matches: (B,) 1 for a text that sees its own image.
    """
    seen, count = torch.arange(len(matches)), len(matches)
    wrong = (matches == 0).nonzero().squeeze(1)
    if false is None:
        seen[wrong] = (wrong + torch.randint(1, count, wrong.shape)) % count if len(wrong) else wrong
    else:
        seen[wrong] = count + torch.arange(len(wrong))
        image = image._replace(pixels=torch.cat([image.pixels, false.pixels[wrong]]))
    return {"image": image, "seen": seen, "matches": matches}
