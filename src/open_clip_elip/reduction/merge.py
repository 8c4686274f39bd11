"""Keep the tokens that matter, fuse the others into one (Eq. 3 and 4 of the paper)."""
from __future__ import annotations

import torch
from torch import Tensor


def keep_and_merge(x: Tensor, scores: Tensor, keep: int, merge: bool = True) -> tuple[Tensor, Tensor]:
    """Shortens a sequence to `[CLS]`, the `keep` best patches in their original order, and one merged token.

    Gradient flows through the features of kept and merged tokens, never through `scores`.

    Args:
        x: (B, 1+N, D), `[CLS]` first; `keep` < N.
        scores: (B, N), not negative.
        merge: append the others' features, weighted by score / sum of their scores (Eq. 4), as the last token.

    Returns:
        (B, 1+K+1, D) (or (B, 1+K, D) without merging) and the kept positions (B, K), ascending, without `[CLS]`.
    """
    scores = scores.detach()
    kept_BK = best(scores, keep)
    parts = [x[:, :1], gather_tokens(x[:, 1:], kept_BK)]
    if merge:
        # Scores that all underflow, under a very sharp attention, merge to the plain mean instead of to NaN.
        weights_BN = (scores + torch.finfo(scores.dtype).tiny).scatter(1, kept_BK, 0.0)
        parts.append(weighted_sum(x[:, 1:], weights_BN / weights_BN.sum(dim=1, keepdim=True)))
    return torch.cat(parts, dim=1), kept_BK


def best(scores: Tensor, keep: int) -> Tensor:
    """Positions (B, K), ascending, of the `keep` highest of `scores` (B, N)."""
    return scores.topk(keep, dim=1, sorted=False).indices.sort(dim=1).values


def destinations(kept: Tensor, count: int, merge: bool) -> Tensor:
    """(B, N) `Removal.into`, of `count` = N tokens, where those `kept` (B, K) go on, and one made of the others behind
    them with `merge`."""
    keep = kept.shape[1]
    into = kept.new_full((len(kept), count), keep if merge else -1)
    return into.scatter(1, kept, torch.arange(keep, device=kept.device).expand_as(kept))


def weighted_sum(x: Tensor, weights: Tensor) -> Tensor:
    """(B, 1, D) from `x` (B, N, D) and `weights` (B, N)."""
    # Not a matrix product: autocast would round the residual stream to half precision there.
    return (weights.to(x.dtype).unsqueeze(-1) * x).sum(dim=1, keepdim=True)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """(B, K, D): the tokens `index` (B, K) of `x` (B, N, D)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def norm(x: Tensor) -> Tensor:
    """Length of the last dimension, kept, in at least float32."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
