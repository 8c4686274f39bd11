"""BERT's layers, out of transformers, as fusion models run them: an image is read once for all texts that look at it,
a text attends to itself once for all images that it is compared with, and what nobody uses is not computed.

The modules and weights are transformers', of BERT or of BLIP's text model; only the way through them is ours.
Self-attention sees the whole text unless `causal` is asked for, while transformers' BERT with cross-attention is causal
wherever no mask reaches it, and its BLIP takes no mask of what is looked at.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForMaskedLM, BertModel
from transformers.models.bert.modeling_bert import BertAttention, BertLayer

Layers = Sequence[BertLayer]  # or BLIP's, whose parts have the same names
Past = list[tuple[Tensor, ...]]  # of each layer, keys and values (R, heads, t, D / heads) of t tokens of R texts


class Memory(NamedTuple):
    """What the cross-attention of one layer reads: keys and values, (M, heads, N, D / heads) each, of M images (or
    questions), and which of the N positions count, (M, 1, 1, N); None: all.

    Without `values`, `keys` are the states (M, N, D) themselves.
    """

    keys: Tensor
    values: Tensor | None
    mask: Tensor | None = None

    def __getitem__(self, which: Tensor | slice) -> Memory:
        """Of the images (questions) with these numbers."""
        return Memory(*(None if one is None else one[which] for one in self))


class Tokens(NamedTuple):
    """Which of the L columns of B texts are tokens: a mask (B, L); and their places (n,), counted through all rows.

    With `places`, layers run on the tokens alone; without, on all columns. `whole`: all columns are tokens.
    """

    mask: Tensor
    places: Tensor | None = None
    whole: bool = False

    @classmethod
    def all_of(cls, states: Tensor) -> Tokens:
        """Of states (B, L, D) without padding."""
        return cls(states.new_ones(states.shape[:2], dtype=torch.bool), whole=True)

    @classmethod
    def of(cls, mask: Tensor) -> Tokens:
        """With places. For those of a mask on a GPU the program waits."""
        return cls(mask, mask.flatten().nonzero().squeeze(1))

    def __getitem__(self, texts: Tensor) -> Tokens:
        mask = self.mask[texts]
        return Tokens(mask) if self.places is None else Tokens.of(mask)

    def find(self, places: Tensor) -> Tensor:
        """Which of the tokens that layers run on are at these places."""
        return places if self.places is None else torch.searchsorted(self.places, places)


class _Grid(NamedTuple):
    """Where tokens stand for attention, which takes texts of one length: their places in (B, length); None: all."""

    texts: int
    length: int
    places: Tensor | None = None

    def spread(self, x: Tensor) -> Tensor:
        """(n, D) to (B, length, D), 0 where no token stands."""
        if self.places is not None:
            x = x.new_zeros(self.texts * self.length, x.shape[1]).index_put((self.places,), x)
        return x.unflatten(0, (self.texts, self.length))

    def collect(self, x: Tensor) -> Tensor:
        """(B, length, D) to (n, D)."""
        return x.flatten(0, 1) if self.places is None else _rows(x.flatten(0, 1), self.places)


def text_encoder(config: dict[str, Any], layers: int) -> tuple[BertModel, nn.Module]:
    """The first `layers` of a BERT, and its language head, whose output weights are the word embeddings."""
    model = BertForMaskedLM(BertConfig(**config | {"num_hidden_layers": layers}))
    return model.bert, model.cls


def fusion_layers(config: dict[str, Any], layers: int) -> nn.ModuleList:
    """Layers of a BERT with cross-attention to states of its own width."""
    config = BertConfig(**config | {"num_hidden_layers": layers}, is_decoder=True, add_cross_attention=True)
    return BertModel(config, add_pooling_layer=False).encoder.layer


def read(layers: Layers, states: Tensor, mask: Tensor | None = None, *, once: bool = True) -> list[Memory]:
    """All that `layers` ever read of states (M, N, D), one entry a layer; `mask` (M, N): which of them count.

    once: compute keys and values, for all texts that look. False leaves them out, which is less work for one text.
    """
    unread = Memory(states, None, None if mask is None else mask[:, None, None].bool())
    return [_read(layer, unread) if once else unread for layer in layers]


def _read(layer: BertLayer, unread: Memory) -> Memory:
    own, (states, _, mask) = layer.crossattention.self, unread
    return Memory(_heads(own, own.key(states)), _heads(own, own.value(states)), mask)


def run(
    layers: Layers, x: Tensor, tokens: Tokens, memory: Sequence[Memory] | None = None, which: Tensor | None = None, *,
    texts: Tensor | None = None, causal: bool = False, only_first: bool = False, only: Tensor | None = None,
    shortcuts: bool = True,
) -> Tensor:  # fmt: skip
    """Texts through layers, maybe looking at images (answers at questions).

    Args:
        x: (B, L, D) states.
        tokens: of (B, L).
        memory: of M images, from `read`, one entry a layer; None: the layers' cross-attention is left out.
        which: (R,) the images of the last R of P pairs. The others look at the M images in order, as many at each, and
            for them nothing is copied. None: R is 0.
        texts: (P,) the text of each pair; None: each text is in one pair, P is B.
        causal: a token sees itself and those before it.
        only_first: nothing but the first token of the result is used, so the last layer computes it alone.
        only: (m,) places, counted through all rows of (P, L), that alone are used of the result.
        shortcuts: False runs as the released programs do: each text reads its image, all of all layers is computed.

    Returns:
        (P, L, D), 0 at columns that layers did not run on; with `only_first` (P, 1, D), with `only` (m, D).
    """
    if texts is not None and (len(layers) == 1 or not shortcuts):
        x, tokens, texts = x[texts], tokens[texts], None
    count, length = len(tokens.mask) if texts is None else len(texts), x.shape[1]
    if only_first:
        only = torch.arange(count, device=tokens.mask.device) * length
    x = _Grid(count, length, tokens.places).collect(x)
    for number, layer in enumerate(layers):
        seen, rest = None if memory is None else memory[number], None
        if which is not None:
            seen, rest = (seen[which], None) if len(which) == count else (seen, seen[which])
        pairs = None if texts is None else _pairs(tokens, texts)
        here = only if layer is layers[-1] and shortcuts else None
        if not (shortcuts or seen is None):
            seen = _read(layer, seen)
        args = layer, x, tokens, seen, rest, pairs, here, only_first, causal
        recomputed = layer.gradient_checkpointing and torch.is_grad_enabled()
        x = checkpoint(_layer, *args, use_reentrant=False) if recomputed else _layer(*args)
        (tokens, _), texts = pairs or (tokens, None), None
    if only is None:
        return _Grid(count, length, tokens.places).spread(x)
    x = x if shortcuts else _rows(x, tokens.find(only))
    return x[:, None] if only_first else x


def _pairs(tokens: Tokens, texts: Tensor) -> tuple[Tokens, Tensor]:
    """Tokens of P texts out of B, and which of the B's each is."""
    found, length = tokens[texts], tokens.mask.shape[1]
    places = torch.arange(found.mask.numel(), device=texts.device) if found.places is None else found.places
    return found, tokens.find(texts[places // length] * length + places % length)


def _layer(
    layer: BertLayer, x: Tensor, tokens: Tokens, seen: Memory | None, rest: Memory | None,
    pairs: tuple[Tokens, Tensor] | None, only: Tensor | None, only_first: bool, causal: bool,
) -> Tensor:  # fmt: skip
    """Tokens (n, D) through a layer, out of whose self-attention come those of `pairs`, and only those at `only`.

    rest: what the last pairs look at.
    """
    own, (count, length) = layer.attention.self, tokens.mask.shape
    mask = None if tokens.whole else tokens.mask[:, None, None].to(x.device)
    if causal:
        mask = mask & torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    grid = _Grid(count, length, tokens.places)
    itself = Memory(*(_heads(own, grid.spread(one(x))) for one in (own.key, own.value)), mask)
    if only is not None:
        x, grid = _rows(x, tokens.find(only)), _Grid(count, 1) if only_first else _Grid(count, length, only)
    x = _attend(layer.attention, x, grid, itself)
    if seen is not None:
        again = None
        if pairs is not None:
            of, again = pairs
            grid = _Grid(*of.mask.shape, of.places)
        x = _attend(layer.crossattention, x, grid, seen, rest, again)
    return layer.feed_forward_chunk(x)


def _attend(
    attention: BertAttention, x: Tensor, grid: _Grid, seen: Memory, rest: Memory | None = None,
    again: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """again: (n,) which of the tokens `x` ask, and go on; None: each does, once."""
    own, query = attention.self, attention.self.query(x)
    if again is not None:
        query, x = query[again], x[again]
    query = grid.spread(query)
    if rest is None:
        out = _see(own, query, seen)
    else:
        first = grid.texts - len(rest.keys)
        out = torch.cat([_see(own, query[:first], seen), _see(own, query[first:], rest)])
    return attention.output(grid.collect(out), x)


def _see(own: nn.Module, query: Tensor, seen: Memory) -> Tensor:
    """Attention of P texts, (P, L, D), to M images, P / M of them to each, as if these were one text."""
    asking = _heads(own, query.reshape(len(seen.keys), -1, query.shape[2]))
    dropout = own.dropout.p if own.training else 0.0
    if seen.values is None and not all(isinstance(one, nn.Linear) for one in (own.key, own.value)):
        # LoRA by peft, whose `weight` is that below it.
        seen = Memory(_heads(own, own.key(seen.keys)), _heads(own, own.value(seen.keys)), seen.mask)
    if seen.values is None:
        out = _look(own, asking, seen, dropout)
    else:
        out = F.scaled_dot_product_attention(asking, *seen, dropout)
    return out.transpose(1, 2).reshape(query.shape)


def extend(layers: Layers, x: Tensor, past: Past, memory: Sequence[Memory]) -> tuple[Tensor, Past]:
    """Texts that are being written, each token after those before it.

    Args:
        x: (R, T, D) states of T more tokens of R texts, R / M for each image in turn.
        past: what the call before returned, with as many rows; []: there were no tokens yet.
        memory: of M images, from `read`.

    Returns:
        (R, T, D), and `past` for the call after.
    """
    (rows, new, _), kept = x.shape, []
    for number, layer in enumerate(layers):
        own, seen = layer.attention.self, memory[number]
        itself = tuple(_heads(own, one(x)) for one in (own.key, own.value))
        if past:
            itself = tuple(torch.cat(pair, dim=2) for pair in zip(past[number], itself, strict=True))
        kept.append(itself)
        out = F.scaled_dot_product_attention(_heads(own, own.query(x)), *itself, is_causal=not past)
        x = layer.attention.output(out.transpose(1, 2).flatten(2), x).flatten(0, 1)
        x = _attend(layer.crossattention, x, _Grid(rows, new), seen)
        x = layer.feed_forward_chunk(x).view(rows, new, -1)
    return x, kept


def _look(own: nn.Module, query: Tensor, seen: Memory, dropout: float) -> Tensor:
    """Attention of queries (B, heads, L, d) to states (B, N, D) whose keys and values are never computed.

    q . (W h + b) = (W^T q) . h + q . b, and likewise behind the softmax: N products with D x D become 2L.
    """
    states, d = seen.keys, query.shape[-1]
    of_keys, of_values = (one.weight.unflatten(0, (-1, d)) for one in (own.key, own.value))  # (heads, d, D)
    key_bias, value_bias = (one.bias.view(-1, 1, d) for one in (own.key, own.value))
    scores = ((query @ of_keys).flatten(1, 2) @ states.transpose(1, 2)).unflatten(1, query.shape[1:3])
    scores = (scores + (query * key_bias).sum(dim=-1, keepdim=True)) * d**-0.5
    if seen.mask is not None:
        scores = scores.masked_fill(~seen.mask, -torch.inf)
    weights = F.dropout(F.softmax(scores, dim=-1), dropout)
    found = (weights.flatten(1, 2) @ states).unflatten(1, query.shape[1:3])
    return found @ of_values.transpose(1, 2) + weights.sum(dim=-1, keepdim=True) * value_bias


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """(m, D) of (n, D) at different places, for which the gradient need not be sorted; on `meta` they may be real."""
    return x[places] if x.is_meta else x.index_select(0, places.to(x.device))


def _heads(attention: nn.Module, x: Tensor) -> Tensor:
    """(B, L, D) as (B, heads, L, D / heads)."""
    return x.unflatten(2, (attention.num_attention_heads, -1)).transpose(1, 2)
