"""ELIP as its description says it, sample by sample and token by token: slow, literal, independent of the package.

Everything is meant for float64. Features keep their autograd graph; scores and guidance are plain numbers.
Nothing here is imported from `open_clip_elip`, so that an error there cannot hide here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class StageTrace:
    """What one stage did: 0-based positions among its input tokens, `[CLS]` not counted, a list for each sample.

    All three are None where the stage did nothing.
    """

    kept: list[list[int]] | None
    dropped: list[list[int]] | None
    scores: Tensor | None  # (B, N), N = number of tokens that entered the stage


def attention_matrix(block: nn.Module, sequence: Tensor, head: int) -> Tensor:
    """Softmax attention of one head over one sequence. sequence: (T, D) -> (T, T), rows are queries."""
    width = sequence.shape[1]
    head_width = width // block.attn.num_heads
    normed = block.ln_1(sequence)
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    queries, keys = [], []
    for token in normed:
        packed = weight @ token + bias  # query, key, value one after the other
        queries.append(packed[head * head_width : (head + 1) * head_width])
        keys.append(packed[width + head * head_width : width + (head + 1) * head_width])
    rows = []
    for query in queries:
        logits = [float(query @ key) / math.sqrt(head_width) for key in keys]
        highest = max(logits)
        powers = [math.exp(logit - highest) for logit in logits]
        rows.append([power / math.fsum(powers) for power in powers])
    return torch.tensor(rows, dtype=sequence.dtype)


@torch.no_grad()
def cls_scores(block: nn.Module, y: Tensor) -> Tensor:
    """Attention of `[CLS]` on each other token, mean over heads. y: (B, 1+N, D) -> (B, N); does not sum to one."""
    heads = block.attn.num_heads
    scores = []
    for sequence in y:
        of_cls = [attention_matrix(block, sequence, head)[0, 1:] for head in range(heads)]
        scores.append(sum(of_cls) / heads)
    return torch.stack(scores)


@torch.no_grad()
def fuse(x: Tensor, guidance: Tensor | None, lam: float, text_scale: str) -> Tensor:
    """Eq. 1 on a copy: `[CLS]` becomes lam * `[CLS]` + (1 - lam) * t. x: (B, 1+N, D), guidance: (B, D) or None."""
    y = x.detach().clone()
    if guidance is None:
        return y
    for sample in range(x.shape[0]):
        cls, text = x[sample, 0].detach(), guidance[sample].detach()
        if text_scale == "match":
            text = text / text.norm() * cls.norm()
        y[sample, 0] = lam * cls + (1 - lam) * text
    return y


@torch.no_grad()
def score_stage(
    blocks: Sequence[nn.Module],
    x: Tensor,
    guidance: Tensor | None,
    lam: float,
    text_scale: str,
    scoring_depth: int | None,
) -> Tensor:
    """Scores of the tokens of `x` (B, 1+N, D) by the layers of one stage -> (B, N)."""
    used = len(blocks) if scoring_depth is None else min(scoring_depth, len(blocks))
    y = fuse(x, guidance, lam, text_scale)
    for block in blocks[: used - 1]:
        y = block(y)
    return cls_scores(blocks[used - 1], y)


def reduce_tokens(x: Tensor, scores: Tensor, keep: int, merge: bool) -> tuple[Tensor, list[list[int]], list[list[int]]]:
    """Keep the `keep` best tokens in their order and append the weighted sum of the others. -> (x', kept, dropped)."""
    sequences, all_kept, all_dropped = [], [], []
    for sample in range(x.shape[0]):
        values = scores[sample].tolist()
        best_first = sorted(range(len(values)), key=lambda position: -values[position])
        kept, dropped = sorted(best_first[:keep]), sorted(best_first[keep:])
        tokens = [x[sample, 0]] + [x[sample, 1 + position] for position in kept]
        if merge:
            total = math.fsum(values[position] for position in dropped)
            tokens.append(sum(values[position] / total * x[sample, 1 + position] for position in dropped))
        sequences.append(torch.stack(tokens))
        all_kept.append(kept)
        all_dropped.append(dropped)
    return torch.stack(sequences), all_kept, all_dropped


def run(
    blocks: Sequence[nn.Module],
    x: Tensor,
    guidance: Tensor | None,
    *,
    depths: Sequence[int],
    keep_ratio: Sequence[float] | None = None,
    keep_count: Sequence[int] | None = None,
    lam: float = 0.6,
    merge: bool = True,
    text_scale: str = "match",
    scoring_depth: int | None = None,
) -> tuple[Tensor, list[StageTrace], list[int]]:
    """The whole schedule. x: (B, 1+M, D), guidance: (B, D) or None.

    Returns the output of the last layer, one trace a stage, and the sequence length in each layer.
    """
    blocks = list(blocks)
    initial = x.shape[1] - 1
    traces, lengths, first = [], [], 0
    for stage, depth in enumerate(depths):
        layers = blocks[first : first + depth]
        keep = keep_count[stage] if keep_count is not None else max(1, int(keep_ratio[stage] * initial))
        trace = StageTrace(None, None, None)
        if x.shape[1] - 1 > keep:
            scores = score_stage(layers, x, guidance, lam, text_scale, scoring_depth)
            x, kept, dropped = reduce_tokens(x, scores, keep, merge)
            trace = StageTrace(kept, dropped, scores)
        for block in layers:
            x = block(x)
            lengths.append(x.shape[1])
        traces.append(trace)
        first += depth
    assert first == len(blocks), "the schedule must cover every layer"
    return x, traces, lengths
