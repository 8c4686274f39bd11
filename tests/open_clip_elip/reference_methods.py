"""The rival methods as their papers say them, sample by sample and token by token: slow, literal, independent.

Like `reference.py`: meant for float64; choices are plain numbers, so no gradient can pass through one; nothing here is
imported from `open_clip_elip`. Positions are 0-based among all tokens but `[CLS]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
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
                attention = sum(matrix[0, 1:] for matrix in matrices) / len(matrices)
                values = attention.tolist()
                keep = math.ceil(Fraction(str(keep_rate)) * len(values))
                best_first = sorted(range(len(values)), key=lambda position: -values[position])
                kept, others = sorted(best_first[:keep]), sorted(best_first[keep:])
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
    new_tokens, new_members = [], []
    for a in set_a:
        if a not in merged:
            new_tokens.append(sequence[a])
            new_members.append(members[a])
    for b in set_b:
        group = [b] + [a for a in merged if merged[a] == b]
        total = sum(len(members[i]) for i in group)
        new_tokens.append(sum(len(members[i]) * sequence[i] for i in group) / total)
        new_members.append(sorted(sum((members[i] for i in group), [])))
    return torch.stack(new_tokens), new_members


def random_drop(blocks: Sequence[nn.Module], x: Tensor, kept: list[list[int]]) -> Tensor:
    """`[CLS]` and the patches `kept` of each sample, as they come."""
    chosen = [torch.stack([seq[0]] + [seq[1 + i] for i in k]) for seq, k in zip(x, kept, strict=True)]
    x = torch.stack(chosen)
    for block in blocks:
        x = block(x)
    return x
