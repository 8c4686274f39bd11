"""Adapters as a person trains them: in pre-training, fine-tuning, tasks and probe; kept, resumed, evaluated, merged."""
import json
import re

import open_clip
import pytest
import torch

from open_clip_elip import weights as files
from open_clip_elip.adapters import is_adapter
from training import downstream, finetune, linear_probe, main, retrieval
from training.control import EXIT_INTERRUPTED
from training.work import downstream as work

from .. import processes
from .colours import finetune_command, write_colours
from .downstream_runs import downstream_command, figures, write_data, write_pretrained
from .fusion_runs import ALBEF, METER
from .runs import (
    assert_equal_weights,
    command,
    evaluations,
    interrupted,
    losses,
    picture,
    records,
    weights,
    write_shards,
)

pytestmark = pytest.mark.usefixtures("uncounted")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), shards=2, samples=16)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, local_model):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("pretrained") / "clip.pt"
    torch.save({"epoch": 1, "state_dict": open_clip.create_model("Tiny").state_dict()}, path)
    return str(path)


@pytest.fixture(scope="module")
def albef(tmp_path_factory):
    return write_pretrained(tmp_path_factory.mktemp("albef"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "lists")


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return write_colours(tmp_path_factory.mktemp("data") / "colours")


def epoch_2(run):
    return torch.load(run / "checkpoints" / "epoch_2.pt", weights_only=True)


def assert_trained(state, start):
    """Adapters of both towers have moved, and what they adapt is bit for bit as it was."""
    adapters = [name for name in state if is_adapter(name)]
    assert {name.startswith("visual.") for name in adapters} == {True, False} and all(state[n].any() for n in adapters)
    towers = [name for name in start if re.search(r"resblocks|\.layer\.|fusion|embeddings\.word|positional", name)]
    assert len(towers) > 20 and all(state[name].equal(start[name]) for name in towers)


def test_clip_learns_resumes_and_is_evaluated_as_it_was_trained(kind, shards, pretrained, tmp_path):
    flags = ["--adapter", kind, "--adapter-rank", "4", "--pretrained", pretrained, "--lr", "1e-2", "--val-data", shards]
    flags += ["--ema-decay", "0.5"]
    assert main.main(command(shards, tmp_path, *flags, name="straight")) == 0
    with interrupted(3):
        assert main.main(command(shards, tmp_path, *flags, name="stopped")) == EXIT_INTERRUPTED
    assert main.main(command(shards, tmp_path, *flags, "--resume", "latest", name="stopped")) == 0
    straight, stopped = (epoch_2(tmp_path / name) for name in ("straight", "stopped"))
    for part in ("state_dict", "ema"):
        assert_equal_weights(straight[part], stopped[part])
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")
    assert_trained(straight["state_dict"], weights(pretrained))

    trained = str(tmp_path / "straight" / "checkpoints" / "epoch_2.pt")
    more = ["--adapter", "bottleneck", "--adapter-rank", "4"] * (kind == "bottleneck")
    argv = command(shards, tmp_path, "--pretrained", trained, "--val-data", shards, *more, name="evaluated")
    assert main.main(argv[2:]) == 0  # without --train-data
    last, again = evaluations(tmp_path / "straight")[-1], evaluations(tmp_path / "evaluated")[-1]
    for name in ("clip_val_loss", "image_to_text_mean_rank"):
        assert again[name] == pytest.approx(last[name], rel=1e-4)


def test_two_processes(kind, shards, model, tmp_path):
    flags = ["--batch-size", "4", "--epochs", "1", "--adapter", kind, "--lr", "1e-2"]
    argv = command(shards, tmp_path, *flags, model=f"local-dir:{model}")
    processes.run(main.main, argv)
    assert len(losses(tmp_path / "run")) == 4
    end = weights(tmp_path / "run" / "checkpoints" / "epoch_1.pt")
    assert_trained(end, files.read(model / "open_clip_pytorch_model.bin"))


def test_fine_tuning_and_probe(kind, colours, pretrained, tmp_path, capsys):
    flags = ["--adapter", kind, "--adapter-rank", "4", "--vision-guided-reduction", "--drop-path", "0.1"]
    assert finetune.main(finetune_command(colours, tmp_path, pretrained, *flags)) == 0
    state = epoch_2(tmp_path / "run")
    assert state["model"]["config"]["adapter"] == {"kind": kind, "rank": 4}
    start = {name: value for name, value in weights(pretrained).items() if "visual.transformer" in name}
    assert all(state["state_dict"][name].equal(value) for name, value in start.items())
    assert all(value.any() for name, value in state["state_dict"].items() if is_adapter(name))
    (final,) = records(tmp_path / "results")
    argv = ["--evaluate", "--resume", str(tmp_path / "run" / "checkpoints" / "epoch_2.pt"), "--data", str(colours)]
    argv += ["--batch-size", "6", "--workers", "0", "--device", "cpu", "--precision", "fp32"]
    assert finetune.main([*argv, "--results", str(tmp_path / "again")]) == 0
    (again,) = records(tmp_path / "again")
    assert again["metrics"] == final["metrics"]
    # Features of the adapted tower: other ones than those that it started from.
    capsys.readouterr()
    tables = []
    for source in (str(tmp_path / "run" / "checkpoints" / "epoch_2.pt"), pretrained):
        argv = ["--model", "Tiny-ELIP", "--pretrained", source, "--data", str(colours), "--workers", "0"]
        argv += ["--device", "cpu", "--precision", "fp32", "--results", str(tmp_path / "probe"), "--no-progress"]
        assert linear_probe.main([*argv, "--regularisation", "1"]) == 0
        tables.append(capsys.readouterr().out)
    assert len(records(tmp_path / "probe")) == 2


@pytest.mark.parametrize("config", [ALBEF, METER], ids=["albef", "meter"])
def test_pretraining_of_a_fusion_model_and_a_task_after_it(kind, config, data, tmp_path):
    pretraining = {} if config is ALBEF else {"pretraining": None}
    model, start = write_pretrained(tmp_path / "model", config=config, **pretraining)
    shards = write_shards(tmp_path / "shards", samples=8)
    flags = ["--lr", "1e-2", "--adapter", kind, "--adapter-rank", "4", "--pretrained", str(start)]
    flags += ["--queue-size", "24"] * (config is ALBEF)
    assert main.main(command(shards, tmp_path, *flags, name="straight", model=model)) == 0
    with interrupted(3):
        assert main.main(command(shards, tmp_path, *flags, name="stopped", model=model)) == EXIT_INTERRUPTED
    assert main.main(command(shards, tmp_path, *flags, "--resume", "latest", name="stopped", model=model)) == 0
    straight, stopped = (epoch_2(tmp_path / name) for name in ("straight", "stopped"))
    assert_equal_weights(straight["state_dict"], stopped["state_dict"])
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")
    assert_trained(straight["state_dict"], weights(start))
    if config is ALBEF:
        assert_equal_weights(straight["task"]["twin"], stopped["task"]["twin"])
        assert any(value.any() for name, value in straight["task"]["twin"].items() if is_adapter(name))

    trained = tmp_path / "straight" / "checkpoints" / "epoch_2.pt"
    more = ["--adapter", "bottleneck", "--adapter-rank", "4"] * (kind == "bottleneck")
    argv = downstream_command("entailment", data, tmp_path, model, trained, *more, name="task")
    assert downstream.main(argv) == 0
    after = weights(tmp_path / "task" / "checkpoints" / "epoch_2.pt")
    assert any(is_adapter(name) for name in after) == (kind == "bottleneck")


def test_a_task_with_adapters_is_evaluated_by_its_file_alone(kind, albef, data, tmp_path):
    model, start = albef
    for task in ("retrieval", "nlvr2"):
        flags = ["--adapter", kind, "--adapter-rank", "4"]
        argv = downstream_command(task, data, tmp_path, model, start, *flags, name=task)
        assert downstream.main(argv) == 0
        assert_trained(epoch_2(tmp_path / task)["state_dict"], {
            name: value for name, value in weights(start).items() if name.startswith(("visual", "text"))})  # fmt: skip
        found = evaluations(tmp_path / task)[-1]
        resume = ["--evaluate", "--resume", str(tmp_path / task / "checkpoints" / "epoch_2.pt")]
        lists = ["--val-data", str(data / f"{task}_val.json"), "--image-root", str(data / "images")]
        common = ["--workers", "0", "--precision", "fp32", "--device", "cpu", "--batch-size", "4"]
        built = work.downstream
        seen = []

        def look(options, ranks, resume, built=built, seen=seen, task=task):
            parts = built(options, ranks, resume)
            original = parts.task.evaluate
            parts.task.evaluate = lambda *args: seen.append(original(*args)) or seen[-1]
            return parts

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(work, "downstream", look)
            shortlist = ["--shortlist", "10"] * (task == "retrieval")
            assert downstream.main([*resume, *lists, *common, *shortlist]) == 0
        assert figures(seen[0]) == figures(found)


def test_retrieval_of_a_model_that_was_trained_with_adapters(kind, shards, pretrained, tmp_path):
    flags = ["--adapter", kind, "--pretrained", pretrained, "--lr", "1e-2"]
    assert main.main(command(shards, tmp_path, *flags)) == 0
    trained = tmp_path / "run" / "checkpoints" / "epoch_2.pt"
    merged = tmp_path / "merged.pt"
    torch.save({"state_dict": files.tensors(files.read(trained), str(trained))}, merged)
    model = open_clip.create_model("Tiny")
    if kind == "lora":
        model.load_state_dict(weights(merged))  # a plain model's, for any program
    else:
        with pytest.raises(RuntimeError, match="Unexpected"):
            model.load_state_dict(weights(merged))
    captions = tmp_path / "captions.json"
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "1.png").write_bytes(picture(1))
    captions.write_text(json.dumps([{"image": f"{i}.png", "caption": ["a red thing", "a blue one"]} for i in (0, 1)]))
    argv = ["--data", str(captions), "--device", "cpu", "--precision", "fp32", "--workers", "0", "--no-progress"]
    sources = [trained, merged] if kind == "lora" else [trained]
    for number, source in enumerate(sources):
        more = ["--model", "Tiny-ELIP", "--pretrained", str(source), "--results", str(tmp_path / f"results{number}")]
        assert retrieval.main([*argv, *more]) == 0
    found = [records(tmp_path / f"results{number}")[0]["metrics"] for number in range(len(sources))]
    assert all(one == found[0] for one in found)


BAD = {
    "no weights": ("main", ["--adapter", "bottleneck"], "--pretrained, or --start-image"),
    "sharded": ("main", ["--adapter", "bottleneck", "--pretrained", "x.pt", "--fsdp"], "leave out --fsdp"),
    "no such kind": ("main", ["--adapter", "prefix", "--pretrained", "x.pt"], "--adapter"),
    "no rank": ("main", ["--adapter", "lora", "--pretrained", "x.pt", "--adapter-rank", "0"], "--adapter-rank"),
    "mixed": ("finetune", ["--adapter", "lora", "--head", "zero-shot", "--wise-ft"], "--wise-ft mixes"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name, shards, colours, pretrained, tmp_path, capsys):
    where, flags, sentence = BAD[name]
    argv = command(shards, tmp_path, *flags)
    if where == "finetune":
        argv = finetune_command(colours, tmp_path, pretrained, *flags)
    assert {"main": main, "finetune": finetune}[where].main(argv) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and sentence in last
    assert not (tmp_path / "run").exists()


def test_what_does_not_go_on_from_adapters(albef, data, shards, pretrained, tmp_path, capsys):
    flags = ["--adapter", "bottleneck", "--pretrained", pretrained]
    assert main.main(command(shards, tmp_path, *flags)) == 0
    trained = str(tmp_path / "run" / "checkpoints" / "epoch_2.pt")
    for more, sentence in (
        (["--pretrained", trained], "add --adapter bottleneck"),
        (["--pretrained", pretrained, "--resume", trained], "check --adapter and --adapter-rank"),
        (["--pretrained", trained, "--adapter", "bottleneck", "--adapter-rank", "3"], "adapter_down.weight is 64x32"),
    ):
        assert main.main(command(shards, tmp_path, *more, name="other")) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ") and sentence in last
