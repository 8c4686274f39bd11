"""Pre-training of fusion models by the command: exact resume, twin and queues, processes, what is refused."""
import json

import pytest
import torch

from open_clip_elip.export.command import main as export
from open_clip_elip.identity import Identity, create
from training import checkpoint, retrieval
from training.control import EXIT_INTERRUPTED
from training.main import main

from .. import processes
from .fusion_runs import ALBEF, BLIP, SPECIAL, write_albef, write_fusion, write_vocabulary
from .runs import assert_equal_weights, command, evaluations, interrupted, losses, picture, rows, weights, write_shards

pytestmark = pytest.mark.usefixtures("uncounted")


@pytest.fixture(scope="module", params=[ALBEF, BLIP], ids=lambda config: config["family"])
def model(request, tmp_path_factory):
    return write_fusion(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), shards=2, samples=20, broken={7})


def albef(shards, logs, model, *more, name="run"):
    return command(shards, logs, "--queue-size", "24", "--lr", "1e-3", *more, name=name, model=model)


SETTINGS = {
    "plain": ([], [3, 7]),
    "accumulation, last step of an epoch, fewer text tokens": (
        ["--batch-size", "4", "--accum-freq", "2", "--workers", "2", "--text-reduction", "random"], [5],
    ),
    "amp_bf16, checkpointing, averages": (
        ["--precision", "amp_bf16", "--grad-checkpointing", "--ema-decay", "0.9", "--grad-clip-norm", "1"], [6],
    ),
    "evit, no answers of the twin, no dropout of it, the image chooses among text tokens": (
        ["--token-reduction", "evit", "--twin-weight", "0", "--no-twin-dropout", "--text-reduction", "learned"], [4],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_interrupted_equals_uninterrupted(name, shards, model, tmp_path):
    flags, stops = SETTINGS[name]
    flags = [*flags, "--val-data", shards, "--lr-scheduler", "epoch-cosine", "--lr-start", "1e-4", "--lr-end", "1e-5"]
    assert main(albef(shards, tmp_path, model, *flags, name="straight")) == 0
    for stop in stops:
        with interrupted(stop):
            resumed = albef(shards, tmp_path, model, *flags, "--resume", "latest", name="stopped")
            assert main(resumed) == EXIT_INTERRUPTED
    assert main(albef(shards, tmp_path, model, *flags, "--resume", "latest", name="stopped")) == 0
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    a, b = (torch.load(run / "checkpoints" / "epoch_2.pt", weights_only=True) for run in (straight, stopped))
    for part in ("state_dict", "ema"):
        assert_equal_weights(a[part], b[part])
    for part in ("twin", "queues"):
        assert_equal_weights(a["task"][part], b["task"][part])
    assert losses(straight) == losses(stopped)
    assert evaluations(straight) == evaluations(stopped) and len(evaluations(straight)) == 2
    assert int(a["task"]["queues"]["text.pointer"]) == a["samples"] % 24


def test_two_processes_share_their_queues_in_the_order_of_ranks(shards, model, tmp_path):
    flags = ["--device", "cpu", "--workers", "1", "--batch-size", "4", "--save-every-n-steps", "1", "--epochs", "1"]
    processes.run(main, albef(shards, tmp_path, model, *flags))
    first = torch.load(tmp_path / "run" / "checkpoints" / "step_5.pt", weights_only=True)
    assert int(first["task"]["queues"]["image.pointer"]) == 5 * 8 % 24
    straight = losses(tmp_path / "run")
    more = [*albef(shards, tmp_path, model, *flags, name="resumed"), "--resume"]
    processes.run(main, [*more, str(tmp_path / "run" / "checkpoints" / "step_4.pt")])
    ends = [checkpoint.newest(tmp_path / name / "checkpoints") for name in ("run", "resumed")]
    assert_equal_weights(*map(weights, ends))
    assert losses(tmp_path / "resumed") == straight[4:]


def test_a_step_that_is_not_finite_leaves_the_queues_alone(shards, model, tmp_path):
    flags = ["--lr", "1e30", "--nonfinite", "skip", "--epochs", "1", "--save-every-n-steps", "1"]
    assert main(albef(shards, tmp_path, model, *flags)) == 0
    found = [float(row["loss"]) for row in rows(tmp_path / "run")]
    applied = sum(value == value and abs(value) < float("inf") for value in found)
    state = torch.load(checkpoint.newest(tmp_path / "run" / "checkpoints"), weights_only=True)
    assert applied < len(found) and int(state["task"]["queues"]["image.pointer"]) == applied * 8 % 24
    assert torch.isfinite(state["task"]["queues"]["image.columns"]).all()


def test_json_lists_are_read_and_a_caption_is_drawn(model, tmp_path):
    items = []
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
        items.append({"image": f"{number}.png", "caption": ["a red thing", "a blue square thing"]})
    for part, name in ((items[:12], "a.json"), (items[12:], "b.json")):
        (tmp_path / name).write_text(json.dumps(part))
    evaluated = ["--val-data", str(tmp_path / "b.json"), "--val-rerank", "5"]
    argv = albef(f"{tmp_path}/a.json::{tmp_path}/b.json", tmp_path, model, *evaluated)
    argv[argv.index("webdataset")] = "auto"
    assert main(argv) == 0
    log = (tmp_path / "run" / "out.log").read_text()
    assert "20 samples" in log and evaluations(tmp_path / "run")[-1]["num_samples"] == 8
    assert 0 <= evaluations(tmp_path / "run")[-1]["reranked_text_to_image_R@5"] <= 1


REFUSED = {
    "--batch-size 1": "A batch of one pair has no negatives to match with: raise --batch-size.",
    "--queue-size 4": "--queue-size 4 does not hold the 8 pairs of a step; raise it.",
    "--fsdp": "--fsdp is for CLIP models",
    "--layer-decay 0.5": "--layer-decay is for image towers alone and CLIP models; leave it out.",
    "--start-image nothing.pth": "The weights nothing.pth to start from cannot be had",
    "--text-tokenizer nowhere": "There is no vocabulary nowhere: give --text-tokenizer a folder with a vocab.txt, or",
    "--force-image-size 4": "smaller than one patch",
    "--force-context-length 41": "Texts of 41 tokens are longer than the model's 40 positions.",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_work_is_told_before_the_run(flags, shards, model, tmp_path, capsys):
    assert main(albef(shards, tmp_path, model, *flags.split())) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and REFUSED[flags] in error[0]
    assert not (tmp_path / "run").exists()


def test_flags_of_another_kind_of_model_are_told(shards, model, tmp_path, capsys):
    assert main(albef(shards, tmp_path, model, "--siglip", "--epochs", "0")) == 0
    assert "--siglip: no effect with fusion models." in capsys.readouterr().err


def test_a_vocabulary_larger_than_the_model_is_refused(shards, tmp_path, capsys):
    folder = tmp_path / "model"
    model = write_albef(folder)
    write_vocabulary(folder, [f"word{n}" for n in range(100)])
    assert main(albef(shards, tmp_path, model)) == 2
    assert "has 105 tokens, more than the 64 of the model" in capsys.readouterr().err


def test_a_model_takes_no_vocabulary_but_its_own(shards, tmp_path, capsys):
    """Or its numbers would be wrong, and nobody would know; wherever its own lies."""
    model = write_albef(tmp_path / "model")
    assert main(albef(shards, tmp_path, model, "--epochs", "1")) == 0
    file = checkpoint.newest(tmp_path / "run" / "checkpoints")
    first, *words = (tmp_path / "model" / "vocab.txt").read_text().split()[len(SPECIAL):]
    other, same = (write_vocabulary(tmp_path / name, words) for name, words in (
        ("other", [*words, first]), ("same", [first, *words])))  # fmt: skip
    evaluates = ["--pretrained", str(file), "--data", shards, "--device", "cpu", "--workers", "0", "--results", "none"]
    assert retrieval.main([*evaluates, "--text-tokenizer", str(same)]) == 0
    assert retrieval.main([*evaluates, "--text-tokenizer", str(other)]) == 2
    assert "has other words than the vocabulary that the model was trained on" in capsys.readouterr().err
    goes_on = ["--epochs", "2", "--resume", "latest", "--text-tokenizer"]
    assert main(albef(shards, tmp_path, model, *goes_on, str(other))) == 2
    assert "was trained on another vocabulary: give that in --text-tokenizer" in capsys.readouterr().err
    assert main(albef(shards, tmp_path, model, *goes_on, str(same))) == 0


def test_widths_that_differ_are_told_in_one_sentence(shards, tmp_path, capsys):
    model = write_albef(tmp_path / "model", vision_cfg=ALBEF["vision_cfg"] | {"width": 48})
    assert main(albef(shards, tmp_path, model)) == 2
    assert "the width of vision_cfg (48) and BERT's hidden_size (32) must be equal" in capsys.readouterr().err


def test_only_what_is_two_dimensional_is_decayed_but_never_the_temperature():
    from training.tasks.momentum import DistilledTask

    from .tiny import run_options

    model = create(Identity("albef", "x", ALBEF, {"size": (32, 32)}))
    free, decayed = DistilledTask(model).parameters(model, run_options(wd=0.02))
    names = {id(p): name for name, p in model.named_parameters()}
    free, decayed = ([names[id(p)] for p in group["params"]] for group in (free, decayed))
    assert len(free) + len(decayed) == len(names) and "temp" in free
    assert {"visual.class_embedding", "visual.positional_embedding", "text.embeddings.word_embeddings.weight"} <= {
        *decayed
    }
    assert all(name.endswith(("bias", "LayerNorm.weight")) or ".ln_" in name or name == "temp" for name in free)


def test_a_checkpoint_in_the_released_form_is_the_same_model(shards, model, tmp_path, capsys):
    assert main(albef(shards, tmp_path, model, "--epochs", "1")) == 0
    own, released = tmp_path / "run" / "checkpoints" / "epoch_1.pt", tmp_path / "albef.pth"
    assert export(["released", str(released), "--pretrained", str(own)]) == 0
    assert export(["released", str(released), "--pretrained", str(own)]) == 2  # nothing is overwritten
    assert export(["open_clip", str(tmp_path / "folder"), "--pretrained", str(own)]) == 2
    names = torch.load(released, weights_only=True)["model"]
    layers = "encoder.layer" if "text_decoder.cls.predictions.bias" in names else "bert.encoder.layer"
    assert {"temp", "image_queue", "queue_ptr", f"text_encoder_m.{layers}.3.crossattention.self.key.bias"} <= {*names}
    evaluate = ["--val-data", shards, "--precision", "fp32", "--device", "cpu", "--model", model, "--logs"]
    for name, file in (("a", own), ("b", released)):
        assert main([*evaluate, str(tmp_path), "--name", name, "--pretrained", str(file), "--workers", "1"]) == 0
    a, b = (evaluations(tmp_path / name) for name in "ab")
    assert a == b and "also holds a momentum twin and queues" in capsys.readouterr().err
