"""Answers to learn: how they are normalised, which are frequent, and their scores."""
import pytest

from training.data.arrow import LeftOut
from training.evaluation.vqa_accuracy import frequent_answers, normalised, soft_scores, vqa_accuracy
from training.tasks import vqa


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A dog", "dog"), ("the", ""), ("Two", "2"), ("1,000", "1000"), ("3.5", "3.5"), ("T.V.", "tv"), ("2.", "2"),
        ("dont", "don't"), ("Im", "im"), ("black/white", "black white"), ("black / white", "black white"),
        ("5 o'clock", "5 o'clock"), ("none", "0"), ("no one", "no 1"), ("$5", "$5"),
    ],
)  # fmt: skip
def test_normalised(answer, expected):
    assert normalised(answer) == expected


def test_frequent_answers_come_in_the_order_of_their_first_appearance():
    answers = ["rare"] * 8 + ["Two"] + ["yes"] * 8 + ["2."] * 8 + ["Yes!", "the"] + ["a"] * 8
    assert frequent_answers(answers) == ["2", "yes", ""]


def test_scores_are_accuracies_among_ten_people():
    for count in range(1, 11):
        people = ["yes"] * count + [f"no {n}" for n in range(10 - count)]
        assert soft_scores(people)["yes"] == pytest.approx(vqa_accuracy("yes", people))
        assert vqa_accuracy("yes", soft_scores(people)) == soft_scores(people)["yes"]
    assert vqa_accuracy("no", {"yes": 1.0}) == 0


def test_labels_are_answers_of_the_list_as_people_gave_them():
    numbers = {"yes": 4, "no": 2}

    def read(people, train=True):
        return vqa.read_labels({"image": "a", "question": "b", "answer": people}, numbers, train=train)

    assert read(["yes"] * 4 + ["no"] * 2 + ["No"] * 4)[1]["labels"] == {4: 1.0, 2: 0.6}
    for found in (read(["Yes"] * 10), read(["Yes"] * 10, train=False), read([])):
        assert isinstance(found, LeftOut) and found == "question without an answer of the list"
    assert read([], train=False)[1]["labels"] == {}
    assert read(3) == 'its "answer" is neither a text nor a list of texts'


def test_a_list_of_normalised_answers_may_have_an_empty_one(tmp_path):
    (tmp_path / "answers.json").write_text('["yes", ""]')
    assert vqa.read_answers(str(tmp_path / "answers.json"), blank=True) == ["yes", ""]
