"""A CLIP small enough for exact arithmetic, and data for it that lives in memory."""
from __future__ import annotations

import torch

from open_clip_elip import TextFirstCLIP
from training.data import DataReport
from training.data.pixels import Images
from training.options import TrainingOptions
from training.options.main import PretrainingOptions

VOCABULARY = 50
CONTEXT = 8


def tiny_clip(siglip: bool = False, patch_dropout: float = 0.0, dtype=torch.float64, seed: int = 0) -> TextFirstCLIP:
    torch.manual_seed(seed)
    model = TextFirstCLIP(
        embed_dim=16,
        vision_cfg={
            "image_size": 16, "patch_size": 4, "layers": 6, "width": 32, "head_width": 16,
            "patch_dropout": patch_dropout,
        },
        text_cfg={"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 2},
        init_logit_bias=-5.0 if siglip else None,
        output_dict=True,
        token_reduction={"method": "elip"},
    )
    return model.to(dtype)


def gradients(model) -> dict:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def pairs(count: int, seed: int = 0, dtype=torch.float64) -> dict:
    g = torch.Generator().manual_seed(seed)
    text = torch.randint(1, VOCABULARY - 1, (count, CONTEXT), generator=g)
    text[:, -1] = VOCABULARY - 1  # the largest id is the end of text
    return {
        "image": torch.randn(count, 3, 16, 16, generator=g, dtype=dtype),
        "text": text,
        "key": [f"{i:05d}" for i in range(count)],
    }


def micro_batches(batch: dict, count: int) -> list[dict]:
    size = len(batch["key"]) // count
    return [{k: v[i * size : (i + 1) * size] for k, v in batch.items()} for i in range(count)]


class MemoryData:
    """`TrainData` over a list of batches, the same in every epoch."""

    def __init__(self, batches: list[dict]):
        self.batches = batches
        self.num_batches, self.files = len(batches), {}
        self.num_samples = sum(len(b.get("key", ())) for b in batches)

    def epoch(self, epoch: int):
        return iter({**batch, "image": Images(batch["image"])} for batch in self.batches)

    def report(self):
        return DataReport()

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass

    def describe(self) -> str:
        return "batches in memory"


def run_options(kind: type[TrainingOptions] = PretrainingOptions, **changes) -> TrainingOptions:
    """Options of a run, for the trainer and its task, without any data."""
    values = {
        "name": "test", "epochs": 1, "batch_size": 8, "precision": "fp32", "log_every_n_steps": 1, "progress": False,
        "workers": 1, "skip_scheduler": True, "warmup": 0, "lr": 1e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6,
        "wd": 0.1,
    }  # fmt: skip
    return kind(**(values | changes))
