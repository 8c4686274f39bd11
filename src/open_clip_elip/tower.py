"""OpenCLIP's ViT driven layer by layer, reduced or not, with the exact shortcuts of `blocks.py`: for every model."""
from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .blocks import is_adapted, is_traced, is_untouched, run_block, run_block_at_cls, run_in_place
from .reduction import TokenReduction


class ImageTower:
    """Runs an image tower. No module: a model has one as an attribute, and its state dict keeps the plain model's keys.

    What was changed about the tower, or hangs on it, runs as in OpenCLIP: a block with a hook by its own forward, a
    tower or a stack of blocks with one whole. Hooks on `visual` see the image and what was asked for: tokens, pooled
    features, or features, of `image` (B, 3, H, W), with these arguments:
        guidance: (B, D) text vector at the tower's width.
        reduce: remove tokens. None: if there is guidance, or with `vision_guided`.
    Any that is not OpenCLIP's own ViT answers `features` only. A change that does not let reduce is a ValueError.
    """

    shortcuts: bool = True  # leave out what changes no number beyond rounding; captions too are cut only then
    reduces: bool = True  # False trains with all tokens, as the last stretch of a run may (`--full-tokens-last`)
    # Reduce tokens without a caption too, scored by the image alone (ELIP: lam = 1; Sec. 4.4.5): faster, at some loss.
    vision_guided: bool = False
    compiles: bool = False  # `tokens` run by torch.compile

    def __init__(self, visual: nn.Module, reduction: TokenReduction | None = None):
        self.visual, self.reduction = visual, reduction

    def tokens(
        self, image: Tensor, guidance: Tensor | None = None, *, reduce: bool | None = None, which: Tensor | None = None
    ) -> Tensor:
        """All tokens after the last layer, (B, L, D), `[CLS]` first, L the reduced length: in every mode, always.

        which: (P,) of the images, for a result (P, L, D) of pairs with P guidances; layers that no text has a part in
            run once an image. None: each image once.
        """
        layers = _compiled() if self.compiles else ImageTower._layers
        return self._run(image, lambda _, image: layers(self, image, guidance, reduce, which=which))

    def pooled(self, image: Tensor, guidance: Tensor | None = None, *, reduce: bool | None = None) -> Tensor:
        """Before the projection, (B, width); the last layer may compute no more than is pooled."""
        return self._run(image, lambda _, image: self._pool(image, guidance, reduce))

    def features(self, image: Tensor, guidance: Tensor | None = None, *, reduce: bool | None = None) -> Tensor:
        """(B, output_dim)."""
        if not (self._is_reduced(guidance, reduce) or self._takes_shortcuts()):
            return self.visual(image)
        if self.visual.proj is None:
            return self.pooled(image, guidance, reduce=reduce)
        return self._run(image, lambda visual, image: self._pool(image, guidance, reduce) @ visual.proj)

    def num_patches(self) -> int:
        """Patch tokens that enter the first layer in training (M): the grid, less what patch dropout removes."""
        rows, columns = self.visual.grid_size
        dropout = getattr(self.visual.patch_dropout, "prob", 0.0)
        return max(1, int(rows * columns * (1 - dropout))) if dropout else rows * columns

    def token_counts(self) -> list[int]:
        """Sequence length in each layer in training, `[CLS]` included."""
        patches = self.num_patches()
        if self.reduction is None or not self.reduces:
            return [1 + patches] * len(self.visual.transformer.resblocks)
        return self.reduction.token_counts(patches)

    def rrt(self) -> float:
        """Ratio of removed tokens in training (see `TokenReduction.rrt`)."""
        return 0.0 if self.reduction is None or not self.reduces else self.reduction.rrt(self.num_patches())

    def _is_reduced(self, guidance: Tensor | None, reduce: bool | None) -> bool:
        if reduce is None:
            reduce = self.reduces and (guidance is not None or self.vision_guided)
        return reduce and self.reduction is not None

    def _takes_shortcuts(self) -> bool:
        """Whether the layers of all tokens may be driven from here."""
        if not self.shortcuts or is_traced() or not is_untouched(self.visual) or self.visual.output_tokens:
            return False
        return is_untouched(self.visual.transformer) and self.visual.transformer.batch_first

    def _run(self, image: Tensor, function: Callable) -> Tensor:
        if not isinstance(self.visual, VisionTransformer):
            raise ValueError(f"Only OpenCLIP's own ViT has tokens here; this tower is a {type(self.visual).__name__}.")
        return run_in_place(self.visual, image, function=function)

    def _pool(self, image: Tensor, guidance: Tensor | None, reduce: bool | None) -> Tensor:
        visual = self.visual
        *before, last = visual.transformer.resblocks
        only_cls = visual.pool_type == "tok" and visual.attn_pool is None and not visual.output_tokens
        unchanged = self._takes_shortcuts() and is_untouched(visual.ln_post) and is_untouched(last)
        cut = only_cls and unchanged and all(block is not last for block in before)
        return visual._pool(self._layers(image, guidance, reduce, last if cut else None))[0]

    def _layers(
        self, image: Tensor, guidance: Tensor | None, reduce: bool | None, cut: nn.Module | None = None,
        which: Tensor | None = None,
    ):  # fmt: skip
        """As `tokens`, (B, L, D); `cut`: the last block if it is to return `[CLS]` alone, (B, 1, D)."""
        x, run, more = self.visual._embeds(image), functools.partial(self._layer, cut=cut), {}
        if self._is_reduced(guidance, reduce):
            captioned = guidance is not None and self.reduction.uses_text
            if not (captioned or reduce or self.visual.training or self.reduction.works_alone):
                raise ValueError(f"{type(self.reduction).__name__} reduces tokens in training only.")
            if captioned and which is not None:
                more, which = {"which": which}, None

            def reduced(transformer: nn.Module, x: Tensor) -> Tensor:
                return self.reduction(transformer.resblocks, x, guidance, run=run, only_cls=cut is not None, **more)

            x = run_in_place(self.visual.transformer, x, function=reduced)
        elif not self._takes_shortcuts():
            x = self.visual.transformer(x)
        else:
            for block in self.visual.transformer.resblocks:
                x = run(block, x)
        return x if which is None else x[which]

    def _layer(
        self, block: nn.Module, x: Tensor, *more: Tensor, function: Callable | None = None, cut: nn.Module | None = None
    ):
        """One layer, checkpointed if the tower is; `function(block, x, *more)` stands in for the block's forward."""
        if function is not None:
            function = functools.partial(run_in_place, function=function)
        elif self.shortcuts and not is_traced() and (is_untouched(block) or is_adapted(block)):
            function = run_block_at_cls if block is cut else run_block
        run, recomputed = function or block, self.visual.transformer.grad_checkpointing and torch.is_grad_enabled()
        if function is None:  # as OpenCLIP's transformer calls it
            return checkpoint(run, x, None, None, None, use_reentrant=False) if recomputed else run(x, attn_mask=None)
        return checkpoint(run, block, x, *more, use_reentrant=False) if recomputed else run(block, x, *more)


@functools.cache
def _compiled() -> Callable:
    """One for all towers: a copy of a model takes no other model's tower along."""
    return torch.compile(ImageTower._layers)
