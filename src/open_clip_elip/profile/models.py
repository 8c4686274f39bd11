"""What is profiled: models, named as `ViT-S-16`, `ViT-S-16-ELIP:scoring_depth=1` or `ViT-B-16:method=elip,lam=0.5`, and
captions of given lengths. A text tower that is cut at the end of text costs what they are long, so every figure names
their lengths."""
from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from ..adapters import KINDS
from ..clip import without_token_reduction
from ..identity import Identity, create, describe
from ..text import _pool_type, text_tower
from . import ProfileError

SPREAD = 0.4  # standard deviation of the logarithm: 5 in 100 captions have more than twice the median
SHORTEST = 3  # tokens, start and end included
USUAL_CONTEXT = 77
TEXT_OPTIONS = (("rule", "reduction"), ("keep", "keep"))  # of text reduction, and their names behind `text_`


class Candidate(NamedTuple):
    """A model by the `label` that a person wrote; `shortcuts`: whether it runs with this package's exact shortcuts.
    None: a model that reduces tokens does, a plain one runs as OpenCLIP, or the released program, runs it."""

    label: str
    identity: Identity
    shortcuts: bool | None = None

    @classmethod
    def parse(cls, text: str, image_size: int | None = None) -> Candidate:
        """`NAME[:option=value,...]`, the options being those of the token reduction, `text_reduction` (a rule),
        `text_keep` and `shortcuts`; numbers of a list are separated by commas too. Raises ProfileError or ModelError if
        that cannot be read, or there is no such model."""
        name, _, tail = text.rpartition(":")
        if not name or "=" not in tail:
            name, tail = text, ""
        options = parse_options(tail)
        shortcuts = options.pop("shortcuts", None)
        if shortcuts not in (True, False, None):
            raise ProfileError(f"shortcuts is true or false in {text!r}.")
        kind, rank = options.pop("adapter", None), options.pop("rank", None)
        if kind not in (*KINDS, None) or rank is not None and not (kind and type(rank) is int and rank > 0):
            raise ProfileError(f"An adapter is {' or '.join(KINDS)}, and has a whole rank, in {text!r}.")
        texts = {key: options.pop(f"text_{old}") for key, old in TEXT_OPTIONS if f"text_{old}" in options}
        more = {"token_reduction": options or None, "text_reduction": texts or None}
        identity = describe(name, force_image_size=image_size, **more)
        return cls(text, identity.with_adapter(kind, rank), shortcuts)

    @property
    def fuses(self) -> bool:
        return self.identity.family != "clip"

    @property
    def takes_shortcuts(self) -> bool:
        """In this project's trainer: a plain fusion model is the released one."""
        if self.shortcuts is not None:
            return self.shortcuts
        return not self.fuses or self.reduces

    @property
    def reduces(self) -> bool:
        return self.identity.token_reduction is not None or "text_reduction" in self.identity.config

    def build(self, device: torch.device | str, precision: str = "fp32") -> nn.Module:
        """In training mode, weights at random; raises ModelError if it cannot be made."""
        model = create(self.identity, device=device, precision=precision, pretrained_text=False)
        if self.shortcuts is not None or self.fuses:
            model.tower.shortcuts = self.takes_shortcuts
        elif not self.reduces and hasattr(model, "tower"):
            model = without_token_reduction(model)  # OpenCLIP's own class
        return model.train()


def _scalar(text: str) -> Any:
    try:
        return json.loads("0" + text if text.startswith(".") else text)
    except ValueError:
        return text


def parse_options(text: str) -> dict[str, Any]:
    """`option=value,...`, of which values too may be lists with commas. Raises ProfileError."""
    options: dict[str, Any] = {}
    for item in re.split(r",(?=\s*[A-Za-z_]\w*=)", text) if text else ():
        key, _, value = item.partition("=")
        if not value or key.strip() in options:
            raise ProfileError(f"{item!r} in {text!r} is not one more option=value; write NAME:option=value,...")
        values = [_scalar(part.strip()) for part in value.strip().strip("[]").split(",")]
        options[key.strip()] = values if len(values) > 1 else values[0]
    return options


def find_device(name: str | None) -> torch.device:
    """The device of a command line, by default the GPU if there is one; ProfileError if it is not here."""
    available = torch.cuda.is_available()
    name = name or ("cuda" if available else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?" if available else "cpu", name):
        raise ProfileError(f"There is no device {name!r} here; take {'cpu or cuda' if available else 'cpu'}.")
    return torch.device(name)


# ---------------------------------------------------------------------- captions


def caption_lengths(
    given: str, pairs: int, context: int = USUAL_CONTEXT, tokenizer: Callable[[], Callable] | None = None
) -> list[int]:
    """Lengths in tokens, start and end included, of `pairs` captions: spread evenly over those that `given` tells, in
    shuffled order, and the same for each call.

    Args:
        given: a mean, "full" for all of the context, or a file with one length, or one caption, a line. For a mean
            they are quantiles of a log-normal distribution.
        tokenizer: makes the tokenizer for captions of a file.

    Raises:
        ProfileError: `given` is none of these, or the file cannot be read or is empty.
    """
    if given == "full":
        found = [context]
    elif Path(given).is_file():
        found = _read_lengths(Path(given), tokenizer)
    else:
        try:
            mean = float(given)
        except ValueError:
            mean = 0.0
        if not SHORTEST <= mean < 1e9:
            what = f"a mean number of tokens (at least {SHORTEST}, start and end included), nor full, nor a file"
            raise ProfileError(f"--caption-lengths {given} is neither {what}.")
        shape = NormalDist(math.log(mean) - SPREAD**2 / 2, SPREAD)
        quantiles = [round(math.exp(shape.inv_cdf((i + 0.5) / pairs))) for i in range(pairs)]
        found = [max(length, SHORTEST) for length in quantiles]
    ordered = sorted(min(max(length, 2), context) for length in found)
    shuffled = torch.randperm(pairs, generator=torch.Generator().manual_seed(0)).tolist()
    return [ordered[int((i + 0.5) * len(ordered) / pairs)] for i in shuffled]


def _read_lengths(path: Path, tokenizer: Callable[[], Callable]) -> list[int]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"The caption lengths cannot be read from {path}: {error}.") from error
    if not lines:
        raise ProfileError(f"{path} is empty; give one caption, or one length in tokens, a line.")
    if all(re.fullmatch(r"\d{1,9}", line) for line in lines):
        return [int(line) for line in lines]
    tokenize = tokenizer()
    ids = tokenize(lines)
    padding = getattr(getattr(tokenize, "tokenizer", None), "pad_token_id", None) or 0
    return ((ids != 0) & (ids != padding)).sum(dim=1).tolist()


def caption_ids(model: nn.Module, lengths: Sequence[int]) -> Tensor:
    """Token ids (B, context length) on the CPU of random captions of these lengths, padded after the end of text."""
    tower = text_tower(model)
    # Hugging Face's towers name their own; OpenCLIP's are pooled at an id, or at the highest there is.
    config = getattr(tower, "config", None)
    padding = getattr(config, "pad_token_id", None) or 0
    vocabulary = getattr(tower, "vocab_size", None) or config.vocab_size
    end = vocabulary - 1
    if _pool_type(tower) == "eos":
        end = getattr(tower, "eos_id", None) or tower.text_eos_id
    context = context_length(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocabulary - 1, (len(lengths), context), generator=generator)
    ids[ids == end] = 2
    place, last = torch.arange(context), torch.tensor(lengths).unsqueeze(1) - 1
    return torch.where(place == last, end, torch.where(place < last, ids, padding))


def context_length(model: nn.Module) -> int:
    """Columns of the token ids that OpenCLIP's tokenizer for this model makes."""
    tower = text_tower(model)
    if isinstance(tower, HFTextEncoder):  # tells how many it could take, or 0
        return min(tower.context_length or USUAL_CONTEXT, USUAL_CONTEXT)
    return tower.context_length
