"""Retrieval in two steps: shortlists by the cosine of features, ranked again by what the fusion layers say of pairs."""
from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from open_clip_train.precision import get_autocast
from torch import Tensor, nn

from ..distributed import Ranks
from ..errors import UserError
from .metrics import full_float32
from .passes import Halving, check_finite, gather_rows

TEXTS = 256  # that are compared with an image at a time
TIE = 1e-5  # of the largest score: by so little do scores of equal pairs differ, in float32
RECALLS = 1, 5, 10


@full_float32()
def shortlist(query: Tensor, gallery: Tensor, best: int, chunk: int = 1024) -> Tensor:
    """(n, min(best, m)) rows of a gallery (m, D) that are nearest to each query (n, D)."""
    best = min(best, len(gallery))
    found = [(part @ gallery.t()).topk(best, dim=1).indices for part in query.split(chunk)]
    return torch.cat(found).cpu()


def ranks_within(scores: Tensor, right: Tensor) -> Tensor:
    """(n,) how many wrong items of a shortlist are not clearly behind the best right one, of scores (n, k) and which
    are right (n, k); where none is, more than there are."""
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    ahead = (scores >= best - TIE * scores.abs().max()) & ~right
    return ahead.sum(dim=1).masked_fill(~right.any(dim=1), torch.iinfo(torch.int64).max)


def score_pairs(
    model: nn.Module, tokens: Tensor, pairs: Tensor | None, states: Iterable[tuple[Tensor, Tensor]], *, ranks: Ranks,
    precision: str, name: Callable[[int], str],
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Numbers (b,) of pairs, and scores (b,): the logit that image and text match. Each image is read once.

    Args:
        model: with `text_states`, `read` and `match`, see `fusion.base`.
        tokens: (M, L), shorter texts first, so that those that are compared together are cut together.
        pairs: (P,) image * M + text, ascending; None: all, by these numbers.
        states: this process's images and their states (B, N, D).
        name: of a pair's number, as of `check_finite`.
    """
    autocast = get_autocast(precision, device_type=ranks.device.type)
    tokens = tokens.to(ranks.device)
    lengths, memory = (tokens != model.pad).sum(dim=1), None

    def match(texts: Tensor) -> Tensor:
        length = int(lengths[texts].max())
        return model.match(text_states[texts, :length], tokens[texts, :length], memory)[:, 1]

    encode, match = Halving(model.text_states), Halving(match)
    with torch.inference_mode(), autocast():
        text_states = torch.cat([encode(part) for part in tokens.split(TEXTS)])
    for images, batch in states:
        for image, one in zip(images.tolist(), batch, strict=True):
            span = torch.tensor([image, image + 1]) * len(tokens)
            first, last = (span if pairs is None else torch.searchsorted(pairs, span)).tolist()
            with torch.inference_mode(), autocast():
                memory = model.read(one[None].to(ranks.device))
                numbers = torch.arange(first, last)
                texts = ((numbers if pairs is None else pairs[first:last]) % len(tokens)).to(ranks.device)
                scores = torch.cat([match(part) for part in texts.split(TEXTS)]).cpu()
            check_finite(scores, numbers, name)
            yield numbers, scores


def rerank(
    model: nn.Module, features: tuple[Tensor, Tensor], tokens: Tensor, states: Iterable[tuple[Tensor, Tensor]], *,
    best: int, ranks: Ranks, precision: str, name: Callable[[int, int], str], image_of: Tensor,
    same_text: Tensor | None = None,
) -> dict[str, float]:  # fmt: skip
    """Recalls in both directions after the fusion layers have ranked shortlists of `best`; the same on every process.

    A pair that is on the shortlist of its image, of its text, or of both, is scored once: by the logit that it matches,
    of some models with its cosine added. What is on no shortlist is behind all that is. Ties count against the model. A
    collective call.

    Args:
        model, states: see `score_pairs`; all processes' images together are all.
        features: (N, D), (M, D), of unit length.
        tokens: (M, L) token ids.
        name: what the score of an image and a text is called, by their rows.
        image_of, same_text: see `retrieval_metrics`.

    Returns:
        `reranked_image_to_text_R@n` and `reranked_text_to_image_R@n` for n = 1, 5, 10 up to `best`, as fractions; with
        all six of them `reranked_r_mean`, their mean.

    Raises:
        NotFinite: a score is none. UserError: an image has no states.
    """
    order = (tokens != model.pad).sum(dim=1).argsort(stable=True)
    image, text, tokens = features[0], features[1][order], tokens[order]
    count, begin = len(text), time.monotonic()
    listed = None
    if ranks.is_main:  # only there: on another kind of device the last digits could differ
        near, far = image.to(ranks.device), text.to(ranks.device)
        listed = {
            "image_to_text": torch.arange(len(image))[:, None] * count + shortlist(near, far, best),
            "text_to_image": shortlist(far, near, best) * count + torch.arange(count)[:, None],
        }
    listed = ranks.broadcast(listed)
    pairs = torch.cat([codes.flatten() for codes in listed.values()]).unique()
    numbers, scores = gather_rows(
        score_pairs(
            model, tokens, pairs, states, ranks=ranks, precision=precision,
            name=lambda number: name(int(pairs[number]) // count, int(order[int(pairs[number]) % count])),
        ), ranks,
    )  # fmt: skip
    if len(numbers) < len(pairs):
        raise UserError("A picture could be read once, and not a second time; see that all stay where they are.")
    if model.adds_cosine:
        parts = [(image[part // count] * text[part % count]).sum(dim=1) for part in pairs.split(2**16)]
        scores = scores + torch.cat(parts).to(scores)
    seconds = time.monotonic() - begin
    logging.info(f"{len(pairs):,} pairs compared by the fusion layers, {len(pairs) / seconds:,.0f} a second.")

    labels = (image_of if same_text is None else same_text)[order]
    span = int(labels.max()) + 1
    owned = (image_of[order] * span + labels).unique()
    metrics = {}
    for way, codes in listed.items():
        right = torch.isin(codes // count * span + labels[codes % count], owned)
        found = ranks_within(scores[torch.searchsorted(pairs, codes)], right)
        metrics |= {f"reranked_{way}_R@{n}": (found < n).sum().item() / len(found) for n in RECALLS if n <= best}
    if len(metrics) == 2 * len(RECALLS):
        metrics["reranked_r_mean"] = sum(metrics.values()) / len(metrics)
    return metrics
