"""Text towers without the padding: a causal tower that is pooled at the end of text never needs what comes after it.

Exact: no token sees a later one. Captions of 15 tokens then cost 15 tokens, not the 77 of the context.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from .blocks import is_sharded, is_untouched, run_block, run_block_at
from .reduction.attention import asked_once, take_row

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


def encode_parts(model: nn.Module, text: TextParts) -> Tensor:
    """Text features (B, embed_dim), not normalized, in the batch's order, of a model for which `can_cut`."""
    tower = text_tower(model)
    # Looked up together: each lookup has a gradient of the size of the vocabulary.
    embedded = tower.token_embedding(torch.cat([part.flatten() for part in text.parts]))
    rows = embedded.split([part.numel() for part in text.parts])
    features = [_encode(tower, part, x.view(*part.shape, -1)) for part, x in zip(text.parts, rows, strict=True)]
    return torch.cat(features).index_select(0, text.place)


def _encode(tower: nn.Module, text: Tensor, embedded: Tensor) -> Tensor:
    """Captions (b, T) and their tokens' embeddings (b, T, D) to (b, embed_dim), for T up to the context length."""
    length, transformer = text.shape[1], tower.transformer
    dtype = transformer.get_cast_dtype()
    x = embedded.to(dtype) + tower.positional_embedding[:length].to(dtype)
    end, mask = end_of_text(tower, text), tower.attn_mask[:length, :length]
    checkpointing = transformer.grad_checkpointing and torch.is_grad_enabled()
    for number, block in enumerate(transformer.resblocks, 1):
        function, more = nn.Module.__call__, (None, None, mask)
        if not hasattr(block, "unshard"):  # else `fully_shard` brings its weights when it is called
            function, more = (run_block_at, (end,)) if number == len(transformer.resblocks) else (run_block, (True,))
        x = checkpoint(function, block, x, *more, use_reentrant=False) if checkpointing else function(block, x, *more)
    x = tower.ln_final(x)
    x = (x if function is run_block_at else take_row(x, end))[:, 0]
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def _pool_type(tower: nn.Module) -> str:
    return getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", "")
