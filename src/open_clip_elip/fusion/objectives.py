"""What the fusion models share of their losses: momentum targets, hard negatives, distillation, masked words."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Under a softmax: where it underflows, a draw in proportion to the weights still finds one. No other draw is changed.
FLOOR = 1e-12

CHOSEN, MASKED, RANDOM = 0.15, 0.8, 0.1  # of the tokens; of the chosen ones: what becomes [MASK], or any token


def similarities(features: Tensor, own: Tensor, queue: Tensor, temperature: Tensor) -> Tensor:
    """(B, D) unit vectors against (B, D) of the batch and (D, Q) of a queue: (B, B+Q), divided by `temperature`."""
    return torch.cat([features @ own.t(), features @ queue], dim=1) / temperature


def mixed_targets(teacher: Tensor, positives: Tensor, alpha: float) -> Tensor:
    """What a student's rows are to be: softmax of the `teacher`'s, alpha of it, and the rest spread over `positives`.

    Args:
        teacher: (B, C) logits; no gradient flows.
        positives: (B, C), true at what belongs together; at least one a row.
    """
    one_hot = positives / positives.sum(dim=1, keepdim=True)
    return alpha * F.softmax(teacher.detach(), dim=1) + (1 - alpha) * one_hot


def negative_weights(similarity: Tensor, positives: Tensor, floor: float = FLOOR) -> Tensor:
    """(B, B) in proportion to which a row's negative is drawn: softmax of its similarities, and `floor`; 0 at
    `positives`."""
    return (F.softmax(similarity.detach(), dim=1) + floor).masked_fill(positives, 0)


def draw(weights: Tensor) -> Tensor:
    """(B,) one column a row, in proportion to `weights` (B, C); -1 for a row whose weights are all 0, or not finite."""
    weights = weights.nan_to_num(0, 0, 0)  # a draw from these would end the run, before the loss is found not finite
    empty = weights.sum(dim=1) == 0
    return torch.multinomial(weights + empty[:, None], 1).squeeze(1).masked_fill(empty, -1)


def distilled(logits: Tensor, labels: Tensor, teacher: Tensor | None, alpha: float) -> Tensor:
    """(1 - alpha) cross-entropy with `labels` (n,) + alpha cross-entropy with the `teacher`'s softmax, means over n.

    0 where there is no label at all.
    """
    if not len(labels):
        return logits.sum() * 0
    loss = F.cross_entropy(logits, labels)
    if teacher is None:
        return loss
    return (1 - alpha) * loss + alpha * F.cross_entropy(logits, F.softmax(teacher.detach(), dim=1))


def mask_tokens(text: Tensor, mask_id: int, vocab_size: int, fixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masks tokens as BERT does.

    Args:
        text: (B, L) token ids.
        fixed: ids that are never chosen.

    Returns:
        (B, L) ids with some of them masked; (n,) places of those that were chosen, counted through all rows; (n,) what
        was there.
    """
    chosen = (torch.rand(text.shape) < CHOSEN) & ~torch.isin(text, fixed)
    return replaced(text, chosen, mask_id, torch.rand(text.shape), torch.randint(vocab_size, text.shape))


def replaced(
    text: Tensor, chosen: Tensor, mask_id: int, kind: Tensor, words: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `mask_tokens`, of the tokens that are `chosen` (B, L).

    Args:
        kind: (B, L) uniform in [0, 1): what becomes of each.
        words: (B, L) what takes the place of some.
    """
    masked = text.masked_fill(chosen & (kind < MASKED), mask_id)
    masked = words.where(chosen & (kind >= MASKED) & (kind < MASKED + RANDOM), masked)
    places = chosen.flatten().nonzero().squeeze(1)
    return masked, places, text.flatten()[places]


def choose_words(text: Tensor, draws: Tensor, continues: Tensor, outside: Tensor) -> Tensor:
    """(B, L) tokens that are masked as in METER's program: whole words in random order, as long as they fit into a
    budget of 15 % of the columns, padding included; a word that does not fit is passed over.

    Each token of padding counts as a word, and so does a special token that is not `outside`: they use up the budget.

    Args:
        text: (B, L) token ids, padded to what the model takes.
        draws: (B, L) uniform at random, the order of words.
        continues: (vocabulary,) which ids go on with the word before them.
        outside: ids that are in no word.
    """
    inside, budget = ~torch.isin(text, outside), max(1, round(CHOSEN * text.shape[1]))
    begins = inside & (~continues[text] | (inside.cumsum(dim=1) == 1))
    word = (begins.cumsum(dim=1) - 1).clamp_min(0)
    sizes = torch.zeros_like(text).scatter_add(1, word, inside.long())
    used, taken = torch.zeros_like(text[:, :1]), torch.zeros_like(inside)
    for number in draws.argsort(dim=1).split(1, dim=1):
        size = sizes.gather(1, number)
        fits = used + size <= budget
        used = used + size * fits
        taken.scatter_(1, number, fits)
    return taken.gather(1, word) & inside


def places_to_write(mask: Tensor, prompt: int = 1) -> Tensor:
    """(n,) places of the tokens of (B, L), counted through all rows, after which there is another that is no prompt."""
    chosen = mask.clone()
    chosen[:, :prompt] = False
    return chosen.flatten().nonzero().squeeze(1) - 1
