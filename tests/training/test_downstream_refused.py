"""What cannot work in a task after pre-training is told in one sentence, before anything is written."""
import json

import open_clip
import pytest
import torch

from training.downstream import main

from .downstream_runs import downstream_command, settings, write_data, write_list, write_pretrained
from .runs import MODEL


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_pretrained(tmp_path_factory.mktemp("albef"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "lists")


@pytest.fixture
def refused(start, data, tmp_path, capsys, local_model):
    def refused(sentence, task, *flags, argv=None):
        argv = argv or downstream_command(task, data, tmp_path / "logs", *start, *flags)
        assert main([str(word) for word in argv]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ") and sentence in last, last
        assert not (tmp_path / "logs").exists()

    return refused


FLAGS = {
    "entailment": [
        (["--image-root", "nowhere"], "None of the pictures that --val-data names is there, nowhere/000.jpg for one"),
        (["--train-data", "nowhere.json"], "--train-data nowhere.json does not exist; correct the path."),
        (["--val-data", "nowhere.json"], "--val-data nowhere.json does not exist; correct the path."),
        (["--model", "Tiny-ELIP"], "Tiny-ELIP (clip) does not learn --task entailment: only fusion models have tasks"),
        (["--model", "ALBEF-B-61"], "There is no model named 'ALBEF-B-61'; did you mean ALBEF-B-16?"),
        (["--pretrained", ""], "--pretrained is missing: give the checkpoint of pre-training"),
        (["--pretrained", "nowhere.pt"], "There is no checkpoint at nowhere.pt; correct --pretrained."),
        (["--evaluate"], "has no head.0.weight, so it was never trained for entailment; leave out --evaluate."),
        (["--batch-size", "13"], "has only 12 usable samples, fewer than one batch of 13"),
        (["--token-reduction", "evit"], "--token-reduction needs --vision-guided-reduction here."),
        (["--layer-decay", "0.9"], "--layer-decay is for image towers alone and CLIP models; leave it out."),
        (["--fsdp"], "--fsdp is for CLIP models; a fusion model is small enough for one GPU: leave it out."),
        (["--siglip"], "--siglip is an option of training.main"),
        (["--task", "captioning"], "(albef) does not learn --task captioning: its tasks are retrieval, entailment"),
        (["--vision-guided-reduction", "--token-reduction", "none"], "--vision-guided-reduction needs a model with"),
    ],
    "retrieval": [
        (["--image-root", "nowhere"], "--val-data: There is no folder nowhere; correct --image-root."),
        (["--batch-size", "1"], "A batch of one pair has no negatives to match with: raise --batch-size."),
        (["--queue-size", "3"], "--queue-size 3 does not hold the 4 pairs of a step; raise it."),
        (["--vision-guided-reduction", "--token-reduction", "random"], "is for elip, evit and tome, not for this"),
    ],
    "vqa": [
        (["--answers", ""], "--answers is missing: give the list to choose from."),
        (["--answers", "nowhere.json"], "--answers nowhere.json does not exist; correct the path."),
        (["--submission", "said.json", "--val-data", ""], "There is nothing to evaluate on: give --val-data."),
        (["--submission", f"{__file__}/said.json"], "is a file; name a folder."),
        (["--submission", "."], "--submission . is a folder; name a file."),
    ],
    "assignment": [
        (["--val-data", "some.json"], "--task assignment is not evaluated: leave out --evaluate and lists."),
        (["--vision-guided-reduction"], "--task assignment compares whole images: leave out --vision-guided-reduction"),
        (["--batch-size", "1"], "A batch of one picture has no similar one: raise --batch-size."),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "flags", "sentence"),
    [(task, flags, sentence) for task, cases in FLAGS.items() for flags, sentence in cases],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_flags(task, flags, sentence, refused):
    refused(sentence, task, *flags)


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("--task", "--task is missing: say which task the model is to learn."),
        ("--model", "--model is missing: give its name, as in --model ALBEF-B-16."),
        ("--train-data", "--train-data is missing: give lists to train on, or --evaluate."),
    ],
)
def test_missing_flags(missing, sentence, refused, start, data, tmp_path):
    argv = downstream_command("nlvr2", data, tmp_path / "logs", *start)
    at = argv.index(missing)
    refused(sentence, "", argv=argv[:at] + argv[at + 2 :])


ITEMS = {
    "entailment": [
        ({"label": "maybe"}, "its \"label\" is 'maybe', not one of contradiction, neutral, entailment"),
        ({"sentence": " "}, 'it has no "sentence"'),
        ({"image": None}, 'it has no "image"'),
    ],
    "nlvr2": [
        ({"images": ["000.jpg"]}, 'its "images" are not a list of two paths'),
        ({"label": "Maybe"}, 'its "label" is Maybe, not True or False'),
    ],
    "retrieval": [({"caption": ""}, 'its "caption" is empty'), ({"caption": 3}, 'its "caption" is neither a text nor')],
    "assignment": [({"caption": ["a thing", " "]}, 'its "caption" is empty')],
    "vqa": [
        ({"question": ""}, 'it has no "question"'),
        ({"answer": []}, 'it has no "answer" to learn from'),
        ({"answer": [" ", ""]}, 'it has no "answer" to learn from'),
        ({"answer": 3}, 'its "answer" is neither a text nor a list of texts'),
    ],
}


@pytest.mark.parametrize(("task", "change", "sentence"), [(task, *case) for task, of in ITEMS.items() for case in of])
def test_bad_items(task, change, sentence, refused, data, tmp_path):
    items = json.loads((data / f"{task}.json").read_text())
    path = write_list(tmp_path / "bad.json", [*items[:3], items[3] | change])
    refused(f"Item 3 of {path} cannot be used: {sentence}", task, "--train-data", path)


def test_bad_lists(refused, data, tmp_path):
    for content, sentence in (("[", "cannot be read as JSON ("), ("[]", "must hold a JSON list"), ("{}", "must hold")):
        path = tmp_path / "bad.json"
        path.write_text(content)
        refused(f"--train-data {path} {sentence}", "entailment", "--train-data", path)
        refused(f"--val-data {path} {sentence}", "nlvr2", "--val-data", path)
    for answer, shown in ((3, "3"), (" ", "' '")):
        path = write_list(tmp_path / "answers.json", ["yes", answer])
        refused(f"Answer 1 of {path} is {shown}, not a text: correct the list.", "vqa", "--answers", path)
    items = [{**one, "question_id": None} for one in json.loads((data / "vqa.json").read_text())]
    path = write_list(tmp_path / "val.json", items)
    sentence = f'Item 0 of {path} has no "question_id" for --submission to name.'
    refused(sentence, "vqa", "--val-data", path, "--submission", tmp_path / "said.json")
    path = write_list(tmp_path / "val.json", [{**one, "question_id": 7} for one in items])
    sentence = f"{path} has {len(items)} questions of question_id 7: --submission names each once."
    refused(sentence, "vqa", "--val-data", path, "--submission", tmp_path / "said.json")


def test_checkpoints_of_other_models(refused, start, data, tmp_path):
    state = torch.load(start[1], weights_only=True)

    def written(name, content):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    def of_task(task, **more):
        model = state["model"] | {"config": state["model"]["config"] | {"task": task}}
        return written(f"{task}.pt", state | {"model": model})

    other, lacking = of_task("vqa"), dict(state["state_dict"])
    refused(f"{other} is of --task vqa, which entailment cannot use; give one of pre-training.", "entailment",
            "--pretrained", other)  # fmt: skip
    refused("is of --task assignment, which vqa cannot use", "vqa", "--pretrained", of_task("assignment"))
    bare = written("answerer.pt", state["state_dict"] | {"decoder.0.weight": torch.zeros(1)})
    refused("does not fit this model: its decoder.0.weight has no place here", "nlvr2", "--pretrained", bare)
    lacking.pop("text.embeddings.LayerNorm.bias")
    refused("it has no text.embeddings.LayerNorm.bias; give a checkpoint of pre-training.", "nlvr2", "--pretrained",
            written("lacking.pt", lacking))  # fmt: skip
    plain = {name: value for name, value in MODEL.items() if name != "token_reduction"}
    clip = open_clip.CLIP(**plain).state_dict()
    refused("does not fit this model", "entailment", "--pretrained", written("clip.pt", clip))
    ours = {"state_dict": clip, "config": {"model": "Tiny"}}
    refused("is of a model of the family clip; give one of albef.", "vqa", "--pretrained", written("ours.pt", ours))
    text = state["model"]["config"]["text_cfg"] | {"hf_tokenizer_name": "words"}
    model = state["model"] | {"config": state["model"]["config"] | {"text_cfg": text}}
    words = written("words.pt", state | {"model": model})
    refused("was trained on the vocabulary words; give it in --text-tokenizer.", "vqa", "--pretrained", words)
    (tmp_path / "wide").mkdir()
    text = state["model"]["config"]["text_cfg"]
    vision = state["model"]["config"]["vision_cfg"] | {"width": 64, "head_width": 32}
    bert = text["bert"] | {"hidden_size": 64}
    _, wide = write_pretrained(tmp_path / "wide", vision_cfg=vision, text_cfg=text | {"bert": bert})
    refused("is (64,), here is (32,)", "retrieval", "--pretrained", wide, "--text-tokenizer", tmp_path / "wide")


def test_evaluation_of_what_is_no_checkpoint_of_a_task(refused, start, data, tmp_path):
    lists = ["--val-data", data / "nlvr2_val.json", *settings(tmp_path / "logs")]
    refused("is not a checkpoint of training.downstream; give it in --pretrained.", "",
            argv=["--evaluate", "--resume", start[1], *lists])  # fmt: skip
    refused("There is no checkpoint in", "", argv=["--evaluate", "--resume", "latest", *lists])
    config = {"task": "vqa", "model": start[0]}
    torch.save({"config": config, "state_dict": {}}, tmp_path / "vqa.pt")
    sentence = "is of --task vqa, not of nlvr2; leave out --task."
    refused(sentence, "", argv=["--evaluate", "--task", "nlvr2", "--resume", tmp_path / "vqa.pt", *lists])
