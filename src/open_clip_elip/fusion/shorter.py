"""Texts that lose tokens halfway: `bert.run` of layers of which the later ones see what a `TextReduction` leaves."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reduction.merge import gather_tokens, norm
from ..reduction.text import TextReduction
from .bert import BertLayer, Layers, Memory, Tokens, _heads, run


class Shortening(NamedTuple):
    """How texts (B, L) lose tokens.

    clue: (M, D) what chooses among the tokens of texts that look at M images, at the texts' width; for "learned".
    stays: (n,) places of tokens that stay, counted through all rows, ascending; the first of each text does anyway.
    """

    reduction: TextReduction
    clue: Tensor | None = None
    stays: Tensor | None = None


class Shorter(NamedTuple):
    """What is left of B texts of L columns: states (B, K, D), and which are tokens. columns: (B, K) where they were;
    None: all are there."""

    states: Tensor
    tokens: Tokens
    columns: Tensor | None = None
    length: int = 0  # L

    def find(self, places: Tensor) -> Tensor:
        """Where the tokens that stay always are now, given the places of all but the first ones."""
        if self.columns is None:
            return places
        rows = places // self.length
        number = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
        return rows * self.columns.shape[1] + 1 + number

    def spread(self, states: Tensor) -> Tensor:
        """(B, K, D) to (B, L, D), 0 where nothing is left."""
        states = states.masked_fill(~self.tokens.mask.to(states.device)[..., None], 0)
        wide = states.new_zeros(len(states), self.length, states.shape[2])
        return wide.scatter_add(1, self.columns[..., None].expand_as(states), states)


def run_shorter(
    how: Shortening | None, first: int, layers: Layers, x: Tensor, tokens: Tokens,
    memory: Sequence[Memory] | None = None, which: Tensor | None = None, *, texts: Tensor | None = None,
    only: Tensor | None = None, only_first: bool = False, shortcuts: bool = True,
) -> Tensor:  # fmt: skip
    """As `bert.run`; the layers from `first` on see fewer tokens of each pair's text (None: all), and where a token is
    gone the result is 0."""
    more: dict[str, Any] = {"only_first": only_first, "shortcuts": shortcuts}
    if how is None:
        return run(layers, x, tokens, memory, which, texts=texts, only=only, **more)
    if first:
        seen = None if memory is None else memory[:first]
        x = run(layers[:first], x, tokens, seen, which, texts=texts, shortcuts=shortcuts)
    elif texts is not None:
        x = x[texts]
    left = shorten(how, layers[first], x, tokens if texts is None else tokens[texts], which)
    only, seen = None if only is None else left.find(only), None if memory is None else memory[first:]
    x = run(layers[first:], left.states, left.tokens, seen, which, only=only, **more)
    return x if only_first or only is not None else left.spread(x)


def shorten(how: Shortening, layer: BertLayer, x: Tensor, tokens: Tokens, which: Tensor | None = None) -> Shorter:
    """Of states (P, L, D), what goes on into `layer`; `which`: see `bert.run`."""
    always, most, scores = torch.zeros_like(tokens.mask), 1, None
    if how.stays is not None:
        always = always.flatten().index_fill(0, how.stays, True).view_as(always)
    always[:, 0] = True
    if how.stays is not None:
        most = int(always.sum(dim=1).max())
    if how.reduction.rule == "learned":
        clue, others = how.clue, len(x) if which is None else len(x) - len(which)
        clue = clue.repeat_interleave(others // len(clue), dim=0)
        scores = asked(layer, x, tokens.mask, clue if which is None else torch.cat([clue, how.clue[which]]))
    columns, mask = how.reduction.choose(tokens.mask, always, scores, most=most, device=x.device)
    left = Tokens(mask) if tokens.places is None else Tokens.of(mask)
    return Shorter(gather_tokens(x, columns), left, columns, x.shape[1])


@torch.no_grad()
def asked(layer: BertLayer, x: Tensor, mask: Tensor, clue: Tensor) -> Tensor:
    """(P, L) scores of tokens (P, L, D): the attention of the layer, mean over heads, if what asked were not the first
    token but the clue (P, D) at its length."""
    own = layer.attention.self
    clue = clue[:, None] * (norm(x[:, :1]) / norm(clue[:, None]).clamp_min(1e-12)).to(clue.dtype)
    query, keys = _heads(own, own.query(clue)), _heads(own, own.key(x))
    logits = (query @ keys.transpose(2, 3)) * query.shape[-1] ** -0.5  # (P, heads, 1, L)
    logits = logits.masked_fill(~mask[:, None, None].to(x.device), -torch.inf)
    return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).mean(dim=1)[:, 0]
