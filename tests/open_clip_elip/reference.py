"""The methods as their papers say them, sample by sample and token by token: slow, literal, independent of the package.

Everything is meant for float64. Features keep their autograd graph; ELIP's scores, choices and guidance are plain
numbers, so no gradient can pass through one. Nothing here is imported from `open_clip_elip`, so no error can hide here.
Positions are 0-based among all tokens but `[CLS]`.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(block: nn.Module, sequence: Tensor, sizes: Sequence[int] | None = None):
    """The first half of a block, head by head. sequence: (T, D).

    Returns the residual stream after the attention, and of each head the attention matrix (T, T) and the keys (T, d).
    With `sizes` a token counts as so many (proportional attention).
    """
    attn = block.attn
    width = attn.embed_dim // attn.num_heads
    normed = block.ln_1(sequence)
    (w_q, w_k, w_v), (b_q, b_k, b_v) = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
    outputs, matrices, all_keys = [], [], []
    for head in range(attn.num_heads):
        of_head = slice(head * width, (head + 1) * width)
        queries = normed @ w_q[of_head].T + b_q[of_head]
        keys = normed @ w_k[of_head].T + b_k[of_head]
        values = normed @ w_v[of_head].T + b_v[of_head]
        powers = (queries @ keys.T / math.sqrt(width)).exp()
        if sizes is not None:
            powers = powers * torch.tensor(sizes, dtype=powers.dtype)
        matrix = powers / powers.sum(dim=1, keepdim=True)
        outputs.append(matrix @ values)
        matrices.append(matrix)
        all_keys.append(keys)
    mixed = torch.cat(outputs, dim=1) @ attn.out_proj.weight.T + attn.out_proj.bias
    return sequence + block.ls_1(mixed), matrices, all_keys


def through_mlp(block: nn.Module, sequence: Tensor) -> Tensor:
    return sequence + block.ls_2(block.mlp(block.ln_2(sequence)))


def cls_attention(matrices: Sequence[Tensor]) -> Tensor:
    """Attention of `[CLS]` on each other token, mean over heads: (T - 1,); does not sum to one."""
    return sum(matrix[0, 1:] for matrix in matrices) / len(matrices)


def split(values: Sequence[float], keep: int) -> tuple[list[int], list[int]]:
    """The positions of the `keep` highest, and of the others, ascending."""
    best_first = sorted(range(len(values)), key=lambda position: -values[position])
    return sorted(best_first[:keep]), sorted(best_first[keep:])


def image_features(visual: nn.Module, image: Tensor, run: Callable) -> Tensor:
    """Of OpenCLIP's ViT whose layers are run by `run(blocks, x)`, normalised."""
    x = run(visual.transformer.resblocks, visual._embeds(image))
    return F.normalize(visual._pool(x)[0] @ visual.proj, dim=-1)


def output(plain: nn.Module, image: Tensor, text: Tensor, run: Callable) -> dict[str, Tensor]:
    """Of a plain model whose image tower's layers are run by `run(blocks, x, guidance)`."""
    text_features = plain.encode_text(text, normalize=True)
    guidance = (text_features @ plain.visual.proj.T).detach()
    features = image_features(plain.visual, image, lambda blocks, x: run(blocks, x, guidance))
    return {"image_features": features, "text_features": text_features, "logit_scale": plain.logit_scale.exp()}


# ---------------------------------------------------------------------- ELIP


class Choice(NamedTuple):
    """What a stage did: positions among its input tokens, a list for each sample."""

    kept: list[list[int]]
    dropped: list[list[int]]


@torch.no_grad()
def score(blocks: Sequence[nn.Module], sequence: Tensor, text: Tensor | None, lam: float, text_scale: str) -> Tensor:
    """Scores (T - 1,) of the tokens of a sequence (T, D) by the layers of one stage, up to the one that scores."""
    y = sequence.clone()
    if text is not None:  # Eq. 1
        if text_scale == "match":
            text = text / text.norm() * y[0].norm()
        y[0] = lam * y[0] + (1 - lam) * text
    for block in blocks[:-1]:
        y = block(y[None])[0]
    return cls_attention(attend(blocks[-1], y)[1])


def run(
    blocks: Sequence[nn.Module], x: Tensor, guidance: Tensor | None, *, depths: Sequence[int],
    keep_ratio: Sequence[float] | None = None, keep_count: Sequence[int] | None = None, lam: float = 0.6,
    merge: bool = True, text_scale: str = "match", scoring_depth: int | None = None,
) -> tuple[Tensor, list[Choice | None], list[int]]:  # fmt: skip
    """The whole schedule. x: (B, 1+M, D), guidance: (B, D) or None.

    Returns the output of the last layer, of each stage its choice (None: it did nothing), and the sequence length in
    each layer.
    """
    blocks, initial = list(blocks), x.shape[1] - 1
    choices, lengths, first = [], [], 0
    for stage, depth in enumerate(depths):
        layers = blocks[first : first + depth]
        keep = keep_count[stage] if keep_count is not None else max(1, int(keep_ratio[stage] * initial))
        choice = None
        if x.shape[1] - 1 > keep:
            choice, sequences = Choice([], []), []
            for sample, sequence in enumerate(x):
                text = None if guidance is None else guidance[sample]
                values = score(layers[:scoring_depth], sequence, text, lam, text_scale).tolist()
                kept, dropped = split(values, keep)
                tokens = [sequence[0]] + [sequence[1 + position] for position in kept]
                if merge:
                    total = math.fsum(values[position] for position in dropped)
                    tokens.append(sum(values[position] / total * sequence[1 + position] for position in dropped))
                sequences.append(torch.stack(tokens))
                choice.kept.append(kept)
                choice.dropped.append(dropped)
            x = torch.stack(sequences)
        for block in layers:
            x = block(x)
            lengths.append(x.shape[1])
        choices.append(choice)
        first += depth
    assert first == len(blocks), "the schedule must cover every layer"
    return x, choices, lengths


# ---------------------------------------------------------------------- its rivals


def evit(blocks: Sequence[nn.Module], x: Tensor, keep_rate: float, layers: Sequence[int], fuse: bool = True):
    """EViT. `layers` are 1-based. -> (output, lengths): lengths are (in attention, in MLP) of each layer.

    Where keeping and fusing would leave as many tokens as there are, the layer does nothing. (The paper's formula would
    shrink one token by its attention there.)
    """
    sequences, lengths = [], []
    for sequence in x:
        lengths = []
        for number, block in enumerate(blocks, start=1):
            entered = len(sequence)
            sequence, matrices, _ = attend(block, sequence)
            if number in layers:
                attention = cls_attention(matrices)
                kept, others = split(attention.tolist(), math.ceil(Fraction(str(keep_rate)) * len(attention)))
                tokens = [sequence[0]] + [sequence[1 + position] for position in kept]
                if fuse and others:
                    tokens.append(sum(attention[position] * sequence[1 + position] for position in others))
                if len(tokens) < entered:
                    sequence = torch.stack(tokens)
            lengths.append((entered, len(sequence)))
            sequence = through_mlp(block, sequence)
        sequences.append(sequence)
    return torch.stack(sequences), lengths


def tome(blocks: Sequence[nn.Module], x: Tensor, r: int | Sequence[int], prop_attn: bool = True):
    """ToMe. -> (output, lengths as of `evit`, for each sample the patches that each token of the output stands for)."""
    sequences, lengths, all_members = [], [], []
    for sequence in x:
        lengths, members = [], [[i] for i in range(len(sequence))]
        for layer, block in enumerate(blocks):
            entered = len(sequence)
            sizes = [len(m) for m in members]
            sequence, _, keys = attend(block, sequence, sizes if prop_attn else None)
            count = min(r[layer] if isinstance(r, (list, tuple)) else r, (entered - 1) // 2)
            if count:
                sequence, members = merge_most_similar(sequence, members, (sum(keys) / len(keys)).detach(), count)
            lengths.append((entered, len(sequence)))
            sequence = through_mlp(block, sequence)
        sequences.append(sequence)
        all_members.append(members)
    return torch.stack(sequences), lengths, all_members


def merge_most_similar(sequence: Tensor, members: list[list[int]], metric: Tensor, count: int):
    """Bipartite soft matching of one sequence (T, D) by `metric` (T, d): its `count` best pairs merge."""
    tokens = range(len(sequence))
    set_a, set_b = tokens[0::2], tokens[1::2]
    edges = []  # (similarity, a, b)
    for a in set_a[1:]:  # the first is [CLS]
        to_b = [(float(metric[a] @ metric[b] / (metric[a].norm() * metric[b].norm())), b) for b in set_b]
        similarity, partner = max(to_b)
        edges.append((similarity, a, partner))
    merged = {a: b for _, a, b in sorted(edges, reverse=True)[:count]}
    stay = [a for a in set_a if a not in merged]
    new_tokens, new_members = [sequence[a] for a in stay], [members[a] for a in stay]
    for b in set_b:
        group = [b] + [a for a in merged if merged[a] == b]
        total = sum(len(members[i]) for i in group)
        new_tokens.append(sum(len(members[i]) * sequence[i] for i in group) / total)
        new_members.append(sorted(sum((members[i] for i in group), [])))
    return torch.stack(new_tokens), new_members
