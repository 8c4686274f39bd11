"""Scores of a classifier against answers known by hand, on all of its classes and on some of ImageNet's."""
import numpy as np
import pytest
import torch
from open_clip import IMAGENET_CLASSNAMES
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from training.data.sets.labelled import ArrayImages, LabelledImages
from training.errors import UserError
from training.evaluation.passes import NotFinite
from training.evaluation.scores import check_classes, class_scores, is_imagenet, score


def data(labels, classnames, imagenet_classes=None, name="made"):
    pixels = np.zeros((len(labels), 2, 2), dtype=np.uint8)
    return LabelledImages(
        ArrayImages(pixels, "memory"), torch.tensor(labels), classnames, name=name, imagenet_classes=imagenet_classes
    )


def test_scores_known_by_hand():
    made = data([0, 0, 0, 1, 2, 2], ["a", "b", "c"])
    logits = torch.eye(3)[[0, 0, 1, 1, 2, 0]]
    assert score(logits, made, torch.arange(6)) == {
        "top1": 4 / 6, "top5": 1.0, "mean_per_class_recall": (2 / 3 + 1 + 1 / 2) / 3, "num_samples": 6
    }  # fmt: skip
    some, order = logits[[5, 0, 2]], torch.tensor([5, 0, 2])  # wrong, right, wrong
    assert score(some, made, order)["top1"] == pytest.approx(1 / 3)


def test_agrees_with_scikit_learn():
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 9, (500,), generator=g)
    logits = torch.randn(500, 9, generator=g) + 1.5 * torch.eye(9)[labels]
    got = score(logits, data(labels.tolist(), list("abcdefghi")), torch.arange(500))
    assert got["top1"] == pytest.approx(top_k_accuracy_score(labels, logits, k=1))
    assert got["top5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5))
    assert got["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)))


@pytest.mark.parametrize(
    ("groups", "logits", "expected"),
    [
        ([[10], [24]], {(0, 10): 1, (1, 24): 1, (0, 500): 9, (1, 500): 9}, [[1, 0], [0, 1]]),  # not 500
        ([[1, 3], [2]], {(0, 3): 5, (0, 2): 4, (1, 2): 1}, [[5, 4], [0, 1]]),  # a class of several: their highest
    ],
)
def test_only_the_classes_of_a_subset_compete(groups, logits, expected):
    subset, scores = data([0, 1], ["wren", "owl"], imagenet_classes=groups), torch.zeros(2, 1000)
    for place, value in logits.items():
        scores[place] = value
    assert class_scores(scores, subset).tolist() == expected
    assert score(scores, subset, torch.arange(2))["top1"] == 1
    own = torch.tensor([[2.0, 1.0], [0.0, 1.0]])  # of a classifier of the subset itself
    assert torch.equal(class_scores(own, subset), own)


def test_scores_that_are_no_numbers_are_refused():
    logits = torch.zeros(2, 2)
    logits[1, 0] = torch.nan
    with pytest.raises(NotFinite, match=r"The scores of memory, row 1 are not finite"):
        score(logits, data([0, 1], ["chair", "cup"]), torch.arange(2))


@pytest.mark.parametrize("classes", [1, 2])
def test_fewer_classes_and_samples_than_there_are_places(classes):
    made = data([0], list("ab")[:classes])
    found = score(torch.eye(classes)[:1], made, torch.arange(1))
    assert found == {"top1": 1, "top5": 1, "mean_per_class_recall": 1, "num_samples": 1}


def test_what_does_not_fit_is_said():
    three, two = data([0], list("abc")), data([0], list("ab"), name="two")
    check_classes(three, data([1, 2], list("abc"), name="other"))
    with pytest.raises(UserError, match=r"two \(test\) has 2 classes, but the classifier is for the 3 of made"):
        check_classes(three, two)
    with pytest.raises(UserError, match="1 of the 3 classes .* differ .class 2 is 'x' in the one and 'c' in the other"):
        check_classes(three, data([0], list("abx")))


def test_imagenet_is_known_by_its_names_or_its_numbers():
    subset = data([0], ["wren"], imagenet_classes=[[10]], name="subset")
    by_names = data([0], list(IMAGENET_CLASSNAMES))
    by_numbers = data([0], [str(i) for i in range(1000)], imagenet_classes=[[i] for i in range(1000)])
    other = data([0], [str(i) for i in range(1000)])
    assert is_imagenet(by_names) and is_imagenet(by_numbers) and not is_imagenet(other) and not is_imagenet(subset)
    check_classes(by_names, subset)
    check_classes(by_numbers, subset)
    with pytest.raises(UserError, match="which are some of ImageNet's"):
        check_classes(other, subset)
