"""What a training step costs by analysis: floating-point operations, tokens, what is kept for the backward pass.

All counts are sums over OpenCLIP's own ViT and text transformer, plain or text-first; for other towers they are None
(`open_clip_elip.profile` measures those). An operation is a multiplication or an addition, in matrix products only.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import open_clip
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer
from torch import nn

from .blocks import is_untouched
from .reduction import TokenReduction
from .text import can_cut
from .tower import ImageTower


class LayerWork(NamedTuple):  # the operations of choosing are no longer known here
    attention: int
    mlp: int
    padded: int | None = None
    chosen_from: int = 0
    scored: int = 0
    scored_row: int = 0
    scored_padded: int | None = None
    cls_row: int = 0
    cls_row_scored: int = 0
    matched: tuple[int, int] = (0, 0)


def num_patches(visual: nn.Module) -> int:
    return ImageTower(visual).num_patches()


def skips_last(model: nn.Module) -> bool:
    cls = model.visual.pool_type == "tok" and not model.visual.output_tokens
    return cls and hasattr(model, "tower") and model.tower.shortcuts

# ---------------------------------------------------------------------- operations


@dataclass(frozen=True)
class StepCost:
    """Operations and tokens of one image-text pair in a training step, or of a batch of them.

    Attributes:
        forward, backward: of the towers; a locked tower has no backward.
        scoring: the passes without gradient that choose the tokens, guidance included.
        recompute: what is run a second time to save memory: gradient checkpointing, accumulation.
        image_tokens: patches that enter the image tower.
        text_tokens: tokens that enter the text tower.
        text_forward, text_backward: the text tower's part of `forward` and `backward`.
    """

    forward: int
    backward: int
    scoring: int
    recompute: int
    image_tokens: int
    text_tokens: int
    text_forward: int = 0
    text_backward: int = 0

    @property
    def model(self) -> int:
        """What the method needs: all but `recompute`. Utilisation (MFU) is counted with this."""
        return self.forward + self.backward + self.scoring

    @property
    def total(self) -> int:
        """What the device computes."""
        return self.model + self.recompute

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.text_tokens

    def __add__(self, other: StepCost) -> StepCost:
        return StepCost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, pairs: int) -> StepCost:
        return StepCost(*(getattr(self, f.name) * pairs for f in fields(self)))


def step_cost(model: nn.Module, text_length: int | None = None, accumulate: bool = False) -> StepCost | None:
    """The cost of one pair in training; None where a tower is not OpenCLIP's own. The loss is not counted.

    Args:
        model: the bare model, locked and checkpointed as it is trained.
        text_length: columns of the token ids, if not the model's context length.
        accumulate: with `--accum-freq` above 1, when each micro-batch runs once more without gradient.
    """
    if not is_counted(model):
        return None
    text_tower = getattr(model, "text", model)
    length = text_length or text_tower.context_length
    text, image = _Operations(), _Operations()
    _count_text(text, text_tower, length, _one_row_of_text(model))
    scoring = _count_image(image, model)
    again = text.forward + image.forward + scoring if accumulate else 0
    return StepCost(
        forward=text.forward + image.forward,
        backward=text.backward + image.backward,
        scoring=scoring,
        recompute=text.recompute + image.recompute + again,
        image_tokens=num_patches(model.visual),
        text_tokens=length,
        text_forward=text.forward,
        text_backward=text.backward,
    )


def batch_cost(model: nn.Module, text_lengths: Iterable[int], accumulate: bool = False) -> StepCost | None:
    """`step_cost` of a whole batch of pairs whose captions go through the text tower cut to `text_lengths` columns."""
    if not is_counted(model):
        return None
    total = StepCost(0, 0, 0, 0, 0, 0)
    for length, pairs in Counter(text_lengths).items():
        total += step_cost(model, length, accumulate) * pairs
    return total


def _count_text(count: _Operations, text: nn.Module, length: int, one_row: bool) -> None:
    cls_emb, blocks = getattr(text, "cls_emb", None), text.transformer.resblocks
    count.through(text.token_embedding, text.positional_embedding, cls_emb)
    tokens = length + (cls_emb is not None)
    for block in blocks:
        count.block(block, _plain_work(tokens), text.transformer.grad_checkpointing, one_row and block is blocks[-1])
    count.through(text.ln_final)
    if text.text_projection is not None:
        count.product(1, getattr(text.text_projection, "weight", text.text_projection))


def _count_image(count: _Operations, model: nn.Module) -> int:
    """Returns the operations of scoring, which are not in `count`."""
    visual, scoring, last = model.visual, 0, skips_last(model) and model.visual.transformer.resblocks[-1]
    count.product(visual.grid_size[0] * visual.grid_size[1], visual.conv1.weight)
    count.through(visual.class_embedding, visual.positional_embedding, visual.ln_pre)
    if _reduces(model) and model.reduction.uses_text and visual.proj is not None:
        scoring += 2 * visual.proj.numel()  # brings the text to the image tower's width
    blocks = visual.transformer.resblocks
    for block, work in zip(blocks, _image_work(model), strict=True):
        one_row = block is last
        if work.scored:
            scoring += _block_forward(block, _plain_work(work.scored, work.scored_padded))
        if work.scored_row:
            scoring += _row_forward(block, work.scored_row)
        if not one_row:
            scoring += _choosing(block, work)
        count.block(block, work, visual.transformer.grad_checkpointing, one_row)
    count.through(visual.ln_post)
    if visual.proj is not None:
        count.product(1, visual.proj)
    return scoring


class _Operations:
    """Adds up what a tensor costs on its way through a tower, forward and back."""

    def __init__(self):
        self.forward = self.backward = self.recompute = 0
        self.needs_gradient = False  # of the tensor, where it is now

    def through(self, *parts: nn.Module | nn.Parameter | None) -> None:
        """Parts without a matrix product."""
        self.needs_gradient |= any(_is_trained(part) for part in parts)

    def product(self, rows: int, weight: nn.Parameter) -> None:
        """rows x weight."""
        self.products(weight, (rows, weight.numel()))

    def products(self, weight: nn.Parameter, *parts: tuple[int, int]) -> None:
        """Of parts of a weight, (rows that it is multiplied with, elements) each; the gradients of the input and of
        the weight cost as much, each where it is needed."""
        for rows, elements in parts:
            self.forward += 2 * rows * elements
            self.backward += 2 * rows * elements * (self.needs_gradient + weight.requires_grad)
        self.through(weight)

    def block(self, block: nn.Module, work: LayerWork, checkpointed: bool, one_row: bool = False) -> None:
        """`one_row`: only keys and values are computed for all tokens (`blocks.run_block_at`)."""
        attn, mlp, width = block.attn, block.mlp, _width(block)
        rows, mlp_rows = (1, 1) if one_row else (work.attention, work.mlp)
        padded = work.padded or work.attention
        self.through(block.ln_1)
        self.products(attn.in_proj_weight, (rows, width**2), (work.attention, 2 * width**2))
        self.through(attn.in_proj_bias)
        between_tokens = 4 * (1 if one_row else padded) * padded * width
        if not one_row:
            between_tokens += 2 * work.cls_row * width
        self.forward += between_tokens
        self.backward += 2 * between_tokens * self.needs_gradient
        self.product(rows, attn.out_proj.weight)
        self.through(attn.out_proj, block.ls_1, block.ln_2)
        self.product(mlp_rows, mlp.c_fc.weight)
        self.through(mlp)
        self.product(mlp_rows, mlp.c_proj.weight)
        self.through(block.ls_2)
        if checkpointed and self.needs_gradient:
            # Recomputing stops at the last tensor that is needed: the input of the last product, unless it is scaled.
            unneeded = 2 * mlp_rows * mlp.c_proj.weight.numel() if isinstance(block.ls_2, nn.Identity) else 0
            again = _block_forward(block, work, one_row) + (0 if one_row else _choosing(block, work))
            self.recompute += again - unneeded


def _plain_work(tokens: int, padded: int | None = None) -> LayerWork:
    return LayerWork(tokens, tokens, padded=padded)


def _block_forward(block: nn.Module, work: LayerWork, one_row: bool = False) -> int:
    count = _Operations()
    count.block(block, work, checkpointed=False, one_row=one_row)
    return count.forward


def _choosing(block: nn.Module, work: LayerWork) -> int:
    """Within the layer, without gradient: the attention of `[CLS]`, or the similarities of two sets of keys, averaged
    over the heads (`reduction.tome.soft_match`)."""
    width = _width(block)
    similarities = 2 * work.matched[0] * work.matched[1] * (width // block.attn.num_heads)
    return similarities + 2 * work.cls_row_scored * width


def _row_forward(block: nn.Module, tokens: int) -> int:
    """`reduction.scoring.cls_attention`: one query, the key weights moved onto it, one row of logits for each head."""
    width = _width(block)
    return 2 * width**2 + 2 * width**2 + 2 * block.attn.num_heads * tokens * width


def _width(block: nn.Module) -> int:
    return block.attn.in_proj_weight.shape[1]


# ---------------------------------------------------------------------- what there is to count


def is_counted(model: nn.Module) -> bool:
    visual, text = getattr(model, "visual", None), getattr(model, "text", None)
    return (
        isinstance(visual, VisionTransformer)
        and visual.attn_pool is None
        and (isinstance(text, TextTransformer) if text is not None else isinstance(model, open_clip.CLIP))
        and isinstance(getattr(model, "reduction", None), (TokenReduction, type(None)))
    )


def _one_row_of_text(model: nn.Module) -> bool:
    """Whether the last layer computes the pooled token only (see `model.Shortcuts`)."""
    text = getattr(model, "text", model)
    return hasattr(model, "tower") and model.tower.shortcuts and can_cut(model) and is_untouched(text.transformer.resblocks[-1])


def _reduces(model: nn.Module) -> bool:
    return getattr(model, "reduction", None) is not None and model.tower.reduces


def _image_work(model: nn.Module) -> list[LayerWork]:
    """Of each layer of the image tower in training."""
    patches = num_patches(model.visual)
    if _reduces(model):
        return [LayerWork(*layer) for layer in model.reduction.layers(patches)]
    return [_plain_work(1 + patches)] * len(model.visual.transformer.resblocks)


def _is_trained(part: nn.Module | nn.Parameter | None) -> bool:
    if part is None:
        return False
    return any(p.requires_grad for p in ([part] if isinstance(part, nn.Parameter) else part.parameters()))


# ---------------------------------------------------------------------- memory


def activation_bytes(model: nn.Module, precision: str, text_length: int | None = None) -> int:
    """Bytes that the forward pass of one pair keeps for the backward pass, for a model that `step_cost` counts.

    With gradient checkpointing: the inputs of all blocks and the inside of the largest.
    """
    visual, text = model.visual, getattr(model, "text", model)
    wide = max(p.element_size() for p in model.parameters())  # what normalisations work in
    narrow = wide if precision == "fp32" else 2
    autocast = precision.startswith("amp")
    size = 0

    stem = (visual.conv1, visual.class_embedding, visual.positional_embedding, visual.ln_pre)
    if _is_trained(visual):
        pixels = 3 * visual.image_size[0] * visual.image_size[1]
        size += pixels * (narrow + wide * autocast)  # the images, and autocast's copy
        work, width = _image_work(model), visual.transformer.width
        if any(map(_is_trained, stem)) and not isinstance(visual.ln_pre, nn.Identity):
            size += _norm_bytes(width, 1 + num_patches(visual), wide)
        one_row, trained = skips_last(model), any(map(_is_trained, stem))
        size += _tower_bytes(visual.transformer, work, trained, wide, narrow, narrow, one_row)
        pooled = 1 if one_row else work[-1].mlp
        size += _norm_bytes(width, pooled, wide)
        size += pooled * width * narrow  # ln_post's output: the pooled token is a view of it

    stem = (text.token_embedding, text.positional_embedding, getattr(text, "cls_emb", None))
    if any(map(_is_trained, (*stem, text.transformer, text.ln_final, text.text_projection))):
        tokens = (text_length or text.context_length) + (stem[-1] is not None)
        work = [_plain_work(tokens)] * len(text.transformer.resblocks)
        stream = wide if autocast else narrow  # autocast leaves embeddings as they are
        one_row, trained = _one_row_of_text(model), any(map(_is_trained, stem))
        size += _tower_bytes(text.transformer, work, trained, wide, narrow, stream, one_row)
        size += _norm_bytes(text.transformer.width, 1 if one_row else tokens, wide) + 8 * tokens  # ln_final, ids
    return size


def _tower_bytes(
    transformer: nn.Module,
    work: Sequence[LayerWork],
    needs_gradient: bool,
    wide: int,
    narrow: int,
    stream: int,
    one_row: bool,
) -> int:
    kept, largest, last = 0, 0, one_row and transformer.resblocks[-1]
    for block, layer in zip(transformer.resblocks, work, strict=True):
        within = layer.mlp != layer.attention or bool(layer.cls_row)
        if needs_gradient and layer.chosen_from and not (within and block is last):
            # Kept: all that the gather chooses from, its indices, the weights of the merge.
            kept += layer.chosen_from * transformer.width * stream + 8 * layer.mlp + 4 * layer.chosen_from
        needs_gradient |= _is_trained(block)
        if needs_gradient:
            inside = _block_bytes(block, layer, wide, narrow, block is last)
            kept += layer.attention * transformer.width * stream if transformer.grad_checkpointing else inside
            largest = max(largest, inside)
    return kept + (largest if transformer.grad_checkpointing else 0)


def _block_bytes(block: nn.Module, work: LayerWork, wide: int, narrow: int, one_row: bool = False) -> int:
    """What a block of width D keeps: the inputs of both normalisations; the input, queries, keys, values and output of
    the attention; the MLP's input and its hidden values before and after the activation; one number a softmax.

    With `one_row` there is only the first input, normalised and not, and keys and values, of all tokens.
    """
    width, hidden = _width(block), block.mlp.c_fc.out_features
    tokens, padded, heads = work.attention, work.padded or work.attention, block.attn.num_heads
    of_mlp = width + (3 if isinstance(block.mlp.gelu, QuickGELU) else 2) * hidden
    scales = 0 if isinstance(block.ls_1, nn.Identity) else width
    if one_row:
        of_all = _norm_bytes(width, tokens, wide) + (tokens + 2 * padded) * width * narrow
        return of_all + _norm_bytes(width, 1, wide) + (3 * width + of_mlp + 2 * scales) * narrow + 4 * heads
    attention = (tokens + 3 * padded + padded) * width * narrow + 4 * padded * heads
    if work.padded:
        attention += tokens * width * narrow  # the output, taken from the padded batch
    first = _norm_bytes(width, tokens, wide) + attention + tokens * scales * narrow
    return first + _norm_bytes(width, work.mlp, wide) + work.mlp * (of_mlp + scales) * narrow


def _norm_bytes(width: int, tokens: int, wide: int) -> int:
    return tokens * (width * wide + 2 * 4)  # the input, its mean and deviation
