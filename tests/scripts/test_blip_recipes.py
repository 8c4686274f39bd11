"""BLIP's recipes: the paper's and upstream's values."""
from pathlib import Path

import pytest

import open_clip_elip  # noqa: F401  (makes the models known)
from training.optim import epoch_cosine
from training.options import parse
from training.options.downstream import DownstreamOptions
from training.options.main import PretrainingOptions

FOLDER = Path(__file__).parents[2] / "configs" / "blip"


@pytest.mark.parametrize(
    "name, model, batch, epochs, lr",
    [
        ("pretrain", "BLIP-B-16", 4 * 42, 15, 1e-4),
        ("pretrain_elip", "BLIP-B-16-ELIP", 4 * 42, 15, 1e-4),
        ("pretrain_elip_plus", "BLIP-B-16-ELIP", 4 * 56, 15, 1e-4),
        ("pretrain_elip_amp", "BLIP-B-16-ELIP", 4 * 42, 15, 1e-4),
        ("pretrain_elip_adapter", "BLIP-B-16-ELIP", 4 * 42, 15, 1e-4),
        ("pretrain_elip_lora", "BLIP-B-16-ELIP", 4 * 42, 15, 1e-4),
        ("pretrain_upstream", "BLIP-B-16", 8 * 75, 20, 3e-4),
    ],
)
def test_pretraining(name, model, batch, epochs, lr, monkeypatch, caplog):
    monkeypatch.setenv("DATA", "/data")
    found = parse(PretrainingOptions, ["--config", str(FOLDER / f"{name}.yaml")])
    assert (found.model, found.global_batch, found.epochs, found.lr) == (model, batch, epochs, lr)
    assert (found.lr_start, found.lr_end, found.lr_decay, found.warmup) == (1e-6, 1e-6, 0.9, 3000)
    assert found.lr_scheduler == "epoch-decay"
    assert (found.wd, found.beta1, found.beta2, found.eps, found.grad_clip_norm) == (0.05, 0.9, 0.999, 1e-8, None)
    assert (found.queue_size, found.twin_momentum, found.twin_weight, found.twin_dropout) == (57600, 0.995, 0.4, True)
    assert found.train_data.startswith("/data/coco.json::/data/vg.json") and not caplog.messages
    row = {"amp": ("amp", None), "adapter": ("fp32", "bottleneck"), "lora": ("fp32", "lora")}  # of Table 10
    assert (found.precision, found.adapter) == row.get(name.rpartition("_")[2], ("fp32", None))


@pytest.mark.parametrize(
    "name, lr, batch, epochs, size",
    [
        ("retrieval_coco", 1e-5, 64, 3, 384), ("retrieval_flickr30k", 1e-5, 64, 5, 384),
        ("captioning", 1e-5, 64, 6, 384), ("vqa", 2e-5, 256, 10, 480), ("nlvr2", 3e-5, 256, 15, 384),
    ],
)  # fmt: skip
def test_tasks(name, lr, batch, epochs, size, monkeypatch, caplog):
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("PRETRAINED", "model_base.pth")
    found = parse(DownstreamOptions, ["--config", str(FOLDER / f"{name}.yaml")])
    assert (found.lr, found.lr_start, found.lr_end, found.warmup, found.wd) == (lr, lr, 0, 0, 0.05)
    assert (found.global_batch, found.epochs, found.force_image_size) == (batch, epochs, [size])
    assert epoch_cosine(0, peak=lr, start=lr, end=0, warmup=0, epoch=5, epochs=2) == lr
    assert found.drop_path == (0.1 if name in ("vqa", "nlvr2") else 0) and found.decay_norms
    assert found.all_rank_negatives == (name == "retrieval_coco") and not caplog.messages
