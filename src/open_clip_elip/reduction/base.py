"""What every reduction method answers: how it runs a tower, and with how many tokens; and which there are."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from .options import ReductionConfig


class RunBlock(Protocol):
    """Calls a block: its own forward, or `function(block, *tensors)` in the place of it.

    A tower that is checkpointed, compiled or sharded does to the function what it does to the block.
    """

    def __call__(self, block: nn.Module, *tensors: Tensor, function: Callable | None = None): ...


def run_plainly(block: nn.Module, *tensors: Tensor, function: Callable | None = None):
    """The block, or the function, and nothing else."""
    return block(*tensors) if function is None else function(block, *tensors)


class Layer(NamedTuple):
    """Tokens of one image in one layer, `[CLS]` and merged ones included.

    Attributes:
        attention: that enter the layer and go through its attention.
        mlp: that go through its MLP and leave it; fewer, where tokens are removed in between.
    """

    attention: int
    mlp: int


class TokenReduction(nn.Module):
    """Runs a tower's blocks on fewer tokens. Has no parameters and no buffers. See `register`.

    Attributes:
        Config: the class of its options.
        suffix: what a registered model's name has behind the plain model's; "": no model has it in its name.
        uses_text: the caption decides; without one the image alone does.
        works_alone: can encode an image by itself, the same whatever else is in the batch (`vision_guided`).

    Args:
        config: what to keep and where.
        num_layers: depth of the tower; a ValueError if the options do not fit it.
    """

    Config: ClassVar[type[ReductionConfig]]
    suffix: ClassVar[str] = ""
    uses_text: ClassVar[bool] = False
    works_alone: ClassVar[bool] = True

    def __init__(self, config: ReductionConfig, num_layers: int):
        super().__init__()
        self.config, self.num_layers = config, num_layers

    def forward(
        self, blocks: Sequence[nn.Module], x: Tensor, guidance: Tensor | None = None, *,
        run: RunBlock = run_plainly, only_cls: bool = False,
    ) -> Tensor:  # fmt: skip
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

    def layers(self, num_patches: int) -> list[Layer]:
        """The tokens in each layer for an image of `num_patches` patches."""
        raise NotImplementedError

    def token_counts(self, num_patches: int) -> list[int]:
        """Tokens that enter each layer, `[CLS]` and merged ones included, for `num_patches` patches at the input."""
        return [layer.attention for layer in self.layers(num_patches)]

    def rrt(self, num_patches: int) -> float:
        """Ratio of removed tokens: 1 - token-layers with reduction / token-layers without (Guo et al., Table 1).

        The attention and the MLP count as half a layer each, for methods that remove tokens between them.
        """
        return rrt(self.layers(num_patches), num_patches)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.config.to_dict().items())


#: method name -> method; whatever offers methods reads it
METHODS: dict[str, type[TokenReduction]] = {}


def register(name: str) -> Callable[[type[TokenReduction]], type[TokenReduction]]:
    """Makes a class of `TokenReduction` the method `name`, in every model, command and report."""

    def add(method: type[TokenReduction]) -> type[TokenReduction]:
        METHODS[name] = method
        return method

    return add


def drop_alternatives(options: dict, changes: dict) -> dict:
    """`options` without those that one of `changes` says in another way."""
    groups = (method.Config.alternatives for method in METHODS.values())
    replaced = {other for group in groups for one in group & changes.keys() for other in group}
    return {name: value for name, value in options.items() if name not in replaced}


def rrt(layers: Sequence[Layer], num_patches: int) -> float:
    """See `TokenReduction.rrt`."""
    return 1 - sum(layer.attention + layer.mlp for layer in layers) / (2 * len(layers) * (1 + num_patches))


def nearest(target: float, value: Callable[[int], float], last: int) -> int:
    """Of the whole numbers up to `last`, along which `value` never falls, one whose value is nearest to `target`.

    By halving: a compiler that traces through takes minutes for a search of thousands.
    """
    low, high = 0, last
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if value(middle) <= target else (low, middle)
    return low if target - value(low) <= value(high) - target else high
