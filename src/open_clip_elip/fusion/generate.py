"""Texts that a decoder writes about images: beam search by the rule of BLIP's release, greedy, nucleus sampling.

The release ran on transformers 4.15. Later versions divide scores by the number of new tokens alone, which prefers
longer captions, and stop by another test. A text does not depend on what else is in the batch.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from .bert import Memory, Past, extend


@torch.inference_mode()
def beam_search(
    decoder: BlipTextLMHeadModel, memory: Sequence[Memory], prompt: Tensor, end: int, *, beams: int = 3,
    longest: int = 20, shortest: int = 5, repetition: float = 1.0,
) -> Tensor:  # fmt: skip
    """The best text for each of M images (or questions).

    With n tokens so far, a text that ends among the `beams` best continuations has the score (sum of log-probabilities)
    / n. An image is done when as many have ended, none worse than (the best continuation, whether it ends or not) / n.

    Args:
        memory: of M images, from `bert.read`.
        prompt: (P,) ids that all begin with.
        end: id of the last token.
        longest, shortest: tokens, prompt included, and an end that is at most the last one.
        repetition: what log-probabilities of tokens that a text has already are multiplied by.

    Returns:
        (M, `longest`) ids, prompt included, `end` and 0 after the last.
    """
    images = len(memory[0].keys)
    ids = prompt.expand(images, -1)
    logits, past = _next(decoder, ids, [], memory)
    scores = logits.new_zeros(images, 1)  # of the R / M texts of each image that go on
    ended, texts = scores.new_full((images, beams), -torch.inf), ids.new_zeros(images, beams, longest)
    done = scores.new_zeros(images, dtype=torch.bool)
    for n in range(len(prompt), longest):
        words = _repeated(F.log_softmax(logits, dim=-1), ids, repetition)
        if n < shortest:
            words[:, end] = -torch.inf
        total = scores[..., None] + words.unflatten(0, scores.shape)
        best, place = total.flatten(1).topk(2 * beams)
        row = torch.arange(images, device=ids.device)[:, None] * scores.shape[1] + place // words.shape[1]
        word = place % words.shape[1]
        ends = (word == end)[:, :beams] & ~done[:, None]
        ending = F.pad(F.pad(ids[row[:, :beams]], (0, 1), value=end), (0, longest - n - 1))
        ended, texts = _best(ended, texts, (best[:, :beams] / n).masked_fill(~ends, -torch.inf), ending)
        done |= ended[:, -1] >= best[:, 0] / n
        on = (word == end).int().argsort(dim=1, stable=True)[:, :beams]
        scores, row = best.gather(1, on), row.gather(1, on).flatten()
        ids = torch.cat([ids[row], word.gather(1, on).view(-1, 1)], dim=1)
        if done.all() or n + 1 == longest:
            break
        logits, past = _next(decoder, ids, [tuple(one[row] for one in layer) for layer in past], memory)
    on = F.pad(ids, (0, longest - ids.shape[1])).unflatten(0, (images, beams))
    return _best(ended, texts, (scores / longest).masked_fill(done[:, None], -torch.inf), on)[1][:, 0]


def _best(scores: Tensor, texts: Tensor, more_scores: Tensor, more_texts: Tensor) -> tuple[Tensor, Tensor]:
    """The first K of (M, K) scores and (M, K, L) texts and as many others, in order."""
    found, which = torch.cat([scores, more_scores], dim=1).topk(scores.shape[1])
    texts = torch.cat([texts, more_texts], dim=1)
    return found, texts.take_along_dim(which[..., None], dim=1)


@torch.inference_mode()
def sample(
    decoder: BlipTextLMHeadModel, memory: Sequence[Memory], prompt: Tensor, end: int, *, longest: int = 20,
    shortest: int = 5, repetition: float = 1.1, top_p: float = 0.9, top_k: int = 50,
) -> Tensor:  # fmt: skip
    """A text for each of M images, of words at random from the likeliest; with `top_k` 1 of the likeliest (greedy).

    Args:
        top_p, top_k: see `nucleus`.
        others, return: see `beam_search`; `repetition` divides what is positive.
    """
    ids, past = prompt.expand(len(memory[0].keys), -1), []
    while ids.shape[1] < longest:
        logits, past = _next(decoder, ids, past, memory)
        logits = _repeated(logits, ids, repetition)
        if ids.shape[1] < shortest:
            logits[:, end] = -torch.inf
        word = torch.multinomial(nucleus(logits, top_p, top_k), 1)
        over = (ids[:, len(prompt) :] == end).any(dim=1, keepdim=True)
        ids = torch.cat([ids, word.masked_fill(over, 0)], dim=1)
        if (over | (word == end)).all():
            break
    return F.pad(ids, (0, longest - ids.shape[1]))


def nucleus(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """(R, V) probabilities of the `top_k` likeliest words, and of these of the fewest that together have `top_p`."""
    found, words = logits.topk(min(top_k, logits.shape[1]), dim=1)
    kept = F.softmax(found, dim=1)
    before = kept.cumsum(dim=1) - kept
    kept = kept.masked_fill(before > top_p, 0)
    return torch.zeros_like(logits).scatter(1, words, kept / kept.sum(dim=1, keepdim=True))


def _next(decoder: BlipTextLMHeadModel, ids: Tensor, past: Past, memory: Sequence[Memory]) -> tuple[Tensor, Past]:
    """Logits (R, V) of what comes after texts (R, L), all but whose last column is in `past` if there is one."""
    first = ids.shape[1] - 1 if past else 0
    places = torch.arange(first, ids.shape[1], device=ids.device)[None]
    x = decoder.bert.embeddings(ids[:, first:], position_ids=places)
    x, past = extend(decoder.bert.encoder.layer, x, past, memory)
    logits = decoder.cls(x[:, -1])
    return logits if logits.dtype == torch.float64 else logits.float(), past


def _repeated(scores: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """(R, V) scores, those of words in (R, L) further down."""
    if penalty == 1:
        return scores
    found = scores.gather(1, ids)
    return scores.scatter(1, ids, torch.where(found < 0, found * penalty, found / penalty))
