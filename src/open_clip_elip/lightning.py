"""Checkpoints of PyTorch Lightning, which hold objects of that library beside the weights: tensors alone are read."""
from __future__ import annotations

import pickle
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

# What rebuilds tensors, and what it needs: all that is ever called.
_ADMITTED = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("collections", "OrderedDict"): OrderedDict,
}


class _Left(dict):
    """Stands for an object of any other class, and takes whatever is put into it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Left:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """No code of the file is imported or run."""
        return _ADMITTED.get((module, name), _Left)


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


def read_state_dict(file: Any) -> dict[str, dict[str, Tensor]]:
    """{"state_dict": the tensors of that name in a file}. Raises: whatever torch does; KeyError: there are none."""
    limited = SimpleNamespace(Unpickler=_Unpickler, load=_load, __name__="lightning")
    content = torch.load(file, map_location="cpu", weights_only=False, pickle_module=limited)
    return {"state_dict": {name: one for name, one in content["state_dict"].items() if isinstance(one, Tensor)}}
