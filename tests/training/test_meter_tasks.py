"""METER's tasks after pre-training, on pictures of three colours; weights in the released form and to start from."""
import json
from types import ModuleType

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers

from open_clip_elip import weights
from open_clip_elip.fusion.released import METER as NAMES
from open_clip_elip.fusion.released import write_released
from open_clip_elip.fusion.start import start_image, start_task, start_text
from open_clip_elip.identity import ModelError
from training import retrieval
from training.distributed import Ranks
from training.downstream import main
from training.options import parse
from training.options.downstream import DownstreamOptions
from training.work.downstream import downstream

from .downstream_runs import VAL, downstream_command, figures, settings, write_data, write_pretrained
from .fusion_runs import METER
from .runs import evaluations, losses, records
from .tasks.test_meter import meter

BEST = {"retrieval": "val-r_mean"}
TASKS = ("retrieval", "entailment", "vqa", "nlvr2")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_pretrained(tmp_path_factory.mktemp("meter"), config=METER, pretraining=None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "lists")


def run(task, data, logs, start, *more, name="run"):
    argv = downstream_command(task, data, logs, *start, "--lr-scheduler", "linear", *more, name=name)
    if "--queue-size" in argv:
        cut = argv.index("--queue-size")
        argv = [*argv[:cut], *argv[cut + 4 :]]
    return main(argv)


@pytest.fixture(scope="module")
def answered(data):
    """With a question that nobody gave an answer of the list to."""
    items = json.loads((data / "vqa.json").read_text())
    (data / "vqa.json").write_text(json.dumps([items[0] | {"answer": ["unheard of"] * 10}, *items]))


@pytest.mark.parametrize("task", TASKS)
def test_a_run_and_its_evaluation_by_its_file_alone(task, start, data, answered, tmp_path, capsys):
    reduced = ["--vision-guided-reduction"] if task in ("retrieval", "nlvr2") else []
    submitted = ["--submission", str(tmp_path / "said.json")] if task == "vqa" else []
    assert run(task, data, tmp_path, start, *reduced, *submitted) == 0
    folder = tmp_path / "run"
    assert len(losses(folder)) == 6 and BEST.get(task, "val-accuracy") in (last := evaluations(folder)[-1])
    if task == "vqa":
        assert "(1 x question without an answer of the list left out)" in (folder / "out.log").read_text()
        said = json.loads((tmp_path / "said.json").read_text())
        assert [one["question_id"] for one in said] == [*range(100, 100 + VAL)]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.run.describe", lambda metrics: seen.append(metrics) or "")
        flags = ["--val-data", str(data / f"{task}_val.json"), "--image-root", str(data / "images")]
        flags += ["--answers", str(data / "answers.json")] if task == "vqa" else []
        file = folder / "checkpoints" / "epoch_2.pt"
        flags += ["--resume", str(file), *settings(tmp_path, "again"), "--batch-size", "3"]
        assert main(["--evaluate", *flags]) == 0
    assert all(figures(one) == pytest.approx(figures(last), rel=1e-4) for one in seen) and seen
    if task == "vqa":
        (tmp_path / "other.json").write_text(json.dumps(json.loads((data / "answers.json").read_text())[::-1]))
        other = [str(tmp_path / "other.json") if word.endswith("answers.json") else word for word in flags]
        assert main(["--evaluate", *other]) == 2 and "on other answers, or in another" in capsys.readouterr().err
    if task == "retrieval":
        argv = ["--pretrained", str(file), "--data", str(data / "retrieval_val.json"), "--images", str(data / "images")]
        argv += ["--device", "cpu", "--precision", "fp32", "--workers", "0", "--results", str(tmp_path / "results")]
        assert retrieval.main([*argv, "--vision-guided-reduction"]) == 0
        ((record,), keys) = records(tmp_path / "results"), ("image_to_text_R@1", "text_to_image_R@5", "num_captions")
        assert [record["metrics"][key] for key in keys] == pytest.approx([last[f"val-{key}"] for key in keys])
        assert retrieval.main([*argv, "--rerank", "3"]) == 2  # every pair is compared anyhow


# ---------------------------------------------------------------------- weights of others


def lightning(path, state):
    """A checkpoint as that library writes it, which keeps objects of its own; it is not there when the file is read."""
    module = ModuleType("pytorch_lightning.callbacks")

    class ModelCheckpoint:
        pass

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = module.__name__, "ModelCheckpoint"
    module.ModelCheckpoint = ModelCheckpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "pytorch_lightning", ModuleType("pytorch_lightning"))
        patch.setitem(__import__("sys").modules, module.__name__, module)
        content = {"callbacks": {ModelCheckpoint: {"best": ModelCheckpoint()}}, "epoch": 3, "state_dict": state}
        torch.save(content, path)
    return path


def released(start) -> dict:
    """As the release has them, with what is left over from CLIP's text tower and BERT's pooler."""
    state = write_released(torch.load(start[1], weights_only=True)["state_dict"], {}, NAMES)
    dead = {"vit_model.positional_embedding": (7, 8), "vit_model.ln_final.weight": (8,)}
    dead |= {"text_transformer.pooler.dense.weight": (32, 32), "text_transformer.pooler.dense.bias": (32,)}
    return state | {name: torch.zeros(shape) for name, shape in dead.items()}


@pytest.mark.parametrize("task", TASKS)
def test_a_released_file_starts_as_ours_does(task, start, data, tmp_path, caplog):
    files = start[1], lightning(tmp_path / "meter.ckpt", released(start))
    words = [downstream_command(task, data, tmp_path, start[0], file) for file in files]
    found = [downstream(parse(DownstreamOptions, one), Ranks(torch.device("cpu")), None) for one in words]
    ours, theirs = (one.model.state_dict() for one in found)
    for name, value in theirs.items():
        assert name.startswith("head.") or torch.equal(value, ours[name]), name
    if task == "retrieval":
        assert torch.equal(theirs["rank_output.weight"], theirs["itm_head.weight"][1:])
        assert not found[0].model.itm_head.weight.requires_grad
    rows = theirs["token_type_embeddings.weight"]
    assert len(rows) == (3 if task == "nlvr2" else 2) and torch.equal(rows[1], rows[-1])
    assert "of no known part" not in caplog.text


def test_every_released_name_has_a_place_and_comes_back(start):
    own = torch.load(start[1], weights_only=True)["state_dict"]
    state = write_released(own, {}, NAMES)
    model = meter({"method": "elip"})
    assert {name: value for name, value in model.own_names(state).model.items()}.keys() == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in model.own_names(state).model.items())
    assert "mlm_score.bias" in state and "text_transformer.embeddings.position_ids" in state


def test_three_rows_of_types_fit_where_two_are_and_a_foreign_name_is_told(start):
    state = released(start)
    rows = torch.cat([state["token_type_embeddings.weight"], torch.ones(1, 24)])
    found = start_task(meter(task="entailment"), {"state_dict": state | {"token_type_embeddings.weight": rows}}, "x")
    assert found.resized == ["token_type_embeddings.weight (3 to 2)"]
    with pytest.raises(ModelError, match="its cross_modal_text_layers.2.x has no place here"):
        start_task(meter(task="entailment"), {"state_dict": state | {"cross_modal_text_layers.2.x": rows}}, "x")


def test_an_unknown_class_in_a_file_of_lightning_is_never_called(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    path = lightning(tmp_path / "x.ckpt", {"weight": torch.ones(2), "other": Harm()})
    assert weights.read(path)["state_dict"].keys() == {"weight"} and not (tmp_path / "harm").exists()
    torch.save({"state_dict": {"weight": torch.ones(2)}, "other": Harm()}, tmp_path / "plain.pt")
    with pytest.raises(ModelError, match="holds a Python object"):
        weights.read(tmp_path / "plain.pt")


def test_a_clip_without_its_last_layer_begins_an_image_tower(tmp_path):
    vision = METER["vision_cfg"] | {"layers": 7, "image_size": 48}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 1, "layers": 1}
    clip = open_clip.CLIP(16, vision, text, quick_gelu=True)
    torch.nn.init.normal_(clip.visual.positional_embedding)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    model = meter()
    assert start_image(model, str(tmp_path / "clip.pt")) == []
    last, theirs = (one.visual.transformer.resblocks[5].mlp.c_fc.weight for one in (model, clip))
    assert torch.equal(last, theirs)
    old = clip.visual.positional_embedding[1:].view(1, 6, 6, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(old, (4, 4), mode="bicubic", align_corners=False).flatten(2)[0].t()
    torch.testing.assert_close(model.visual.positional_embedding[1:], expected, rtol=0, atol=1e-6)
    torch.save({"cls_token": torch.zeros(1, 1, 32)}, tmp_path / "deit.pt")
    with pytest.raises(ModelError, match="has no image tower of CLIP's"):
        start_image(model, str(tmp_path / "deit.pt"))


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_bert_or_roberta_begins_a_text_encoder(kind, tmp_path):
    config = getattr(transformers, f"{kind}Config")(**METER["text_cfg"]["bert"])
    text = getattr(transformers, f"{kind}ForMaskedLM")(config)
    text.save_pretrained(tmp_path / "text")
    model = meter(model_type=kind.lower())
    assert {name.partition(".")[0] for name in start_text(model, str(tmp_path / "text"))} == {"mlm_head"}
    theirs = text.base_model.encoder.layer[1].output.dense.weight
    assert torch.equal(model.text.encoder.layer[1].output.dense.weight, theirs)


REFUSED = {
    ("vqa", "--generate"): "--generate is for BLIP models: leave it out.",
    ("captioning",): "does not learn --task captioning: its tasks are retrieval, entailment, vqa, nlvr2",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_work_is_told(words, start, data, tmp_path, capsys):
    assert main(downstream_command(words[0], data, tmp_path, *start, *words[1:])) == 2
    assert REFUSED[words] in capsys.readouterr().err and not (tmp_path / "run").exists()
