"""Training steps of the fusion models, as functions of model, momentum twin, queues and batch."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .albef import Albef
from .base import AligningModel
from .bert import Memory, Tokens
from .blip import Blip
from .meter import Meter, MeterRetriever
from .momentum import Queue
from .objectives import FLOOR, distilled, draw, mixed_targets, negative_weights, similarities
from .shorter import Shortening

SMOOTHING = 0.1  # of the labels of BLIP's language modelling


class Taught(NamedTuple):
    """What the twin says about B pairs: unit-length features (B, D), and logits (n, vocabulary) of masked words."""

    image: Tensor
    text: Tensor
    words: Tensor | None = None


class Aligned(NamedTuple):
    """What a step has computed when image and text are aligned, for further losses."""

    losses: dict[str, Tensor]
    memory: list[Memory]
    how: Shortening | None = None  # texts have lost tokens


@torch.no_grad()
def teach(
    twin: AligningModel, image: Tensor, text: Tensor, tokens: Tokens | None = None, masked: Tensor | None = None,
    chosen: Tensor | None = None,
) -> Taught:  # fmt: skip
    """Arguments as `align` and `albef_losses`; the twin sees all tokens of images and texts."""
    t = twin.encode_text(text, normalize=True, tokens=tokens)
    if masked is None:
        return Taught(twin.encode_image(image, normalize=True, reduce=False), t)
    states = twin.image_states(image, reduce=False)
    i = F.normalize(twin.vision_proj(states[:, 0]), dim=-1)
    return Taught(i, t, twin.words(masked, chosen, twin.read(states, once=False), tokens))


def align(
    model: AligningModel, taught: Taught, queues: Mapping[str, Queue], image: Tensor, text: Tensor, *, alpha: float,
    numbers: Tensor | None = None, remembered: Tensor | None = None, negatives: Sequence[Tensor] | None = None,
    floor: float = FLOOR, reduce: bool | None = None, tokens: Tokens | None = None,
    everywhere: Callable[[Tensor], Tensor] | None = None, how: Shortening | None = None,
) -> Aligned:  # fmt: skip
    """Contrast (ITA) of B pairs with the twin's features and queues of these, and matching (ITM).

    Args:
        queues: `image` and `text`.
        image, text: (B, 3, H, W); (B, L) token ids.
        alpha: weight of the twin's targets.
        numbers: (B,) of the images; texts of images with one number belong to each of them. None: all differ.
        remembered: (Q,) numbers of the queues' columns, where there are `numbers`.
        negatives: (B,) the negative image of each text, (B,) the negative text of each image; None: drawn.
        floor: see `objectives.negative_weights`.
        reduce: remove tokens of the image, guided by the text. None: by the image alone, if its tower does so.
        tokens: of the text; None: layers run on all columns.
        everywhere: negatives are those of the rows that this makes of the batch's, all processes' maybe, with their
            gradient, by the model's own features and `numbers` (BLIP's retrieval); then `negatives` are rows of these.
            None: those of the batch, by what contrast computes.
        how: texts lose tokens; None: they do not. Where the image chooses before the text is read, it is reduced by
            itself.
    """
    tokens = tokens or Tokens(model.mask(text))
    chooses = how is not None and how.reduction.rule == "learned"
    waits = chooses and model.half < len(model.text.encoder.layer)
    states = None if waits else model.text_states(text, tokens, how=how)
    guidance = model.guidance(states) if reduce and not waits else None
    image_states = model.image_states(image, guidance, reduce=reduce)
    if chooses:
        how = how._replace(clue=model.clue(image_states))
    if waits:
        states = model.text_states(text, tokens, how=how)
    t, i = (F.normalize(x, dim=-1) for x in (model.text_proj(states[:, 0]), model.vision_proj(image_states[:, 0])))

    pairs = torch.eye(len(text), dtype=torch.bool, device=text.device)
    positives = F.pad(pairs, (0, queues["text"].size))
    if numbers is not None:
        positives = numbers[:, None] == torch.cat([numbers, remembered.to(numbers)])
    i2t = similarities(i, taught.text, queues["text"].columns, model.temp)
    t2i = similarities(t, taught.image, queues["image"].columns, model.temp)
    with torch.no_grad():
        teachers = (
            similarities(taught.image, taught.text, queues["text"].columns, model.temp),
            similarities(taught.text, taught.image, queues["image"].columns, model.temp),
        )
    ita = sum(
        F.cross_entropy(logits, mixed_targets(teacher, positives, alpha))
        for logits, teacher in zip((i2t, t2i), teachers, strict=True)
    ) / 2

    if everywhere is not None:
        numbers_of, i_of, t_of = (everywhere(one.detach()) for one in (numbers, i, t))
        if negatives is None:
            both = ((t, i_of), (i, t_of))
            same, temp = numbers[:, None] == numbers_of, model.temp.detach()
            negatives = [draw(negative_weights(one @ other.t() / temp, same, floor)) for one, other in both]
        images, texts = negatives
        memory = model.read(torch.cat([image_states, everywhere(image_states)[images]]))
        longer = F.pad(text, (0, model.caption_length - text.shape[1]))
        own, rows = torch.arange(len(text), device=text.device), torch.cat([longer, longer, everywhere(longer)[texts]])
        rows = rows[:, : int(model.mask(rows).sum(dim=1).max())]
        logits = model.match(model.text_states(rows), rows, memory, torch.cat([own, own + len(text), own]))
        return Aligned({"ita": ita, "itm": matched(logits, images, texts)}, memory)

    own = positives[:, : len(text)]
    if negatives is None:
        negatives = [draw(negative_weights(logits[:, : len(text)], own, floor)) for logits in (t2i, i2t)]
    memory = model.read(image_states)
    return Aligned({"ita": ita, "itm": matching(model, states, text, tokens, memory, *negatives, how)}, memory, how)


def matching(
    model: AligningModel, states: Tensor, text: Tensor, tokens: Tokens, memory: list[Memory], images: Tensor,
    texts: Tensor, how: Shortening | None = None,
) -> Tensor:  # fmt: skip
    """ITM: pairs, texts with negative images, images with negative texts, in one pass of the fusion layers.

    Args:
        images: (B,) the negative image of each text; -1: it has none, and is left out. texts: likewise.
        others: see `AligningModel.match`.
    """
    own, more = torch.arange(len(text), device=images.device), {"tokens": tokens, "how": how}
    if model.tower.shortcuts:  # an image's own text and its negative one side by side: for them it is not copied
        of = torch.cat([torch.stack([own, texts], dim=1).flatten(), own])
        logits = model.match(states, text, memory, images, texts=of, **more)
        logits = torch.cat([logits[: 2 * len(text) : 2], logits[2 * len(text) :], logits[1 : 2 * len(text) : 2]])
    else:
        which, of = torch.cat([images, own]), torch.cat([own, texts])
        pairs = model.match(states, text, memory, **more)
        logits = torch.cat([pairs, model.match(states, text, memory, which, texts=of, **more)])
    return matched(logits, images, texts)


def matched(logits: Tensor, images: Tensor, texts: Tensor) -> Tensor:
    """Of pairs, texts with negative images, images with negative texts, (3B, 2); those that have none do not count."""
    labels = (torch.arange(len(logits), device=logits.device) < len(images)).long()
    counts = torch.cat([torch.ones_like(images) > 0, images >= 0, texts >= 0]).to(logits.device)
    return F.cross_entropy(logits, labels.where(counts, -100))


def albef_losses(
    model: Albef, taught: Taught, queues: Mapping[str, Queue], image: Tensor, text: Tensor, *, masked: Tensor,
    chosen: Tensor, labels: Tensor, alpha: float, tokens: Tokens | None = None, **more,
) -> dict[str, Tensor]:  # fmt: skip
    """ITA + ITM + MLM (ALBEF, Eq. 6), with the tokens of images and texts reduced if the model does so.

    Args:
        masked, chosen, labels: see `objectives.mask_tokens`.
        others: see `align`.
    """
    tokens = tokens or Tokens(model.mask(text))
    more |= {"alpha": alpha, "tokens": tokens, "reduce": model.tower.reduces, "how": model.shortening()}
    losses, memory, how = align(model, taught, queues, image, text, **more)
    logits = model.words(masked, chosen, memory, tokens, how)
    return losses | {"mlm": distilled(logits, labels, taught.words, alpha)}


def blip_losses(
    model: Blip, taught: Taught, queues: Mapping[str, Queue], image: Tensor, text: Tensor, *, chosen: Tensor,
    tokens: Tokens | None = None, **more,
) -> dict[str, Tensor]:  # fmt: skip
    """ITC + ITM + LM (BLIP, Sec. 3.2), with the tokens of images and, for ITC and ITM, of texts reduced if the model
    does so.

    Args:
        chosen: (n,) places of the texts, counted through all rows, whose next tokens are to be written.
        others: see `align`.
    """
    tokens = tokens or Tokens(model.mask(text))
    more |= {"tokens": tokens, "reduce": model.tower.reduces, "how": model.shortening()}
    losses, memory, _ = align(model, taught, queues, image, text, **more)
    return losses | {"lm": written(model.next_words(text, chosen, memory, tokens=tokens), text, chosen)}


def meter_losses(
    model: Meter, image: Tensor, text: Tensor, *, labels: Tensor, matches: Tensor, **more: Any
) -> dict[str, Tensor]:
    """MLM + ITM (METER, Sec. 3.3).

    Args:
        labels: (n,) what was at the places `chosen`.
        matches: (B,) 1 where the image `seen` is the text's own, 0 where not.
        others: see `meter_logits`.
    """
    words, judged = meter_logits(model, image, text, **more)
    return {"mlm": distilled(words, labels, None, 0), "itm": F.cross_entropy(judged, matches)}


def meter_logits(
    model: Meter, image: Tensor, text: Tensor, *, masked: Tensor, chosen: Tensor, seen: Tensor,
    tokens: Tokens | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Logits (n, vocabulary) of masked words, (B, 2) of matching. If the model reduces the tokens of images, it does so
    by masked captions for the words, and for matching by captions that may be another image's; where images choose
    the tokens of texts, each by itself.

    Args:
        image: (M, 3, H, W), first those of the B pairs, then maybe others.
        text: (B, L) token ids.
        masked, chosen: see `objectives.mask_tokens`.
        seen: (B,) the image that each text is to match.
        tokens: of the text; None: layers run on all columns.
    """
    tokens, count, own = tokens or Tokens(model.mask(text)), len(text), torch.arange(len(text), device=text.device)
    which, reduce, how = torch.cat([own, seen]), model.tower.reduces, model.shortening()
    if how is not None and how.reduction.rule == "learned":
        images, clues = stream_of(model, image, None, which, reduce=reduce)
        ways = [how._replace(clue=one) for one in clues.split(count)]
    else:
        images, ways = None, [how, how]
    if how is not None:
        ways[0] = ways[0]._replace(stays=chosen)
    masks, texts = (model.read_text(one, tokens, way) for one, way in zip((masked, text), ways, strict=True))
    if images is None:
        firsts = torch.cat([masks.states[:, 0], texts.states[:, 0]])
        images, _ = stream_of(model, image, firsts, which, reduce=reduce)
    words = model.words(masks.states, masks.tokens, images[:count], masks.find(chosen))
    return words, model.judge(model.pooled(texts.states, texts.tokens, images[count:]))


def ranking_losses(
    model: MeterRetriever, image: Tensor, text: Tensor, *, seen: Tensor, matches: Tensor, tokens: Tokens | None = None,
    reduce: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """The true caption of each image ranked before false ones, and ITM, whose head learns nothing (METER's fine-tuning
    for retrieval).

    Args:
        text: (B * C, L) token ids: for each image its own caption, then C - 1 false ones.
        reduce: remove tokens of an image, by each caption.
        others: see `meter_losses`; of the own captions.
    """
    tokens, count = tokens or Tokens(model.mask(text)), len(seen)
    each, own = len(text) // count, torch.arange(0, len(text), len(text) // count, device=text.device)
    states = model.text_states(text, tokens)
    which = torch.cat([torch.arange(count, device=text.device).repeat_interleave(each), seen])
    images, _ = stream_of(model, image, torch.cat([states, states[own]])[:, 0], which, reduce=reduce)
    scores = model.judge(model.pooled(states, tokens, images[: len(text)]))[:, 1].view(count, each)
    matching = model.pooled(states[own], Tokens(tokens.mask[own]), images[len(text) :])
    rank = F.cross_entropy(scores, torch.zeros_like(seen))
    return {"rank": rank, "itm": F.cross_entropy(model.itm_head(matching), matches)}


def stream_of(
    model: Meter, image: Tensor, guidance: Tensor | None, which: Tensor, *, reduce: bool
) -> tuple[Tensor, Tensor]:
    """(P, N, H) what the streams begin with, and (P, D) the first states, of the image `which` (P,) of each text.

    guidance: (P, D) the texts' first states, by which images are reduced; None: by themselves.
    """
    if not model.tower.shortcuts:  # as the release: an image is read for each text anew
        image, which = image[which], torch.arange(len(which), device=which.device)
    if not reduce or guidance is None:
        states = model.image_states(image, reduce=reduce)
        return model.image_stream(states)[which], states[which, 0]
    states = model.image_states(image, guidance.contiguous(), reduce=True, which=which)
    return model.image_stream(states), states[:, 0]


def written(logits: Tensor, text: Tensor, chosen: Tensor) -> Tensor:
    """Language modelling: the mean loss of `logits` (n, vocabulary) of what comes after the places `chosen` (n,)."""
    return F.cross_entropy(logits, text.flatten()[chosen + 1], label_smoothing=SMOOTHING)
