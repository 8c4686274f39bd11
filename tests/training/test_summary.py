"""What a run is told to come to: cost at a rate, the device's peak, the summary."""
from __future__ import annotations

import pytest
import torch
from training.summary import Cost, peak_flops, summary

from open_clip_elip.profile.flops import Flops

COST = Cost.of(Flops(forward=20, backward=40, scoring=20), samples=2, tokens=273)


def test_columns_of_the_log():
    assert COST == Cost(flops=40, scoring=10, tokens=273)
    row = COST.columns(rate=10, peak=None)
    assert row == {"gflops_per_pair": 40e-9, "tokens_per_second": 2730, "tflops_per_second": 400e-12}
    assert COST.columns(rate=10, peak=4000)["mfu"] == 0.1


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
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        assert peak_flops(torch.device("cuda"), "fp32") == peak
    finally:
        torch.set_float32_matmul_precision(before)


def test_peak_of_the_cpu_is_not_known():
    assert peak_flops(torch.device("cpu"), "fp32") is None


def test_summary_tells_the_run(tmp_path):
    text = summary(
        seconds=3725.0,
        samples=37250,
        waited=372.5,
        losses=[6.5, 5.0, 2.25],
        evaluations=[
            {"epoch": 1, "step": 10, "image_to_text_R@1": 0.25, "clip_val_loss": 3.0, "num_samples": 64},
            {"epoch": 2, "step": 20, "image_to_text_R@1": 0.5, "clip_val_loss": 2.0, "num_samples": 64},
            {"epoch": 3, "step": 30, "image_to_text_R@1": 0.375, "clip_val_loss": 2.5, "num_samples": 64},
        ],
        cost=Cost(4e10, 1e10, 273),
        peak=4e12,
        rrt=0.288,
        peak_memory_gb=12.345,
        folder=tmp_path,
    )
    assert text.splitlines() == [
        "trained    37,250 samples in 1:02:05, 10 samples/s, data wait 10.0%",
        "compute    0.4 TFLOP/s, 10.0% of the peak, 2730 tokens/s, 40 GFLOP a pair (25.0% scoring)",
        "memory     12.35 GB at the peak; RRT 28.8%",
        "loss       6.5000 at first, 2.2500 at last",
        "image_to_text_R@1: best 0.5000 (epoch 2), last 0.3750",
        "clip_val_loss: best 2.0000 (epoch 2), last 2.5000",
        f"run        {tmp_path}",
    ]


def test_summary_of_a_run_that_did_nothing():
    nothing = {"losses": [], "evaluations": [], "cost": None, "peak": None, "folder": None}
    text = summary(seconds=0.0, samples=0, waited=0.0, rrt=0.0, peak_memory_gb=0.5, **nothing)
    assert text == "trained    0 samples in 0:00:00, 0 samples/s\nmemory     0.50 GB at the peak; RRT 0.0%"
