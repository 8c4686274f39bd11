"""How long captions are, in tokens, and batches of captions of given lengths.

The cost of a text tower that is cut at the end of text depends on the lengths, so every figure names them.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist

import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from .errors import ProfileError

MEAN = 14.5  # tokens, start and end included: web captions such as CC3M's
SPREAD = 0.4  # standard deviation of the logarithm: 5 in 100 captions have more than twice the median
SHORTEST = 3
USUAL_CONTEXT = 77


def typical_lengths(pairs: int, mean: float = MEAN, context_length: int = USUAL_CONTEXT) -> list[int]:
    """Lengths of `pairs` captions in tokens, start and end included: evenly spaced quantiles of a log-normal
    distribution, in shuffled order. The same for each call, and without the luck of a draw."""
    shape = NormalDist(math.log(mean) - SPREAD**2 / 2, SPREAD)
    lengths = [round(math.exp(shape.inv_cdf((i + 0.5) / pairs))) for i in range(pairs)]
    return _shuffled([min(max(length, SHORTEST), context_length) for length in lengths])


def read_lengths(path: Path, tokenize: Callable[[list[str]], Tensor], context_length: int) -> list[int]:
    """Lengths from a file with one of them, or one caption to tokenize, a line.

    Raises:
        ProfileError: the file cannot be read or is empty.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"The caption lengths cannot be read from {path}: {error}.") from error
    if not lines:
        raise ProfileError(f"{path} is empty; give one caption, or one length in tokens, a line.")
    if all(line.isdigit() for line in lines):
        lengths = [int(line) for line in lines]
    else:
        ids = tokenize(lines)
        padding = getattr(getattr(tokenize, "tokenizer", None), "pad_token_id", None) or 0
        lengths = ((ids != 0) & (ids != padding)).sum(dim=1).tolist()
    return [min(max(length, 2), context_length) for length in lengths]


def draw_lengths(lengths: Sequence[int], pairs: int) -> list[int]:
    """`pairs` lengths, spread evenly over the sorted `lengths`, in shuffled order."""
    ordered = sorted(lengths)
    return _shuffled([ordered[int((i + 0.5) * len(ordered) / pairs)] for i in range(pairs)])


def caption_ids(model: nn.Module, lengths: Sequence[int]) -> Tensor:
    """Token ids (B, context length) on the CPU of random captions of these lengths, padded after the end of text."""
    tower = getattr(model, "text", model)
    # Hugging Face's towers name their own; OpenCLIP's are pooled at an id, or at the highest there is.
    config = getattr(tower, "config", None)
    padding = getattr(config, "pad_token_id", None) or 0
    vocabulary = getattr(tower, "vocab_size", None) or getattr(config, "vocab_size", None)
    pool = getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", None)
    end = (getattr(tower, "eos_id", None) or tower.text_eos_id) if pool == "eos" else vocabulary - 1
    context = context_length(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocabulary - 1, (len(lengths), context), generator=generator)
    ids[ids == end] = 2
    place, last = torch.arange(context), torch.tensor(lengths).unsqueeze(1) - 1
    return torch.where(place == last, end, torch.where(place < last, ids, padding))


def context_length(model: nn.Module) -> int:
    """Columns of the token ids that OpenCLIP's tokenizer for this model makes."""
    tower = getattr(model, "text", model)
    found = getattr(tower, "context_length", None) or getattr(model, "context_length", None) or USUAL_CONTEXT
    # A Hugging Face tower tells how many it could take.
    return min(found, USUAL_CONTEXT) if isinstance(tower, HFTextEncoder) else found


def _shuffled(lengths: list[int]) -> list[int]:
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    return [lengths[i] for i in order]
