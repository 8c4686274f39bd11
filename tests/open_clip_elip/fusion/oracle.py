"""Models and inputs of the compact oracle, from its recipe: weights from seeded draws by name, sizes from the file."""
from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(os.environ.get("ELIP_ORACLE") or Path(__file__).parent / "oracle")


def oracle(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


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
        for name in ("image_queue", "text_queue"):
            queue = self.draw(name, (config["embed_dim"], config["queue_size"]))
            state[name] = queue / queue.norm(dim=0)
        state["temp"] = torch.tensor(self.found["temp"], dtype=torch.float64)
        state["queue_ptr"] = torch.tensor([self.found["queue_ptr"]])
        return state
