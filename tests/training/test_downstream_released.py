"""Fine-tuned checkpoints by the names of the authors' release are evaluated by one command."""
import pytest
import torch

from open_clip_elip import identity as identities
from open_clip_elip.fusion.released import albef, write_released
from training.downstream import main

from .downstream_runs import figures, settings, write_data, write_pretrained

RENAMED = {
    "head.": "cls_head.", "embeddings.": "text_decoder.bert.embeddings.", "lm_head.": "text_decoder.cls.",
    "decoder.": "text_decoder.bert.encoder.layer.",
}  # fmt: skip


def released(state, fusion_layer):
    """Bare weights, without the `bert.` that files of pre-training have."""
    found = {}
    for name, value in write_released(state, {}, albef(fusion_layer)).items():
        start = next((ours for ours in RENAMED if name.startswith(ours)), "")
        name = RENAMED.get(start, "") + name.removeprefix(start)
        found[name.replace("text_encoder.bert.", "text_encoder.")] = value
    return found


@pytest.mark.parametrize("task", ["entailment", "nlvr2", "vqa", "retrieval"])
def test_evaluation(task, tmp_path, capsys, monkeypatch):
    (tmp_path / "model").mkdir()
    name, pretrained = write_pretrained(tmp_path / "model")
    data = write_data(tmp_path / "data")
    state = torch.load(pretrained, weights_only=True)
    config = state["model"]["config"] | {"task": task}
    model = identities.create(identities.Identity.from_dict(state["model"] | {"config": config}))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "ours.pt")
    torch.save(released(model.state_dict(), config["text_cfg"]["fusion_layer"]), tmp_path / "theirs.pth")
    seen = []
    monkeypatch.setattr("training.run.describe", lambda metrics: seen.append(metrics) or "")
    for file in ("ours.pt", "theirs.pth"):
        argv = [
            "--evaluate", "--task", task, "--model", name, "--pretrained", tmp_path / file, "--test-data",
            data / f"{task}_val.json", "--image-root", data / "images", *settings(tmp_path),
        ]  # fmt: skip
        assert main([*map(str, argv), *["--answers", str(data / "answers.json")] * (task == "vqa")]) == 0
        assert "new here" not in capsys.readouterr().err
    ours, theirs = map(figures, seen)
    assert ours == theirs and len(ours) > 1 and not (tmp_path / "run").exists()
