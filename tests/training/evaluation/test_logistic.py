import dataclasses
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from training.evaluation import features as module
from training.evaluation.features import FeatureRows, FeatureSet
from training.evaluation.logistic import LinearClassifier, Objective, fit, held_out_score

CPU = torch.device("cpu")


def rows_of(features, labels, rows=None, num_classes=None):
    features, labels = torch.as_tensor(features), torch.as_tensor(labels)
    rows = torch.arange(len(labels)) if rows is None else torch.as_tensor(rows)
    return FeatureRows([FeatureSet(features, labels, rows)], num_classes or int(labels.max()) + 1, CPU)


def noise_rows(count=50, width=7, num_classes=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count,), generator=generator)
    features = torch.randn(count, width, generator=generator, dtype=torch.float64) + 3
    return rows_of(features.to(dtype), labels, num_classes=num_classes)


@pytest.fixture(scope="module")
def digits():
    """Features (N, 64) in 0..1 and classes, for training and for test."""
    features, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return [(features[part] / 16, labels[part]) for part in (order[:1200], order[1200:])]


# --- the objective ---


@pytest.mark.parametrize("regularisation", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_gradient_is_autograds(monkeypatch, regularisation, chunk):
    rows = noise_rows()
    monkeypatch.setattr(module, "CHUNK_NUMBERS", chunk * 7)
    generator = torch.Generator().manual_seed(1)
    theta = torch.randn(4 * 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight, bias = theta[:28].view(4, 7), theta[28:]
    part = rows.parts[0]
    expected = F.cross_entropy(part.features @ weight.T + bias, part.labels, reduction="sum")
    expected = expected + weight.square().sum() / (2 * regularisation)
    expected.backward()
    loss, grad = Objective(rows, regularisation)(theta)
    assert loss == pytest.approx(expected.item(), rel=1e-13)
    torch.testing.assert_close(grad, theta.grad, rtol=1e-12, atol=1e-12)


def test_nothing_cancels_for_certain_rows():
    """Where the right class has nearly all the probability, float32 still tells how much is left."""
    (loss, grad), (exact, exact_grad) = (
        Objective(rows_of(torch.eye(3, dtype=dtype) * 40, [0, 1, 2]), 1e30)(torch.eye(4, 3, dtype=dtype).flatten())
        for dtype in (torch.float32, torch.float64)
    )
    assert 0 < exact < 1e-15
    assert loss == pytest.approx(exact, rel=1e-6)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=0)


# --- scikit-learn ---


def sklearn_fit(features, labels, c):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LogisticRegression(C=c, max_iter=3000, tol=1e-8).fit(features, labels)


@pytest.mark.parametrize("c", [1e-3, 1.0, 100.0])
def test_equals_sklearn(digits, c):
    (features, labels), (test_features, test_labels) = digits
    theirs = sklearn_fit(features, labels, c)
    ours = fit(rows_of(features, labels), c, tolerance=1e-9)
    scale = np.abs(theirs.coef_).max()
    np.testing.assert_allclose(ours.weight.numpy(), theirs.coef_, atol=1e-3 * scale)
    np.testing.assert_allclose((ours.bias - ours.bias.mean()).numpy(), theirs.intercept_, atol=1e-3 * scale)
    for dtype, tolerance in ((torch.float64, 0), (torch.float32, 0.002), (torch.bfloat16, 0.005)):
        classifier = fit(rows_of(torch.tensor(features, dtype=dtype), labels), c)
        top1, _ = held_out_score(classifier, rows_of(torch.tensor(test_features, dtype=dtype), test_labels))
        assert top1 == pytest.approx(theirs.score(test_features, test_labels), abs=tolerance + 1e-9)
        assert classifier.converged


def test_two_classes_are_sklearns_with_twice_the_c(digits):
    features, labels = (part[digits[0][1] < 2] for part in digits[0])
    theirs, ours = sklearn_fit(features, labels, 2.0), fit(rows_of(features, labels), 1.0, tolerance=1e-9)
    np.testing.assert_allclose((ours.weight[1] - ours.weight[0]).numpy(), theirs.coef_[0], atol=1e-4)
    assert (ours.bias[1] - ours.bias[0]).item() == pytest.approx(theirs.intercept_[0], abs=1e-3)


def test_standardized_as_in_sklearn(digits):
    """The classifier is for plain features; a constant column has no weight."""
    (features, labels), (test_features, test_labels) = digits
    features = features * np.linspace(0.01, 50, 64) + 7  # the corners of the pictures are always 7
    scaler = StandardScaler().fit(features)
    theirs = sklearn_fit(scaler.transform(features), labels, 0.05)
    rows = rows_of(features, labels).standardized()
    ours = fit(rows, 0.05, tolerance=1e-9)
    np.testing.assert_allclose(ours.weight.numpy() * scaler.scale_, theirs.coef_, atol=1e-4)
    assert torch.count_nonzero(ours.weight[:, 0]) == 0
    test = rows_of(test_features * np.linspace(0.01, 50, 64) + 7, test_labels)
    logits = torch.cat([logits for logits, _ in ours.logits(test)])
    expected = theirs.decision_function(scaler.transform(test.parts[0].features.numpy()))
    np.testing.assert_allclose((logits - logits.mean(dim=1, keepdim=True)).numpy(), expected, atol=1e-3)


def test_centred_and_whitened_coordinates_help():
    """Features as networks have them: far from 0, and a thousand times wider in some directions than in others."""
    rows = noise_rows(400, 12, 3, torch.float32)
    wild = rows_of(rows.parts[0].features * torch.logspace(-2, 1, 12) + 100, rows.parts[0].labels)
    classifier = fit(wild, 1e3)
    assert classifier.converged and classifier.iterations <= 60
    theta = torch.cat([classifier.weight.flatten(), classifier.bias]).double()
    precise = rows_of(wild.parts[0].features.double(), rows.parts[0].labels)
    exact = fit(precise, 1e3)
    objective = Objective(precise, 1e3)
    best, _ = objective(torch.cat([exact.weight.flatten(), exact.bias]))
    assert objective(theta)[0] == pytest.approx(best, rel=1e-4)


# --- where the rows are ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_from_a_file_give_the_same_bits(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(module, "CHUNK_NUMBERS", 7 * 20)
    rows = noise_rows(150, dtype=dtype)
    part = rows.parts[0]
    expected = fit(rows, 0.1, iterations=30)
    (tmp_path / "f").write_bytes(part.features.view(torch.uint8).numpy().tobytes())
    file = torch.from_file(str(tmp_path / "f"), shared=False, size=part.features.numel(), dtype=dtype)
    streamed = dataclasses.replace(rows, parts=[part._replace(features=file.view(part.features.shape))])
    wide = dataclasses.replace(rows, parts=[part._replace(features=part.features.float())])
    for other in (streamed, wide):
        classifier = fit(other, 0.1, iterations=30)
        assert torch.equal(classifier.weight, expected.weight) and torch.equal(classifier.bias, expected.bias)


def test_chunks_of_some_rows_of_two_matrices(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_NUMBERS", 2 * 4)  # chunks of two rows
    features = torch.arange(40.0).view(10, 4)
    labels = torch.arange(10)
    first, second = torch.tensor([1, 2, 5, 7, 8]), torch.tensor([0, 9])
    rows = FeatureRows([FeatureSet(features, labels, first), FeatureSet(features + 100, labels, second)], 3, CPU)
    wanted = torch.cat([features[first], features[second] + 100])
    x, y = zip(*rows.chunks(), strict=True)
    assert [len(part) for part in x] == [2, 2, 1, 2]
    assert torch.equal(torch.cat(x), wanted) and torch.cat(y).tolist() == [1, 2, 5, 7, 8, 0, 9]
    assert (len(rows), rows.width) == (7, 4)


# --- ends ---


def test_iterations_are_limited():
    classifier = fit(noise_rows(), 1e6, iterations=13, tolerance=1e-12)
    assert (classifier.iterations, classifier.converged) == (13, False)


def test_the_penalty_spares_the_bias():
    """With one-sided classes and a weight of nothing, the bias alone tells how frequent they are."""
    labels = torch.tensor([0] * 90 + [1] * 10)
    rows = rows_of(torch.randn(100, 3, generator=torch.Generator().manual_seed(0)), labels)
    classifier = fit(rows, 1e-9)
    assert classifier.weight.abs().max() < 0.02
    assert (classifier.bias[0] - classifier.bias[1]).item() == pytest.approx(np.log(9), abs=0.02)


@pytest.mark.parametrize("features", [torch.ones(6, 3), torch.zeros(6, 3), torch.eye(6)])
def test_degenerate_rows_still_give_numbers(features):
    classifier = fit(rows_of(features, [0, 1, 0, 1, 0, 1]), 1.0)
    assert classifier.weight.isfinite().all() and classifier.bias.isfinite().all()


def test_held_out_score():
    classifier = LinearClassifier(torch.eye(3), torch.zeros(3))
    rows = rows_of(torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [2, 0, 0]]), [0, 1, 2, 1])
    top1, loss = held_out_score(classifier, rows)
    right = -np.log(np.exp(2) / (np.exp(2) + 2))
    assert top1 == 0.75
    assert loss == pytest.approx((3 * right + right + 2) / 4, rel=1e-6)
    assert held_out_score(LinearClassifier(torch.full((3, 3), torch.nan), torch.zeros(3)), rows) == (0, np.inf)
