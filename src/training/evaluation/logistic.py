"""Multinomial logistic regression on feature rows by L-BFGS."""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import FeatureRows
from .metrics import full_float32, outcomes

_BLOCK = 10  # iterations between two looks at how much the objective still falls


@dataclass(frozen=True)
class LinearClassifier:
    """weight: (C, D), bias: (C,), on the device. iterations: how many it took; converged: they were not too few."""

    weight: Tensor
    bias: Tensor
    iterations: int = 0
    converged: bool = True

    def logits(self, rows: FeatureRows) -> Iterator[tuple[Tensor, Tensor]]:
        """(n, C) and the labels (n,) of each chunk of rows, on the device."""
        for x, y in rows.chunks():
            with full_float32():
                logits = torch.addmm(self.bias, x, self.weight.T)
            yield logits, y


@full_float32()
def fit(
    rows: FeatureRows, regularisation: float, iterations: int = 1000, tolerance: float = 1e-6
) -> LinearClassifier:
    """A linear classifier for the classes of `rows`, for features as they are before `rows.shift` and `rows.scale`.

    `regularisation` is the C of scikit-learn's LogisticRegression (with two classes, half of its C), and the objective

        C * sum_i -log softmax(W x_i + b)[y_i] + 0.5 * ||W||^2

    Weights start at zero. It ends when no entry of the gradient is larger than `tolerance` times the largest one there,
    as a fraction of the objective at either point; when ten iterations lower the objective by less than the fraction
    `tolerance` / 10; or after `iterations` (1000 in CLIP). If it diverges, the weights are not finite.
    """
    objective = Objective(rows, regularisation)
    coordinates = _Coordinates(objective)
    size = rows.num_classes * (rows.width + 1)
    theta = torch.zeros(size, dtype=rows.dtype, device=rows.device, requires_grad=True)
    last: tuple[Tensor, float, Tensor] | None = None

    @torch.no_grad()
    def closure() -> float:
        nonlocal last
        if last is None or not torch.equal(theta, last[0]):  # each block begins where the one before ended
            loss, grad = objective(coordinates.to_weights(theta))
            last = theta.clone(), loss, coordinates.gradient(grad)
        theta.grad = last[2]
        return last[1]

    # The optimizer's own stops compare sizes of steps and losses with constants, which mean another thing on each data
    # set; it is run for a few iterations at a time without them.
    endless = {"max_eval": 3 * _BLOCK, "tolerance_grad": 0, "tolerance_change": 0}
    optimizer = torch.optim.LBFGS([theta], history_size=10, line_search_fn="strong_wolfe", **endless)
    loss = closure()
    enough = tolerance * theta.grad.abs().max().item() / loss
    done, converged = 0, False
    while done < iterations and not converged:
        before = loss
        optimizer.param_groups[0]["max_iter"] = min(_BLOCK, iterations - done)
        optimizer.step(closure)
        done = optimizer.state[theta].get("n_iter", 0)
        loss = closure()
        small = theta.grad.abs().max().item() <= enough * loss
        slow = before - loss <= tolerance / 10 * abs(loss)
        converged = small or slow or not math.isfinite(loss)
    weight, bias = _split(coordinates.to_weights(theta.detach()), rows)
    if rows.shift is not None:
        weight = weight / rows.scale
        bias = bias - weight @ rows.shift
    return LinearClassifier(weight, bias, done, converged)


class Objective:
    """f(W, b) = sum_i -log softmax(W x_i + b)[y_i] + ||W||^2 / (2 C), that of `fit` divided by C, and its gradient.

    Only a chunk of the logits exists at a time; the loss is summed in float64, the gradient in the type of the rows.
    """

    def __init__(self, rows: FeatureRows, regularisation: float):
        self.rows, self.penalty = rows, 1 / regularisation

    @torch.no_grad()
    def __call__(self, theta: Tensor) -> tuple[float, Tensor]:
        grad = torch.zeros_like(theta)
        weight, bias = _split(theta, self.rows)
        weight_grad, bias_grad = _split(grad, self.rows)
        loss = torch.zeros((), dtype=torch.float64, device=theta.device)
        for x, y in self.rows.chunks():
            logits = torch.addmm(bias, x, weight.T)
            own = y[:, None]
            # Everything relative to the right class, which is summed apart: nothing cancels where it is almost certain.
            logits -= logits.gather(1, own)
            highest = logits.amax(dim=1, keepdim=True)
            residual = logits.sub_(highest).exp_().scatter_(1, own, 0)
            others = residual.sum(dim=1, keepdim=True)
            loss += (highest + torch.log1p(others + torch.expm1(-highest))).sum(dtype=torch.float64)
            residual.scatter_(1, own, -others).div_(others + torch.exp(-highest))
            weight_grad.addmm_(residual.T, x)
            bias_grad += residual.sum(dim=0)
        loss += self.penalty / 2 * weight.double().square().sum()
        weight_grad.add_(weight, alpha=self.penalty)
        return loss.item(), grad


def held_out_score(classifier: LinearClassifier, rows: FeatureRows) -> tuple[float, float]:
    """Top-1 as a fraction, and the mean cross entropy (infinite for a classifier that is not finite)."""
    hits, loss = 0, 0.0
    for logits, y in classifier.logits(rows):
        hits += int((outcomes(logits, y)[:, 0] == 0).sum())
        loss += F.cross_entropy(logits, y, reduction="none").sum(dtype=torch.float64).item()
    return hits / len(rows), loss / len(rows) if math.isfinite(loss) else math.inf


def _split(theta: Tensor, rows: FeatureRows) -> tuple[Tensor, Tensor]:
    """Views of W (num_classes, width) and b in theta (num_classes * (width + 1),), where W is row by row, then b."""
    weight, bias = theta.tensor_split([rows.num_classes * rows.width])
    return weight.view(rows.num_classes, rows.width), bias


class _Coordinates:
    """theta -> W, b, chosen so that the objective is round at theta = 0.

    W = U P and b = a / r - W m with the mean m of the rows: since b has no penalty, this moves the features' mean to 0.
    P is the inverse root of the Hessian there without its coupling of the classes, n h Cov(x) + 1 / C with
    h = (1 - 1 / classes) / classes, and r that for b. The optimum is the same, and L-BFGS needs a fraction of the
    iterations, since features of a network vary by orders of magnitude more in some directions than in others.
    """

    def __init__(self, objective: Objective):
        rows = objective.rows
        self.rows = rows
        total = torch.zeros(rows.width, dtype=torch.float64, device=rows.device)
        square = torch.zeros(rows.width, rows.width, dtype=torch.float64, device=rows.device)
        for x, _ in rows.chunks():
            total += x.sum(dim=0, dtype=torch.float64)
            square += x.T @ x
        mean = total / len(rows)
        values, vectors = torch.linalg.eigh(square / len(rows) - torch.outer(mean, mean))
        # Where the features hardly vary, all that the gradient has is rounding, which must not be blown up.
        values = values.clamp(min=1e-6 * float(values[-1].clamp(min=0)))
        curvature = len(rows) * (1 - 1 / rows.num_classes) / rows.num_classes
        root = (curvature * values + objective.penalty).rsqrt()
        self.mean = mean.to(rows.dtype)
        self.matrix = (vectors * root @ vectors.T).to(rows.dtype)
        self.bias_scale = curvature**-0.5

    def to_weights(self, theta: Tensor) -> Tensor:
        u, a = _split(theta, self.rows)
        weight = u @ self.matrix
        return torch.cat([weight.flatten(), a * self.bias_scale - weight @ self.mean])

    def gradient(self, grad: Tensor) -> Tensor:
        """The gradient with respect to theta from that with respect to W and b."""
        weight, bias = _split(grad, self.rows)
        return torch.cat([((weight - torch.outer(bias, self.mean)) @ self.matrix).flatten(), bias * self.bias_scale])
