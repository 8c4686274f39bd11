"""What every reduction method answers: how it runs a tower, and what that takes in each layer."""
from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn


class RunBlock(Protocol):
    """Calls a block: its own forward, or `function(block, *tensors)` in the place of it.

    A tower that is checkpointed, compiled or sharded does to the function what it does to the block.
    """

    def __call__(self, block: nn.Module, *tensors: Tensor, function: Callable | None = None): ...


def run_plainly(block: nn.Module, *tensors: Tensor, function: Callable | None = None):
    """The block, or the function, and nothing else."""
    return block(*tensors) if function is None else function(block, *tensors)


@dataclass(frozen=True)
class LayerWork:
    """What one layer does for one image; all numbers are tokens, `[CLS]` and merged ones included.

    Attributes:
        attention: that enter the layer and go through its attention.
        mlp: that go through its MLP and leave it; fewer, where tokens are removed in between.
        padded: length at which tokens attend to each other, if padding makes it longer than `attention`.
        chosen_from: that the tokens of this layer were chosen from, where some are removed before it or within it.
        scored: that run through the whole layer once more, without gradient, to choose.
        scored_row: over which only the attention of `[CLS]` is computed once more, without gradient.
        scored_padded: as `padded`, in these passes.
        cls_row: over which the attention of `[CLS]` is computed from queries and keys that are there, with gradient.
        cls_row_scored: the same without gradient.
        matched: sizes of two sets of tokens that are compared with each other.
    """

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


class TokenReduction(nn.Module):
    """Runs a tower's blocks on fewer tokens. Has no parameters and no buffers.

    Attributes:
        uses_text: the caption decides; without one the image alone does.
        works_alone: can encode an image by itself, the same whatever else is in the batch (`vision_guided`).
        needs_cls: only `[CLS]` comes out in order, so the tower must pool it.
    """

    uses_text: ClassVar[bool] = False
    works_alone: ClassVar[bool] = True
    needs_cls: ClassVar[bool] = False

    def __init__(self, config: ReductionConfig, num_layers: int):
        super().__init__()
        self.config, self.num_layers = config, num_layers

    def forward(
        self,
        blocks: Sequence[nn.Module],
        x: Tensor,
        guidance: Tensor | None = None,
        *,
        run: RunBlock = run_plainly,
        only_cls: bool = False,
    ) -> Tensor:
        """
        Args:
            blocks: the tower's layers; each maps (B, L, D) to (B, L, D) for any L.
            x: (B, 1+M, D), input of the first layer, `[CLS]` first.
            guidance: (B, D) text vector at the tower's width, for a method that uses it.
            run: calls a block.
            only_cls: nothing but `[CLS]` of the last layer is used, so the last layer may return it alone.

        Returns:
            (B, L, D) after the last layer, `[CLS]` first.
        """
        raise NotImplementedError

    def work(self, num_patches: int) -> list[LayerWork]:
        """What each layer does for an image of `num_patches` patches."""
        raise NotImplementedError

    def token_counts(self, num_patches: int) -> list[int]:
        """Tokens that enter each layer, `[CLS]` and merged ones included, for `num_patches` patches at the input."""
        return [layer.attention for layer in self.work(num_patches)]

    def rrt(self, num_patches: int) -> float:
        """Ratio of removed tokens: 1 - token-layers with reduction / token-layers without (Guo et al., Table 1).

        The attention and the MLP count as half a layer each, for methods that remove tokens between them.
        """
        return rrt(self.work(num_patches), num_patches)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.config.to_dict().items())


def rrt(work: Sequence[LayerWork], num_patches: int) -> float:
    """See `TokenReduction.rrt`."""
    return 1 - sum(layer.attention + layer.mlp for layer in work) / (2 * len(work) * (1 + num_patches))


def nearest(target: float, value: Callable[[int], float], last: int) -> int:
    """Of the whole numbers up to `last`, along which `value` never falls, one whose value is nearest to `target`.

    By halving: a compiler that traces through takes minutes for a search of thousands.
    """
    low, high = 0, last
    while high - low > 1:
        middle = (low + high) // 2
        if value(middle) <= target:
            low = middle
        else:
            high = middle
    return low if target - value(low) <= value(high) - target else high


@dataclass(frozen=True)
class ReductionConfig:
    """Base of the methods' options: plain types in and out, as in a model's JSON."""

    @classmethod
    def from_dict(cls, options: dict) -> ReductionConfig:
        """Builds the configuration from plain types; an unknown key is a ValueError."""
        known = [f.name for f in fields(cls)]
        for key in options:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known) or 'none'}."
                raise ValueError(f"Unknown token_reduction option {key!r}; {hint}")
        return cls(**options)

    def to_dict(self) -> dict:
        """Plain types (lists, numbers, strings), without what is None; `from_dict` reads it back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v is not None}


def check_number(name: str, value: object, low: float, high: float, meaning: str, whole: bool = False) -> None:
    """Raises ValueError unless `value` is a number in [low, high]."""
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise ValueError(f"{name} must be {meaning}; got {value!r}.")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}; got {value!r}.")


def check_switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false; got {value!r}.")


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """(B, K, D): the tokens `index` (B, K) of `x` (B, N, D)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def norm(x: Tensor) -> Tensor:
    """Length of the last dimension, kept, in at least float32."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
