"""Models that fuse image and text in a transformer of their own. Needs transformers: the package's extra `fusion`."""
from __future__ import annotations

from typing import Any

from torch import nn

from ..reduction.text import TextReduction
from .albef import Albef, AlbefAnswerer, AlbefAssigner, AlbefClassifier
from .blip import Blip, BlipAnswerer, BlipCaptioner, BlipPairClassifier
from .meter import Meter, MeterClassifier, MeterRetriever

PRETRAINING = "pretraining"
VQA_ANSWERS = 3129  # of METER's vocabulary


def build(
    family: str, task: str, embed_dim: int, vision_cfg: dict[str, Any], text_cfg: dict[str, Any],
    token_reduction: dict[str, Any] | None, answers: list[str] | None = None,
    text_reduction: dict[str, Any] | None = None,
) -> nn.Module:  # fmt: skip
    """A model of a family, for pre-training or for what comes after it, which reduces no texts; `answers`: of VQA, that
    a METER tells apart.

    Raises:
        ValueError: the family is not known, or has no such task.
    """
    parts = (vision_cfg, text_cfg, token_reduction)
    models = {
        ("albef", PRETRAINING): lambda: Albef(embed_dim, *parts),
        ("albef", "retrieval"): lambda: Albef(embed_dim, *parts, language_head=False),
        ("albef", "entailment"): lambda: AlbefClassifier(3, 1, *parts),
        ("albef", "assignment"): lambda: AlbefAssigner(embed_dim, *parts),
        ("albef", "nlvr2"): lambda: AlbefClassifier(2, 2, *parts),
        ("albef", "vqa"): lambda: AlbefAnswerer(*parts),
        ("blip", PRETRAINING): lambda: Blip(embed_dim, *parts),
        ("blip", "retrieval"): lambda: Blip(embed_dim, *parts, decoder=False),
        ("blip", "captioning"): lambda: BlipCaptioner(*parts),
        ("blip", "vqa"): lambda: BlipAnswerer(*parts),
        ("blip", "nlvr2"): lambda: BlipPairClassifier(2, *parts),
        ("meter", PRETRAINING): lambda: Meter(embed_dim, *parts),
        ("meter", "retrieval"): lambda: MeterRetriever(embed_dim, *parts),
        ("meter", "vqa"): lambda: MeterClassifier(len(answers or ()) or VQA_ANSWERS, 50, embed_dim, *parts),
        ("meter", "nlvr2"): lambda: MeterClassifier(2, 10, embed_dim, *parts, num_images=2),
        ("meter", "entailment"): lambda: MeterClassifier(3, 10, embed_dim, *parts),
    }
    if (family, task) not in models:
        known = ", ".join(" ".join(one) for one in models)
        raise ValueError(f"There is no {family} model for {task}; there are {known}.")
    model = models[family, task]()
    if text_reduction is not None and task == PRETRAINING:
        model.reduce_texts(TextReduction(**text_reduction))
    return model
