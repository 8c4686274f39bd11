"""Tasks of BLIP after pre-training, and captions by command, on pictures of three colours."""
import csv
import json
import sys
import tarfile

import pytest
import torch

from open_clip_elip.fusion.released import BLIP as NAMES
from open_clip_elip.fusion.released import write_released
from training import caption
from training.control import EXIT_INTERRUPTED
from training.data.samples import Sample
from training.distributed import Ranks
from training.downstream import main
from training.evaluation import captioning
from training.options import parse
from training.options.downstream import DownstreamOptions
from training.tasks.blip import BlipPretraining
from training.tasks.fused import FusedEncoding
from training.tasks.nlvr2 import Swapping
from training.work.downstream import downstream

from .downstream_runs import VAL, downstream_command, figures, settings, write_data, write_list, write_pretrained
from .fusion_runs import BLIP
from .runs import assert_equal_weights, evaluations, interrupted, losses

TASKS = ("retrieval", "captioning", "vqa", "nlvr2")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_pretrained(tmp_path_factory.mktemp("blip"), config=BLIP, pretraining=BlipPretraining)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = write_data(tmp_path_factory.mktemp("data") / "lists")
    for kind in ("", "_val"):
        (data / f"captioning{kind}.json").write_text((data / f"retrieval{kind}.json").read_text())
    return data


@pytest.fixture(autouse=True)
def scores(monkeypatch):
    """As COCO's programs need seconds to start: how many captions a model has written."""
    monkeypatch.setattr(captioning, "score_captions", lambda written, people, *spice: {
        "CIDEr": float(len(written)), "BLEU-4": 0.5})  # fmt: skip


@pytest.fixture(scope="module")
def captioner(start, data, tmp_path_factory):
    logs = tmp_path_factory.mktemp("captioner")
    argv = downstream_command("captioning", data, logs, *start, "--val-frequency", "0", "--epochs", "1")
    assert main(argv) == 0
    return str(logs / "run" / "checkpoints" / "epoch_1.pt")


@pytest.mark.parametrize("task", TASKS)
def test_a_run_and_its_evaluation_by_its_file_alone(task, start, data, tmp_path):
    assert main(downstream_command(task, data, tmp_path, *start)) == 0
    folder = tmp_path / "run"
    state = torch.load(folder / "checkpoints" / "epoch_2.pt", weights_only=True)
    assert len(losses(folder)) == 6
    assert ("twin" in state["task"]) == ("queues" in state["task"]) == (task == "retrieval")
    last = evaluations(folder)[-1]
    best = {"retrieval": "val-reranked_r_mean", "captioning": "val-chosen_by"}.get(task, "val-accuracy")
    assert best in last
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.run.describe", lambda metrics: seen.append(metrics) or "")
        flags = ["--val-data", str(data / f"{task}_val.json"), "--image-root", str(data / "images")]
        flags += {"vqa": ["--answers", str(data / "answers.json")], "retrieval": ["--shortlist", "10"]}.get(task, [])
        model = ["--task", task, "--model", start[0], "--pretrained", str(folder / "checkpoints" / "epoch_2.pt")]
        assert main(["--evaluate", *flags, *model, *settings(tmp_path, "again"), "--batch-size", "3"]) == 0
    assert all(figures(one) == pytest.approx(figures(last), rel=1e-4) for one in seen) and seen


@pytest.mark.parametrize("task", TASKS)
def test_a_released_file_starts_as_ours_does(task, start, data, tmp_path):
    state = torch.load(start[1], weights_only=True)
    twin, queues = state["task"]["twin"], state["task"]["queues"]
    file = write_released(state["state_dict"], twin, NAMES)
    file |= {f"{name}_queue": queues[f"{name}.columns"] for name in ("image", "text")}
    torch.save({"model": file | {"queue_ptr": queues["text.pointer"]}}, tmp_path / "model_base.pth")
    files = start[1], tmp_path / "model_base.pth"
    words = [downstream_command(task, data, tmp_path, start[0], file) for file in files]
    parsed = (parse(DownstreamOptions, one) for one in words)
    ours, theirs = (downstream(options, Ranks(torch.device("cpu")), None) for options in parsed)
    fresh = ("head.",) if task == "nlvr2" else ()
    for name, value in theirs.model.state_dict().items():
        assert name.startswith(fresh) or torch.equal(value, ours.model.state_dict()[name]), name
    if task == "retrieval":
        assert_equal_weights(*(one.task.queues.state_dict() for one in (ours, theirs)))


def test_answers_are_written_and_negatives_come_from_all_ranks(start, data, tmp_path):
    out = tmp_path / "answers.json"
    argv = downstream_command("vqa", data, tmp_path, *start, "--generate", "--submission", str(out), "--epochs", "1")
    assert main(argv) == 0
    written = json.loads(out.read_text())
    assert [one["question_id"] for one in written] == [100 + i for i in range(VAL)]
    assert all(isinstance(one["answer"], str) and "[" not in one["answer"] for one in written)
    argv = downstream_command("retrieval", data, tmp_path, *start, "--all-rank-negatives", "--epochs", "1", name="all")
    assert main(argv) == 0 and len(losses(tmp_path / "all")) == 3


REFUSED = {
    ("captioning", "--vision-guided-reduction"): "Nothing guides captioning: leave out --vision-guided-reduction.",
    ("entailment",): "does not learn --task entailment: its tasks are retrieval, captioning, vqa, nlvr2",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_work_is_told(words, start, data, tmp_path, capsys):
    assert main(downstream_command(words[0], data, tmp_path, *start, *words[1:])) == 2
    assert REFUSED[words] in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_without_java_or_the_library_one_sentence(start, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(captioning.shutil, "which", lambda name: None)
    for sentence in ("there is no java here", "scored by pycocoevalcap: pip install 'open_clip_elip[captioning]'."):
        assert main(downstream_command("captioning", data, tmp_path, *start)) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and sentence in error[0]
        monkeypatch.setitem(sys.modules, "pycocoevalcap", None)


def test_captions_are_submitted_as_cocos_server_takes_them(captioner, start, data, tmp_path):
    items = json.loads((data / "captioning_val.json").read_text())
    (tmp_path / "images").mkdir()
    for i, item in enumerate(items):
        picture = f"COCO_val2014_{10 + i:012d}.jpg"
        (tmp_path / "images" / picture).write_bytes((data / "images" / item["image"]).read_bytes())
        item["image"], item["caption"] = picture, ["a red thing"] * (1 if i == 0 else 6)
    out = tmp_path / "captions.json"
    lists = ["--val-data", write_list(tmp_path / "val.json", items), "--image-root", str(tmp_path / "images")]
    flags = ["--evaluate", "--resume", captioner, *lists, *settings(tmp_path), "--submission", str(out)]
    assert main(flags) == 0
    written = json.loads(out.read_text())
    assert [one["image_id"] for one in written] == list(range(10, 10 + VAL))
    assert all(one.keys() == {"image_id", "caption"} and isinstance(one["caption"], str) for one in written)


def test_interrupted_with_drop_path_equals_uninterrupted(start, data, tmp_path):
    flags = ["--drop-path", "0.5", "--vision-guided-reduction", "--grad-checkpointing", "--epochs", "1"]
    straight, stopped = (
        downstream_command("nlvr2", data, tmp_path, *start, *flags, "--val-frequency", "0", name=name)
        for name in ("straight", "stopped")
    )
    assert main(straight) == 0
    with interrupted(2):
        assert main([*stopped, "--resume", "latest"]) == EXIT_INTERRUPTED
    assert main([*stopped, "--resume", "latest"]) == 0
    files = (tmp_path / name / "checkpoints" / "epoch_1.pt" for name in ("straight", "stopped"))
    assert_equal_weights(*(torch.load(file, weights_only=True)["state_dict"] for file in files))
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")


def captions(captioner, capsys, *words, code=0):
    flags = ["--pretrained", captioner, "--device", "cpu", "--workers", "0", "--no-progress"]
    assert caption.main([*flags, *map(str, words)]) == code
    return capsys.readouterr()


def test_captions_of_files_folders_and_shards(captioner, data, tmp_path, capsys):
    folder, one = data / "images", data / "images" / "003.jpg"
    out = tmp_path / "captions.json"
    captions(captioner, capsys, "--image", folder, "--out", out)
    all_of = {item["image_id"]: item["caption"] for item in json.loads(out.read_text())}
    assert list(all_of) == list(range(12)) and all("[" not in text for text in all_of.values())
    alone = captions(captioner, capsys, "--image", one, "--batch-size", "1").out
    assert alone.strip("\n").split("\t")[1:] == [all_of[3]]  # whatever else was in the batch
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for path in sorted(folder.iterdir())[:4]:
            shard.add(path, path.name)
    table = tmp_path / "captions.csv"
    captions(captioner, capsys, "--image", tmp_path / "shard.tar", one, "--out", table, "--beams", "1")
    rows = list(csv.reader(table.open()))
    assert rows[0] == ["image", "caption"] and len(rows) == 6
    captions(captioner, capsys, "--image", one, "--nucleus", "0.9", "--longest", "12", "--seed", "1")
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "1.jpg").write_bytes(one.read_bytes())
    (tmp_path / "some" / "2.jpg").write_bytes(b"no picture")
    told = captions(captioner, capsys, "--image", tmp_path / "some")
    assert len(told.out.splitlines()) == 1 and "1 of 2 images cannot be read" in told.err


def test_captions_are_scored_by_image(captioner, data, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("training.work.caption.score_captions", lambda *given: seen.append(given) or {"CIDEr": 1.0})
    items = [{"image": "000.jpg", "caption": ["a red thing"]}, {"image": "001.jpg", "caption": ["a", "b ", "c"] * 2}]
    listed = write_list(tmp_path / "some.json", items)
    words = ["--image", listed, "--images", data / "images", "--score", "--out", tmp_path / "out.json"]
    assert "CIDEr 1.0000" in captions(captioner, capsys, *words).out
    ((written, people, _),) = seen
    assert list(written) == [0, 1] and people == {0: ["a red thing"], 1: ["a", "b", "c"] * 2}


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--image", "no.jpg"], "There is no picture no.jpg; correct --image."),
        (["--image", "IMAGE", "--score"], "some of --image has none: leave it out."),
        (["--image", "IMAGE", "--longest", "3"], "--longest 3 leaves no room behind a prompt of"),
        (["--image", "IMAGE", "--out", "nowhere/x.json"], "There is no folder nowhere; correct --out."),
        (["--image", "IMAGE", "--out", "."], ". is a folder; name a file in --out."),
        (["--image", "IMAGE", "--beams", "5000"], "--beams 5000 is more than half of the vocabulary's"),
        (["--image", "EMPTY"], "There is no picture in "),
    ],
)
def test_captions_that_cannot_be_written(words, sentence, captioner, data, tmp_path, capsys):
    places = {"IMAGE": data / "images" / "000.jpg", "EMPTY": tmp_path}
    words = [places.get(word, word) for word in words]
    error = captions(captioner, capsys, *words, code=2).err.strip().splitlines()
    assert len(error) == 1 and sentence in error[0]


def test_a_model_of_another_task_writes_no_captions(start, data, tmp_path, capsys):
    assert main(downstream_command("retrieval", data, tmp_path, *start, "--epochs", "1", "--val-frequency", "0")) == 0
    file = tmp_path / "run" / "checkpoints" / "epoch_1.pt"
    error = captions(str(file), capsys, "--image", data / "images", code=2).err
    assert "it has no decoder." in error


def test_pictures_change_places_with_left_and_right(monkeypatch):
    encoding = Swapping(FusedEncoding(lambda picture: torch.zeros(3, 2, 2), None, "text"))
    sample = Sample("key", (1, 2), {"text": "The LEFT dog, not the right one"}, "x", 0)
    seen, draws = [], iter((0.2, 0.8))
    monkeypatch.setattr(FusedEncoding, "encode", lambda self, one: seen.append((one.images, one.fields["text"])))
    monkeypatch.setattr("training.tasks.nlvr2.random.random", lambda: next(draws))
    encoding.encode(sample)
    encoding.encode(sample)
    assert seen == [((2, 1), "the right dog, not the left one"), ((1, 2), "The LEFT dog, not the right one")]
