"""METER's Arrow files are read wherever JSON lists are, and to the same samples."""
import pickle
import sys
from functools import partial

import pytest
import torch

from training.data.lists import ListRows, read_pair
from training.data.sets.captioned import CaptionOptions, load_captions
from training.errors import UserError
from training.tasks import entailment, nlvr2, vqa
from training.tasks.retrieval import numbered

from ..arrow_files import PICTURES, write_arrow, write_captions, write_json, write_pictures
from ..data_helpers import assert_same_batches, keys, train_data, val_data

pyarrow = pytest.importorskip("pyarrow")

CAPTIONS = [["a b", "c", "a b"], ["d"], ["e", "c"], ["f"], ["g"], ["h", "i"]]
ONCE = [["a b", "c"], *CAPTIONS[1:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For each kind of sample an Arrow file and the JSON list of the same samples."""
    folder = tmp_path_factory.mktemp("lists")
    write_pictures(folder)
    write_captions(folder / "pairs.arrow", CAPTIONS, split=["train"] * 6)
    pairs = [(n, caption) for n, captions in enumerate(ONCE) for caption in captions]
    items = [{"image": f"{n}.jpg", "caption": caption, "image_id": f"{n}.jpg"} for n, caption in pairs]
    write_json(folder / "pairs.json", items)

    answers, scores = [[["red"], ["2", "two"]], [["no"]]], [[[1.0], [0.6, 0.3]], [[0.9]]]
    write_arrow(
        folder / "questions.arrow", image=PICTURES[:2], image_id=["x", "y"], question_id=[[7, 8], [9]],
        questions=[["what?", "how many?"], ["is it?"]], answers=answers, answer_scores=scores,
        answer_labels=[[[4], [5, 6]], [[7]]], split=["val"] * 2,
    )  # fmt: skip
    people = [["red"] * 9 + ["blue"], ["2", "two", "2"], ["no"] * 3]
    asked = zip((0, 0, 1), ("what?", "how many?", "is it?"), (7, 8, 9), people, strict=True)
    write_json(folder / "questions.json", [
        {"image": f"{n}.jpg", "question": question, "question_id": number, "answer": said}
        for n, question, number, said in asked
    ])  # fmt: skip

    write_arrow(
        folder / "two.arrow", image_0=PICTURES[:2], image_1=PICTURES[2:4], identifier=["dev-0", "dev-1"],
        questions=[["both"], ["left", "right"]], answers=[["True"], ["False", "True"]],
    )  # fmt: skip
    told = ((0, 2, "both", "True"), (1, 3, "left", "False"), (1, 3, "right", "True"))
    items = [{"images": [f"{a}.jpg", f"{b}.jpg"], "sentence": text, "label": label} for a, b, text, label in told]
    write_json(folder / "two.json", items)

    sentences = [[["premise", "no"], ["premise", "maybe"]], [["premise", "yes"]]]
    write_arrow(folder / "sentences.arrow", image=PICTURES[:2], sentences=sentences, labels=[[0, 1], [2]])
    told = ((0, "no", "contradiction"), (0, "maybe", "neutral"), (1, "yes", "entailment"))
    items = [{"image": str(n), "sentence": text, "label": label} for n, text, label in told]
    write_json(folder / "sentences.json", items)
    return folder


def rows(path, read=read_pair):
    return ListRows([str(path)], None, read, "--train-data")


def content(picture):
    return picture() if callable(picture) else open(picture, "rb").read()


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("pairs", numbered),
        ("two", lambda: nlvr2.read_item),
        ("sentences", lambda: entailment.read_item),
        ("questions", lambda: partial(vqa.read_labels, numbers={"red": 3, "two": 0, "2": 1, "no": 2})),
    ],
)
def test_samples_are_those_of_a_json_list(name, read, folder):
    ours, theirs = (rows(folder / f"{name}.{ending}", read()) for ending in ("arrow", "json"))
    assert len(ours) == len(theirs)
    differ = {"answers", "people"} if name == "questions" else set()  # of which the file has scores
    for sample, other in ((ours[n], theirs[n]) for n in range(len(ours))):
        same = [{key: value for key, value in one.fields.items() if key not in differ} for one in (sample, other)]
        assert same[0] == same[1] and sample.index == other.index
        assert [content(one) for one in sample.images] == [content(one) for one in other.images]


def test_scores_stand_for_people_where_answers_are_judged_but_not_where_they_are_learnt(folder):
    fields = [rows(folder / "questions.arrow", vqa.read_item)[n].fields for n in range(3)]
    assert [one["people"] for one in fields] == [{"red": 1.0}, {"2": 0.6, "two": 0.3}, {"no": 0.9}]
    ranking = vqa.Ranking(["red", "two", "no"], None, [one["people"] for one in fields], 1)
    found = ranking.metrics(torch.tensor([[0], [1], [0]]), torch.arange(3))
    assert found == {"accuracy": pytest.approx((1 + 0.3 + 0) / 3), "answerable": 1}
    with pytest.raises(UserError, match="Item 0 of .* has scores and not what people answered to learn from"):
        rows(folder / "questions.arrow", partial(vqa.read_item, train=True))


def test_questions_of_a_test_have_no_answers(tmp_path):
    path = write_arrow(
        tmp_path / "test.arrow", image=PICTURES[:1], questions=[["a?", "b?"]], question_id=[[1, 2]], answers=[[]],
        answer_scores=[[]],
    )  # fmt: skip
    read = partial(vqa.read_labels, numbers={"red": 0})
    found = rows(path, read)
    assert [found[n].fields["labels"] for n in range(2)] == [{}, {}]
    with pytest.raises(UserError, match="0 samples \\(2 x question without an answer of the list left out\\)"):
        rows(path, partial(read, train=True))


def test_captions_that_cannot_be_used_are_left_out_and_counted(tmp_path, caplog):
    path = write_captions(tmp_path / "a.arrow", [["b", " ", "a", "b"], [], None, [None, "c"]])
    with caplog.at_level("INFO"):
        found = rows(path)
    assert [found[n].fields["caption"] for n in range(len(found))] == [["b"], ["a"], ["c"]]
    assert f"{path}: 3 samples (2 x caption without text left out)." in caplog.text


def test_pictures_stay_in_the_file(tmp_path):
    before = pyarrow.total_allocated_bytes()
    big = [bytes(1_000_000) for _ in range(4)]
    path = write_arrow(tmp_path / "big.arrow", image=big, caption=[["a"]] * 4, rows_a_batch=1)
    found = rows(path)
    assert pyarrow.total_allocated_bytes() - before < 100_000
    copied = pickle.dumps(found)
    assert len(copied) < 10_000 and pickle.loads(copied)[3].images[0]() == big[3]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_gives_exactly_the_remaining_batches(workers, folder):
    def data():
        return train_data(str(folder / "pairs.arrow"), batch_size=2, workers=workers, image_root=None)

    whole = list(data().epoch(1))
    begun, resumed = data(), data()
    batches = begun.epoch(1)
    first = [next(batches), next(batches)]
    resumed.load_state_dict(begun.state_dict())
    assert_same_batches(first + list(resumed.epoch(1)), whole)


def test_several_files_of_both_kinds_are_one_set(folder):
    paths = f"{folder}/pairs.arrow::{folder}/pairs.json"
    found = [batch for workers in (0, 2) for batch in val_data(paths, workers=workers, image_root=None)]
    places = [place for batch in found for place in batch["index"].tolist()]
    assert sorted(places) == sorted([*range(18)] * 2) and f"{folder}/pairs.arrow, row 5" in keys(found)


def test_captions_to_evaluate_on(folder, tmp_path):
    ours, theirs = (load_captions(str(folder / f"pairs.{ending}")) for ending in ("arrow", "json"))
    assert ours.captions == theirs.captions and ours.image_of.tolist() == theirs.image_of.tolist()
    assert [ours.images.content(n) for n in range(6)] == PICTURES and ours.images.name(1).endswith("pairs.arrow, row 1")
    assert len(ours.fingerprint()) == 16
    for split, captions in (("train", [["a", None], []]), ("restval", [["b", "c", "b"]]), ("test", [["d"]])):
        write_captions(tmp_path / f"coco_caption_karpathy_{split}.arrow", captions)
    found = load_captions(str(tmp_path), CaptionOptions(split="train+restval"))
    assert found.captions == ["a", "b", "c"] and found.image_of.tolist() == [0, 1, 1]
    assert (found.name, found.split, found.left_out["images_without_caption"]) == ("coco", "train+restval", 1)
    assert found.images.content(1) == PICTURES[0] and load_captions(str(tmp_path)).captions == ["d"]
    with pytest.raises(UserError, match="--data .*nowhere.arrow does not exist"):
        load_captions(f"{tmp_path}/nowhere.arrow")
    with pytest.raises(UserError, match="--images is for captions beside pictures; .* holds its pictures"):
        load_captions(str(folder / "pairs.arrow"), CaptionOptions(images=tmp_path))


def stream_format(path):
    table = pyarrow.table({"image": PICTURES})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def cut(path):
    write_captions(path, CAPTIONS)
    path.write_bytes(path.read_bytes()[:-100])


BROKEN = {
    "is empty; fetch it again.": lambda path: path.write_bytes(b""),
    "is in Arrow's stream format; write it with pyarrow.ipc.new_file.": stream_format,
    "is cut off or damaged (": cut,
    "cannot be read as an Arrow file (": lambda path: path.write_bytes(b"something else, and longer than a mark"),
    "does not exist; correct the path.": lambda path: None,
    "has no rows; fetch it again.": lambda path: write_captions(path, []),
    "holds the splits train, val; write a file for each.": lambda path: write_captions(
        path, [["a"], ["b"]], split=["train", "val"]
    ),
    "has no column 'caption', only image, width: see": lambda path: write_arrow(path, image=PICTURES, width=[1] * 6),
    "has no column 'image', only caption: see": lambda path: write_arrow(path, caption=[["a"]]),
    "has no column 'image_1', only image_0, questions": lambda path: write_arrow(
        path, image_0=PICTURES[:1], questions=[["a"]], answers=[["True"]]
    ),
    "has string in the column 'image', not encoded pictures": lambda path: write_arrow(
        path, image=["a.jpg"], caption=[["a"]]
    ),
    "has nothing to use: 0 samples (1 x caption without text left out).": lambda path: write_captions(path, [[" "]]),
    "has no column 'labels', only image, sentences: see": lambda path: write_arrow(
        path, image=PICTURES[:1], sentences=[[["a", "b"]]]
    ),
}  # fmt: skip


@pytest.mark.parametrize("problem", BROKEN)
def test_refused_before_any_work(problem, tmp_path):
    path = tmp_path / "a.arrow"
    BROKEN[problem](path)
    with pytest.raises(UserError) as error:
        rows(path)
    assert f"--train-data {path} {problem}" in str(error.value)


ROWS = {
    "caption is not a list": {"caption": ["a"]},
    "caption is not a list of texts": {"caption": [[1]]},
    "it has 1 sentences, 2 labels": {"sentences": [[["a", "b"]]], "labels": [[0, 1]]},
    'its "label" is None, not one of contradiction': {"sentences": [[["a", "b"]]], "labels": [[3]]},
    'it has no "sentence"': {"sentences": [["ab"]], "labels": [[0]]},
    "it does not have a score from 0 to 1 for each answer": {
        "questions": [["a?"]], "question_id": [[1]], "answers": [[["a", "b"]]], "answer_scores": [[[0.3]]],
    },
    "have a score from 0 to 1": {
        "questions": [["a?"]], "question_id": [[1]], "answers": [["a"]], "answer_scores": [[0.3]],
    },
    "a score from 0 to 1 for each": {
        "questions": [["a?"]], "question_id": [[1]], "answers": [[["a"]]], "answer_scores": [[[3.0]]],
    },
}  # fmt: skip


@pytest.mark.parametrize("problem", ROWS)
def test_rows_of_another_form(problem, tmp_path):
    path, columns = tmp_path / "a.arrow", ROWS[problem]
    write_arrow(path, image=PICTURES[:1], **columns)
    read = entailment.read_item if "labels" in columns else vqa.read_item if "questions" in columns else read_pair
    with pytest.raises(UserError, match="(Row|Item) 0 of .*a.arrow cannot be used") as error:
        rows(path, read)
    assert problem in str(error.value)


def test_without_pyarrow(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow; pip install 'open_clip_elip\[arrow\]' brings it."):
        rows(folder / "pairs.arrow")
