"""Models and inputs of the compact oracle, from its recipe: weights from seeded draws by name, sizes from the file."""
from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.distributed import Ranks
from training.evaluation.rerank import rerank, score_pairs, shortlist
from training.tasks.alignment import AlignmentTask
from training.tasks.base import Progress

NAMED = os.environ.get("ELIP_ORACLE")
RTOL = 1e-9
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def oracle(name: str) -> dict[str, Any]:
    folder = Path(NAMED or Path(__file__).parent / "oracle")
    return json.loads((folder / f"{name}.json").read_text())


def folder_of_tensors(family: str, file: str) -> Path | None:
    """Where `ELIP_ORACLE` has, or has beside it, all tensors of a family, `file` among them; None: nowhere."""
    named = Path(NAMED or ".")
    places = (named / family, named.parent / family, named)
    return next((place for place in places if (place / file).is_file()), None)


def load_tensors(path: Path) -> Any:
    """What is in a file, floats as float64."""

    def doubled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: doubled(one) for key, one in value.items()}
        if isinstance(value, list):
            return [doubled(one) for one in value]
        return value.double().clone() if torch.is_tensor(value) and value.is_floating_point() else value

    return doubled(torch.load(path, weights_only=True))


class Recipe:
    """Draws of one file."""

    def __init__(self, found: dict[str, Any]):
        self.found = found

    def draw(self, name: str, shape) -> Tensor:
        seed = self.found["seed"] ^ zlib.crc32(name.encode())
        return torch.from_numpy(np.asarray(np.random.RandomState(seed).standard_normal(tuple(shape)), dtype=np.float64))

    def parameter(self, name: str, shape) -> Tensor:
        n = self.draw(name, shape)
        if len(shape) == 1 and name.endswith(".weight"):
            return 1 + 0.1 * n
        if name.endswith("bias"):
            return 0.1 * n
        embeddings = ("cls_token", "class_embedding", "pos_embed", "positional_embedding", "embeddings.")
        if any(part in name for part in embeddings):
            return 0.5 * n
        return self.found["gain"] * n / np.prod(shape[1:]) ** 0.5

    def configs(self, image_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """`vision_cfg`, and options of the text layers, without dropout."""
        c = self.found["config"]
        vision = {
            "image_size": image_size, "layers": c["vision_layers"], "width": c["vision_width"],
            "head_width": c["vision_width"] // c["vision_heads"], "patch_size": c["patch_size"],
            "mlp_ratio": c["vision_mlp_ratio"], "no_ln_pre": True, "norm_kwargs": {"eps": c["vision_layer_norm_eps"]},
        }  # fmt: skip
        return vision, NO_DROPOUT | {
            "vocab_size": c["vocab_size"], "hidden_size": c["text_width"], "num_hidden_layers": c["text_layers"],
            "num_attention_heads": c["text_heads"], "intermediate_size": c["text_intermediate_size"],
            "max_position_embeddings": c["max_positions"], "layer_norm_eps": c["text_layer_norm_eps"],
        }  # fmt: skip

    def shapes(self, parameters: dict | None = None) -> dict[str, list[int]]:
        """Names with N written out."""
        shapes = {}
        for name, shape in (self.found["parameters"] if parameters is None else parameters).items():
            if isinstance(shape, dict):
                first, last = shape["N"]
                shapes |= {name.replace(".N.", f".{i}."): shape["shape"] for i in range(first, last + 1)}
            else:
                shapes[name] = shape
        return shapes

    def state(self) -> dict[str, Tensor]:
        """The state dict of an official checkpoint: online weights, momentum copies, queues, scalars."""
        state = {name: self.parameter(name, shape) for name, shape in self.shapes().items()}
        for name, value in list(state.items()):
            module, _, rest = name.partition(".")
            if twin := self.found.get("momentum_of", {}).get(module):
                own = f"{twin}.{rest}"
                state[own] = 0.7 * value + 0.3 * self.parameter(own, value.shape)
        for name, other in self.found.get("same_tensor", {}).items():
            for n in range(self.found["config"]["text_layers"] if ".N." in name else 1):
                state[name.replace(".N.", f".{n}.")] = state[other.replace(".N.", f".{n}.")]
        config = self.found["config"]
        if "queue_ptr" not in self.found:
            return state
        for name in ("image_queue", "text_queue"):
            queue = self.draw(name, (config["embed_dim"], config["queue_size"]))
            state[name] = queue / queue.norm(dim=0)
        state["temp"] = torch.tensor(self.found["temp"], dtype=torch.float64)
        state["queue_ptr"] = torch.tensor([self.found["queue_ptr"]])
        return state


def close(found, expected, what: str = "") -> None:
    found, expected = torch.as_tensor(found).detach(), torch.as_tensor(expected, dtype=torch.float64)
    assert found.shape == expected.shape, what
    atol = RTOL * max(1e-3, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol, msg=lambda m: f"{what}: {m}")


def resized(positions, grid):
    old = round((len(positions) - 1) ** 0.5)
    if (old, old) == tuple(grid):
        return positions
    image = positions[1:].view(1, old, old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=tuple(grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], image.flatten(2)[0].t()])


def with_queues(task: AlignmentTask, twin: nn.Module, queues: dict, pointer: int) -> None:
    task.twin = twin
    for name, queue in task.queues.items():
        queue.columns.copy_(queues[f"{name}_queue"])
        queue.pointer.fill_(pointer)


def tensors(inputs: dict, *names: str) -> list[Tensor]:
    return [torch.tensor(inputs[name]) for name in names]


def after_first_epoch() -> Progress:
    return Progress(epoch=1, epoch_steps=0, steps=0, samples=0, plan=None)


@torch.no_grad()
def check_shortlists(model, image, text, image_of, best: int, expected: dict) -> dict[str, float]:
    """Cosines and scores; returns the recalls."""
    features = model.encode_image(image, normalize=True), model.encode_text(text, normalize=True)
    states = [(torch.arange(len(image)), model.image_states(image))]
    close(features[0] @ features[1].t(), expected["itc_scores"])
    settings = {"ranks": Ranks(torch.device("cpu")), "precision": "fp32"}
    wanted = {}
    for name, *sides in (("score_i2t", *features), ("score_t2i", *reversed(features))):
        empty = torch.zeros(len(sides[0]), len(sides[1]), dtype=torch.bool)
        wanted[name] = empty.scatter_(1, shortlist(*sides, best), True)
    union = wanted["score_i2t"] | wanted["score_t2i"].t()
    pairs = union.flatten().nonzero().squeeze(1)
    numbers, scores = map(torch.cat, zip(*score_pairs(model, text, pairs, states, name=str, **settings), strict=True))
    assert torch.equal(numbers, torch.arange(len(pairs)))
    scores = torch.zeros_like(union, dtype=torch.float64).masked_scatter_(union, scores)
    if model.adds_cosine:
        scores = scores + features[0] @ features[1].t()
    for name, own in (("score_i2t", scores), ("score_t2i", scores.t())):
        close(own.masked_fill(~wanted[name], -100), expected[name], name)
    return rerank(
        model, features, text, states, best=best, name=lambda *rows: str(rows), image_of=image_of, **settings
    )
