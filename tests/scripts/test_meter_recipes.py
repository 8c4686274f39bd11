"""METER's recipes: the paper's and upstream's values."""
from pathlib import Path

import pytest

import open_clip_elip  # noqa: F401  (makes the models known)
from training.options import parse
from training.options.downstream import DownstreamOptions
from training.options.main import PretrainingOptions

FOLDER = Path(__file__).parents[2] / "configs" / "meter"


@pytest.mark.parametrize(
    "name, model, batch, accumulated",
    [
        ("pretrain", "METER-B-32", 4 * 36 * 28, 28),
        ("pretrain_elip", "METER-B-32-ELIP", 4 * 36 * 28, 28),
        ("pretrain_elip_plus", "METER-B-32-ELIP", 4 * 54 * 18, 18),
        ("pretrain_upstream", "METER-B-16", 4096, 16),
    ],
)
def test_pretraining(name, model, batch, accumulated, monkeypatch, caplog):
    monkeypatch.setenv("DATA", "/data")
    found = parse(PretrainingOptions, ["--config", str(FOLDER / f"{name}.yaml")])
    assert (found.model, found.global_batch, found.accum_freq) == (model, batch, accumulated)
    assert (found.duration, found.warmup, found.lr, found.lr_scheduler) == (100_000, "10%", 1e-5, "linear")
    assert (found.wd, found.beta1, found.beta2, found.eps, found.grad_clip_norm) == (0.01, 0.9, 0.98, 1e-8, None)
    assert found.whole_words and found.start_image.endswith("-quickgelu:openai") and not caplog.messages


@pytest.mark.parametrize(
    "name, task, batch, epochs, lr, size",
    [
        ("retrieval_coco", "retrieval", 512, 10, 5e-6, [384]),
        ("retrieval_flickr30k", "retrieval", 512, 10, 5e-6, [384]),
        ("snli_ve", "entailment", 64, 5, 2e-6, [384]),
        ("vqa", "vqa", 512, 10, 5e-6, [576]),
        ("nlvr2", "nlvr2", 256, 10, 1e-5, [288]),
    ],
)
def test_tasks(name, task, batch, epochs, lr, size, monkeypatch, caplog):
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("PRETRAINED", "meter.ckpt")
    found = parse(DownstreamOptions, ["--config", str(FOLDER / f"{name}.yaml")])
    assert (found.task, found.global_batch, found.epochs, found.lr) == (task, batch, epochs, lr)
    assert (found.model, found.pretrained, found.wd, found.beta2) == ("METER-B-32", "meter.ckpt", 0.01, 0.98)
    assert (found.warmup, found.lr_scheduler, found.force_image_size) == ("10%", "linear", size)
    assert not found.vision_guided_reduction and not caplog.messages
