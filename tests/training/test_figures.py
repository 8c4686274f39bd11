"""What the log tells of a run: a row's rates, the device's peak, the summary."""
from __future__ import annotations

import pytest
import torch

from training import figures
from training.distributed import Ranks
from training.figures import Figures, peak_flops
from training.tasks.base import Cost


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "amp", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "amp", None),
        ("NVIDIA H100 80GB HBM3", "amp_bf16", 989e12),
        ("NVIDIA H100 PCIe", "pure_bf16", 756e12),
        ("NVIDIA H200", "fp16", 989e12),
        ("NVIDIA RTX A6000", "amp", 154.8e12),
        ("NVIDIA RTX A5000", "amp_bfloat16", 111.2e12),
        ("NVIDIA GeForce RTX 3090", "bf16", 71.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA L4", "amp", 121e12),
        ("NVIDIA L40S", "amp", 362e12),
        ("NVIDIA L40", "amp", None),
        ("Tesla V100-SXM2-32GB", "amp", 125e12),
        ("Tesla V100-SXM2-32GB", "amp_bf16", None),
        ("Tesla T4", "fp32", 8.1e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA GH200 480GB", "bf16", None),
        ("Some other device", "bf16", None),
    ],
)
def test_peak_by_name(name, precision, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), precision) == peak


@pytest.mark.parametrize(("setting", "peak"), [("highest", 19.5e12), ("high", 156e12)])
def test_peak_of_float32_depends_on_tf32(setting, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert peak_flops(torch.device("cpu"), "fp32") is None
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: setting)
    assert peak_flops(torch.device("cuda"), "fp32") == peak


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test moves on by hand; on a device of 4 TFLOP/s that has used 12.345 GB."""
    now = [0.0]
    monkeypatch.setattr(figures.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(figures, "peak_flops", lambda device, precision: 4e12)
    monkeypatch.setattr(figures, "peak_memory_gb", lambda device: 12.345)
    return now


COST = Cost(4e10, 273)


def row(found: Figures, clock: list[float], loss: float, rrt: float = 0.25, cost: Cost | None = COST):
    clock[0] += 1862.5
    found.steps, found.waited = 10, 186.25
    found.costs = [cost and Cost(share * cost.operations, cost.tokens) for share in (0.5, 1.5)]
    where = {"step": 9, "epoch": 0, "samples": 18625}
    return found.row(where, {"loss": loss}, lr=1e-3, columns={"rrt": rrt})


def test_a_row_and_the_summary(clock, tmp_path):
    found = Figures(Ranks(torch.device("cpu")), "fp32", 1862.5)
    told = row(found, clock, loss=6.5)
    assert told["samples_per_second"] == 10 and told["data_time"] == 18.625 and told["batch_time"] == 186.25
    assert (told["gflops_per_sample"], told["tokens_per_second"], told["tflops_per_second"]) == (40, 2730, 0.4)
    assert told["mfu"] == 0.1
    line = found.line(told, {"loss": 6.5}, 3725)
    assert "loss 6.5000 | rrt 0.25 | 10 samples/s, data wait 10%" in line and "0.4 TFLOP/s, MFU 10.0%" in line
    row(found, clock, loss=2.25, rrt=0.5)
    found.evaluations = [
        {"epoch": 1, "step": 10, "image_to_text_R@1": 0.25, "clip_val_loss": 3.0, "num_samples": 64,
         "text_to_image_mean_rank": 4.0, "reranked_r_mean": 0.25},
        {"epoch": 2, "step": 20, "image_to_text_R@1": 0.5, "clip_val_loss": 2.0, "num_samples": 64,
         "text_to_image_mean_rank": 2.0, "reranked_r_mean": 0.5},
        {"epoch": 3, "step": 30, "image_to_text_R@1": 0.375, "clip_val_loss": 2.5, "num_samples": 64,
         "text_to_image_mean_rank": 3.0, "reranked_r_mean": 0.375},
    ]
    found.summarise(tmp_path)
    assert (tmp_path / "summary.txt").read_text().splitlines() == [
        "trained    37,250.0 samples in 1:02:05, 10 samples/s, data wait 10.0%",
        "compute    0.4 TFLOP/s, 10.0% of the peak, 2730 tokens/s, 40 GFLOP a sample",
        "memory     12.35 GB at the peak",
        "on average rrt 0.375",
        "loss       6.5000 at first, 2.2500 at last",
        "image_to_text_R@1: best 0.5000 (epoch 2), last 0.3750",
        "clip_val_loss: best 2.0000 (epoch 2), last 2.5000",
        "text_to_image_mean_rank: best 2.0000 (epoch 2), last 3.0000",
        "reranked_r_mean: best 0.5000 (epoch 2), last 0.3750",
        f"run        {tmp_path}",
    ]


def test_what_is_not_known_is_not_told(clock, tmp_path):
    found = Figures(Ranks(torch.device("cpu")), "fp32", 1862.5)
    found.summarise(tmp_path)
    assert (tmp_path / "summary.txt").read_text() == (
        f"trained    0 samples in 0:00:00, 0 samples/s\nmemory     12.35 GB at the peak\nrun        {tmp_path}\n"
    )
    assert "gflops_per_sample" not in row(found, clock, loss=1.0, cost=None)
