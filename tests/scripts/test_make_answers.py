"""The list of answers, out of VQA's annotations."""
import json

import make_answers
import pytest


def write(path, *questions):
    annotations = [
        {"question_id": n, "multiple_choice_answer": most, "answers": [{"answer": one} for one in people]}
        for n, (most, people) in enumerate(questions)
    ]
    path.write_text(json.dumps({"annotations": annotations}))
    return str(path)


def test_the_answers_of_all_files(tmp_path, capsys):
    train = write(tmp_path / "train.json", *[("A dog", ["a dog", "dog"])] * 5, ("rare", ["rare"] * 10))
    val = write(tmp_path / "val.json", *[("yes", ["yes"])] * 9, *[("dog", ["Dog"])] * 4)
    make_answers.main(["--out", f"{tmp_path}/new/answers.json", train, val])
    assert json.loads((tmp_path / "new" / "answers.json").read_text()) == ["dog", "yes"]
    assert capsys.readouterr().out.splitlines() == [
        f"2 answers in {tmp_path}/new/answers.json",
        f"{train}: 6 questions, 1 of them without any of these answers",
        f"{val}: 13 questions, 4 of them without any of these answers",
    ]


def test_what_is_no_annotations_is_told(tmp_path, capsys):
    (tmp_path / "list.json").write_text("[]")
    few = write(tmp_path / "few.json", ("yes", ["yes"]))
    for file, sentence in (
        (f"{tmp_path}/none.json", "none.json cannot be read (No such file or directory)"),
        (f"{tmp_path}/list.json", "list.json is not a file of VQA's annotations (TypeError: "),
        (few, "not one answer is frequent enough: give the annotations of train and val"),
    ):
        with pytest.raises(SystemExit):
            make_answers.main(["--out", f"{tmp_path}/answers.json", file])
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "answers.json").exists()
