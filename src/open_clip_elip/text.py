"""Text towers without the padding: a causal tower that is pooled at the end of text never needs what comes after it.

Exact: no token sees a later one. Captions of 15 tokens then cost 15 tokens, not the 77 of the context.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from .blocks import is_sharded, is_untouched, run_in_place
from .reduction.attention import add_attention, add_mlp, asked_once, attention, in_effect, project_some, split_heads
from .reduction.merge import gather_tokens
from .reduction.text import TextReduction

MAX_PARTS = 4
# Of compiled models: each shape of the captions is compiled once, so there must not be too many.
COMPILED_PARTS, COMPILED_MULTIPLE = 2, 8
_CAUSAL = WeakTensorKeyDictionary()  # of masks: at which version it was seen, and whether it was causal then
MIN_ROWS = 8  # of a part: fewer captions at a time do not fill a matrix product


class TextParts(NamedTuple):
    """A batch of B tokenized captions, sorted by length and cut."""

    parts: tuple[Tensor, ...]  # (b, T) long each, of equal b up to one; all captions, the shortest first
    place: Tensor  # (B,) long, where each caption of the batch is among them

    def to(self, device: torch.device, non_blocking: bool = False) -> TextParts:
        return self._map(lambda ids: ids.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TextParts:
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> TextParts:
        return TextParts(tuple(map(function, self.parts)), function(self.place))

    def whole(self, length: int) -> Tensor:
        """The captions as they were, (B, T) for a context of T = `length`, padded with 0."""
        return torch.cat([F.pad(part, (0, length - part.shape[1])) for part in self.parts]).index_select(0, self.place)


def count_columns(text: TextParts | Tensor) -> int:
    """Tokens, padding included, that go through the text tower."""
    return sum(part.numel() for part in text.parts) if isinstance(text, TextParts) else text.numel()


def text_tower(model: nn.Module) -> nn.Module:
    """What holds a CLIP model's text parts: `model.text`, or for `open_clip.CLIP` the model itself."""
    return getattr(model, "text", model)


def can_cut(model: nn.Module) -> bool:
    """Whether the model's text tower is one of OpenCLIP's, causal, pooled at the end of text, and untouched."""
    tower = text_tower(model)
    if tower is not model and (not is_untouched(tower) or tower.output_tokens):
        return False
    causal = getattr(tower, "cls_emb", None) is None and _is_causal(tower)
    if not causal or _pool_type(tower) not in ("argmax", "eos") or not tower.transformer.batch_first:
        return False
    ends = tower.token_embedding, tower.transformer, tower.ln_final, tower.text_projection
    parts = [*ends, *tower.transformer.resblocks]
    return all(is_untouched(part) or is_sharded(part) for part in parts if isinstance(part, nn.Module))


@asked_once
def _is_causal(tower: nn.Module) -> bool:
    """Whether the tower's mask is that of OpenCLIP, and was not edited since; looked at anew only if it was."""
    mask = getattr(tower, "attn_mask", None)
    if mask is None or mask.is_meta:
        return mask is not None
    version = object() if mask.is_inference() else mask._version
    if _CAUSAL.get(mask, ())[:1] != (version,):
        causal = mask.is_floating_point() and mask.equal(torch.full_like(mask, -torch.inf).triu(1))
        _CAUSAL[mask] = version, causal
    return _CAUSAL[mask][1]


def cut_text(text: Tensor, model: nn.Module, max_parts: int = MAX_PARTS, multiple: int = 1) -> TextParts | Tensor:
    """Captions (B, T) cut behind their ends, in up to `max_parts` parts of like length, a multiple of `multiple`; or as
    they are, if the model's text tower needs all of them, or if it has no shortcuts (see `with_shortcuts`). For token
    ids on a GPU this waits for the device, so call it before the batch goes there."""
    image_tower = getattr(model, "tower", None)
    if image_tower is None or not image_tower.shortcuts or not can_cut(model) or not len(text):
        return text
    lengths = end_of_text(text_tower(model), text).cpu() + 1
    order = lengths.argsort(stable=True)
    count = max(1, min(max_parts, len(text) // MIN_ROWS))
    parts = []
    for rows in order.tensor_split(count):
        length = min(-(-int(lengths[rows[-1]]) // multiple) * multiple, text.shape[1])
        parts.append(text.index_select(0, rows.to(text.device))[:, :length].contiguous())
    return TextParts(tuple(parts), order.argsort().to(text.device))


def end_of_text(tower: nn.Module, text: Tensor) -> Tensor:
    """(B,) place of the token at which the tower is pooled."""
    if _pool_type(tower) == "eos":
        eos_id = getattr(tower, "text_eos_id", None) or getattr(tower, "eos_id", None)
        return (text == eos_id).int().argmax(dim=-1)
    return text.argmax(dim=-1)  # the end-of-text token has the highest number


def encode_parts(model: nn.Module, text: TextParts, fewer: TextReduction | None = None) -> Tensor:
    """Text features (B, embed_dim), not normalized, in the batch's order, of a model for which `can_cut`; `fewer`
    tokens, if that is given, in the second half of the layers.

    The captions of all parts are rows of one matrix (R, D), so that a layer is one product with each of its weights;
    only in the attention is each part by itself.
    """
    tower = text_tower(model)
    transformer, shapes = tower.transformer, [part.shape for part in text.parts]
    dtype, lengths = transformer.get_cast_dtype(), [part.numel() for part in text.parts]
    # Looked up together: each lookup has a gradient of the size of the vocabulary.
    x = tower.token_embedding(torch.cat([part.flatten() for part in text.parts])).to(dtype)
    places, ends = tower.positional_embedding.to(dtype), [end_of_text(tower, part) for part in text.parts]
    parts = [rows.view(*shape, -1) + places[: shape[1]] for rows, shape in zip(x.split(lengths), shapes, strict=True)]
    x = torch.cat([part.flatten(0, 1) for part in parts])
    layers = len(transformer.resblocks)
    for number, block in enumerate(transformer.resblocks):
        if fewer is not None and number == layers // 2:
            x, shapes, ends = _leave(fewer, x, shapes, ends)
        function, more = (_run_at, (ends,)) if number == layers - 1 else (_run, ())
        run = partial(run_in_place, function=function) if hasattr(block, "unshard") else function
        if transformer.grad_checkpointing and torch.is_grad_enabled():
            run = partial(checkpoint, run, use_reentrant=False)
        x = run(block, x, shapes, *more)
    x, projection = tower.ln_final(x).index_select(0, text.place), tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def _leave(
    fewer: TextReduction, x: Tensor, shapes: Sequence[tuple[int, int]], ends: Sequence[Tensor]
) -> tuple[Tensor, list[tuple[int, int]], list[Tensor]]:
    """Of `x` (R, D), as in `_run`, what is left, in order; its shapes, and where the captions end in it."""
    parts, short, places = [], [], []
    for rows, (b, t), end in zip(x.split([b * t for b, t in shapes]), shapes, ends, strict=True):
        place = torch.arange(t, device=x.device)
        columns, kept = fewer.choose(place <= end[:, None], place == end[:, None])
        columns = columns.masked_fill(~kept, t).sort(dim=1).values.clamp(max=t - 1)  # a token sees those before it
        parts.append(gather_tokens(rows.view(b, t, -1), columns).flatten(0, 1))
        short.append(tuple(columns.shape))
        places.append(kept.sum(dim=1) - 1)
    return torch.cat(parts), short, places


def _run(block: nn.Module, x: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """A block's output (R, D) for `x` (R, D), in which parts of (captions, tokens) follow each other; a token attends
    to itself and those before it."""
    qkv = F.linear(block.ln_1(x), *in_effect(block.attn)[:2])
    parts = zip(qkv.split([b * t for b, t in shapes]), shapes, strict=True)
    heads = [split_heads(rows.view(*shape, -1), 3, block.attn.num_heads) for rows, shape in parts]
    attended = torch.cat([attention(*part, is_causal=True).flatten(0, 1) for part in heads])
    return add_mlp(block, add_attention(block, x, attended))


def _run_at(block: nn.Module, x: Tensor, shapes: Sequence[tuple[int, int]], ends: Sequence[Tensor]) -> Tensor:
    """As `_run`, at the token `ends` (b,) of each caption of each part alone: (B, D), at the price of two of six
    matrices for the others."""
    starts, heads = itertools.accumulate([0, *(b * t for b, t in shapes[:-1])]), block.attn.num_heads
    firsts = [start + torch.arange(b, device=x.device) * t for start, (b, t) in zip(starts, shapes, strict=True)]
    rows, h = torch.cat([first + end for first, end in zip(firsts, ends, strict=True)]), block.ln_1(x)
    q, kv = project_some(block, h.index_select(0, rows), h)
    attended = []
    parts = q.split([b for b, _ in shapes]), kv.split([b * t for b, t in shapes])
    for asking, asked, (b, t), end in zip(*parts, shapes, ends, strict=True):
        mask = torch.arange(t, device=x.device) <= end[:, None, None, None]
        heads_of = *split_heads(asking.view(b, 1, -1), 1, heads), *split_heads(asked.view(b, t, -1), 2, heads)
        attended.append(attention(*heads_of, attn_mask=mask).flatten(0, 1))
    return add_mlp(block, add_attention(block, x.index_select(0, rows), torch.cat(attended)))


def _pool_type(tower: nn.Module) -> str:
    return getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", "")
