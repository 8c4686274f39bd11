"""ALBEF's recipes: the paper's and upstream's values."""
from pathlib import Path

import pytest

import open_clip_elip  # noqa: F401  (makes the models known)
from training.options import parse
from training.options.downstream import DownstreamOptions
from training.options.main import PretrainingOptions

FOLDER = Path(__file__).parents[2] / "configs" / "albef"


@pytest.mark.parametrize(
    "name, model, batch, epochs, warmup",
    [
        ("pretrain", "ALBEF-B-16", 4 * 40, 20, 1000),
        ("pretrain_elip", "ALBEF-B-16-ELIP", 4 * 40, 20, 1000),
        ("pretrain_elip_plus", "ALBEF-B-16-ELIP", 4 * 58, 20, 1000),
        ("pretrain_elip_amp", "ALBEF-B-16-ELIP", 4 * 40, 20, 1000),
        ("pretrain_elip_adapter", "ALBEF-B-16-ELIP", 4 * 40, 20, 1000),
        ("pretrain_elip_lora", "ALBEF-B-16-ELIP", 4 * 40, 20, 1000),
        ("pretrain_upstream", "ALBEF-B-16", 8 * 64, 30, 2000),
    ],
)
def test_pretraining(name, model, batch, epochs, warmup, monkeypatch, caplog):
    monkeypatch.setenv("DATA", "/data")
    found = parse(PretrainingOptions, ["--config", str(FOLDER / f"{name}.yaml")])
    assert (found.model, found.global_batch, found.epochs, found.warmup) == (model, batch, epochs, warmup)
    assert (found.lr, found.lr_start, found.lr_end, found.lr_scheduler) == (1e-4, 1e-5, 1e-5, "epoch-cosine")
    assert (found.wd, found.beta1, found.beta2, found.eps, found.grad_clip_norm) == (0.02, 0.9, 0.999, 1e-8, None)
    assert (found.queue_size, found.twin_momentum, found.twin_weight, found.twin_dropout) == (65536, 0.995, 0.4, True)
    assert found.train_data.startswith("/data/coco.json::/data/vg.json") and not caplog.messages
    row = {"amp": ("amp", None), "adapter": ("fp32", "bottleneck"), "lora": ("fp32", "lora")}  # of Table 10
    assert (found.precision, found.adapter) == row.get(name.rpartition("_")[2], ("fp32", None))


@pytest.mark.parametrize(
    "name, task, batch, epochs, lr, end, warmup, size",
    [
        ("retrieval_coco", "retrieval", 4 * 16, 5, 1e-5, 1e-6, 100, [384]),
        ("retrieval_flickr30k", "retrieval", 4 * 16, 5, 1e-5, 1e-6, 100, [384]),
        ("snli_ve", "entailment", 4 * 16, 3, 2e-5, 1e-6, 100, [384]),
        ("vqa", "vqa", 4 * 16, 8, 2e-5, 1e-6, 400, [384]),
        ("nlvr2", "nlvr2", 4 * 8, 10, 2e-5, 1e-6, 100, [384]),
        ("text_assignment", "assignment", 8 * 64, 1, 2e-5, 1e-5, 100, None),
    ],
)
def test_tasks(name, task, batch, epochs, lr, end, warmup, size, monkeypatch, caplog):
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("PRETRAINED", "ALBEF.pth")
    found = parse(DownstreamOptions, ["--config", str(FOLDER / f"{name}.yaml")])
    assert (found.task, found.global_batch, found.epochs, found.warmup) == (task, batch, epochs, warmup)
    assert (found.lr, found.lr_start, found.lr_end, found.lr_scheduler) == (lr, 1e-5, end, "epoch-cosine")
    assert (found.model, found.pretrained, found.wd, found.beta2) == ("ALBEF-B-16", "ALBEF.pth", 0.02, 0.999)
    assert (found.twin_momentum, found.twin_weight, found.force_image_size) == (0.995, 0.4, size)
    assert found.shortlist == (256 if name == "retrieval_coco" else 128) and not caplog.messages
