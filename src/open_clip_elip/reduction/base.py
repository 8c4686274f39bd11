"""What every reduction method is: its options, how it runs a tower, with how many tokens; and which there are."""
from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn


@dataclass(frozen=True)
class ReductionConfig:
    """Base of the methods' options; one that is out of its range, or contradicts another, is a ValueError."""

    alternatives = ()  # two options that say the same thing in different ways, the one with a default first

    @classmethod
    def from_dict(cls, options: dict) -> ReductionConfig:
        """Builds the configuration from plain types; an unknown key is a ValueError."""
        types, found = {f.name: str(f.type) for f in fields(cls)}, dict(options)
        for key, value in options.items():
            if key not in types:
                near = difflib.get_close_matches(key, types, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(types) or 'none'}."
                raise ValueError(f"Unknown token_reduction option {key!r}; {hint}")
            # One number stands for a list of one, and the other way round.
            if types[key].startswith("tuple") and isinstance(value, (int, float)):
                found[key] = [value]
            elif "tuple" not in types[key] and isinstance(value, (list, tuple)) and len(value) == 1:
                found[key] = value[0]
        return cls(**found)

    def to_dict(self) -> dict:
        """Plain types (lists, numbers, strings), without what is None; `from_dict` reads it back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v is not None}

    def _choose(self, default: object) -> str:
        """The one of the alternatives that counts; the first gets its default if neither is given."""
        given = [name for name in self.alternatives if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"Give either {given[0]} or {given[1]}, not both.")
        if given == ["target_rrt"]:
            check_number("target_rrt", self.target_rrt, 0, 0.95, "a number from 0 to 0.95")
        if not given:
            object.__setattr__(self, self.alternatives[0], default)
        return (given or self.alternatives)[0]

    def _set_numbers(self, name: str, low: float, meaning: str, *, high: float = math.inf, kind: type = int) -> None:
        """Checks that an option is a list of numbers in [low, high], and makes a tuple of it."""
        values = getattr(self, name)
        if not isinstance(values, (list, tuple)) or not values:
            raise ValueError(f"{name} must be a list of {meaning}; got {values!r}.")
        for value in values:
            check_number(name, value, low, high, meaning, whole=kind is int)
        object.__setattr__(self, name, tuple(map(kind, values)))


def check_number(name: str, value: object, low: float, high: float, meaning: str, whole: bool = False) -> None:
    """Raises ValueError unless `value` is a number in [low, high]."""
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise ValueError(f"{name} must be {meaning}; got {value!r}.")


def check_switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false; got {value!r}.")


def run_plainly(block: nn.Module, *tensors: Tensor, function: Callable | None = None):
    """The block, or the function, and nothing else."""
    return block(*tensors) if function is None else function(block, *tensors)


class Layer(NamedTuple):
    """Tokens of one image in one layer, `[CLS]` and merged ones included: those that enter it and go through its
    attention, and those that go through its MLP and leave it; fewer, where tokens are removed in between."""

    attention: int
    mlp: int


class Removal(NamedTuple):
    """What happened in one place where tokens go. `[CLS]` is not counted."""

    layer: int  # 0-based: before it, or within
    x: Tensor  # (B, 1+N, D), the tokens that were there
    into: Tensor  # (B, N), which of the tokens that go on each of them became, or went into; -1: it was dropped
    scores: Tensor | None = None  # (B, N), by which they were chosen; None: by nothing of that kind


class TokenReduction(nn.Module):
    """Runs a tower's blocks on fewer tokens. Has no parameters and no buffers. See `register`."""

    watch: Callable[[Removal], None] | None = None  # is told of each removal; nobody: nothing more is computed

    Config: ClassVar[type[ReductionConfig]]  # of its options; a ValueError if they do not fit `num_layers` layers
    suffix: ClassVar[str] = ""  # what a registered model's name has behind the plain model's
    uses_text: ClassVar[bool] = False  # the caption decides; without one the image alone does
    works_alone: ClassVar[bool] = True  # encodes an image by itself, whatever else is in the batch (`vision_guided`)

    def __init__(self, config: ReductionConfig, num_layers: int):
        super().__init__()
        self.config, self.num_layers = config, num_layers

    def forward(
        self, blocks: Sequence[nn.Module], x: Tensor, guidance: Tensor | None = None, *,
        run: Callable = run_plainly, only_cls: bool = False, which: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, L, D) after the last layer, `[CLS]` first.

        Args:
            blocks: the tower's layers; each maps (B, L, D) to (B, L, D) for any L.
            x: (B, 1+M, D), input of the first layer, `[CLS]` first.
            guidance: (B, D) text vector at the tower's width, for a method that uses it.
            run: calls a block, `run(block, *tensors)`, or `run(block, *tensors, function=f)` for `f(block, *tensors)`
                in its place; a tower that is checkpointed or sharded does to the function what it does to the block.
            only_cls: nothing but `[CLS]` of the last layer is used, so the last layer may return it alone.
            which: (P,) the image in `x` of each guidance, of which there are P, as is the result; given to a method
                that `uses_text` alone. None: guidance and image of a pair have the same number.
        """
        raise NotImplementedError

    def layers(self, num_patches: int) -> list[Layer]:
        """The tokens in each layer for an image of `num_patches` patches."""
        raise NotImplementedError

    def token_counts(self, num_patches: int) -> list[int]:
        """Tokens that enter each layer, `[CLS]` and merged ones included, for `num_patches` patches at the input."""
        return [layer.attention for layer in self.layers(num_patches)]

    def rrt(self, num_patches: int) -> float:
        """Ratio of removed tokens, see `rrt`."""
        return rrt(self.layers(num_patches), num_patches)


#: method name -> method; whatever offers methods reads it
METHODS: dict[str, type[TokenReduction]] = {}


def register(name: str) -> Callable[[type[TokenReduction]], type[TokenReduction]]:
    """Makes a class of `TokenReduction` the method `name`, in every model, command and report."""

    def add(method: type[TokenReduction]) -> type[TokenReduction]:
        METHODS[name] = method
        return method

    return add


def resolve(given: Mapping[str, Any], own: Mapping[str, Any] = {}) -> tuple[str, ReductionConfig]:
    """The method of `{"method": "elip", "lam": 0.6}` and its options: those given, on top of `own`, a model's; a
    ValueError if one is unknown."""
    method = given.get("method", own.get("method"))
    if method not in METHODS:
        raise ValueError(f"Unknown token reduction method {method!r}; known are none, {', '.join(METHODS)}.")
    kind, options = METHODS[method].Config, dict(given)
    if own.get("method") == method:
        replaced = kind.alternatives if any(name in given for name in kind.alternatives) else ()
        options = {name: value for name, value in own.items() if name not in replaced} | options
    options.pop("method", None)
    return method, kind.from_dict(options)


def rrt(layers: Sequence[Layer], num_patches: int) -> float:
    """Ratio of removed tokens: 1 - token-layers with reduction / token-layers without (Guo et al., Table 1). Attention
    and MLP count as half a layer each, for methods that remove tokens between them."""
    return 1 - sum(layer.attention + layer.mlp for layer in layers) / (2 * len(layers) * (1 + num_patches))


def meet(target: float, layers: Callable[[int], list[Layer]], last: int, num_patches: int) -> list[Layer]:
    """Of `layers(0)` to `layers(last)`, along which ever more tokens go, those whose RRT is nearest to `target`; by
    halving, for a compiler that traces through takes minutes for a search of thousands."""
    low, high = 0, last
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if rrt(layers(middle), num_patches) <= target else (low, middle)
    fewer, more = (abs(rrt(layers(end), num_patches) - target) for end in (low, high))
    return layers(low if fewer <= more else high)
