"""An exponential moving average of a model's weights."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .sharding import shard_like


class Ema:
    """Averages of everything floating point in a (bare) model's state dict; what is not (counters) is kept as it is.

    The values are those of torch's `AveragedModel` with `get_ema_multi_avg_fn`: the first update copies, each later one
    moves the average by 1 - decay towards the model. Unlike there, no module is copied (a sharded one cannot be), and
    the averages are float32 at least; they are on the model's device, sharded where the model is.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0  # so far; belongs into a checkpoint next to `state_dict`
        self.weights = {name: _wide(value).clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes the model's present weights into the average; call it after each optimizer step."""
        averages, currents = [], []
        for name, value in model.state_dict().items():
            average, current = _local(self.weights[name]), _local(value)
            if self.updates == 0 or not average.is_floating_point():
                average.copy_(current)
            else:
                averages.append(average)
                currents.append(current.to(average.dtype))
        if averages:
            get_ema_multi_avg_fn(self.decay)(averages, currents, self.updates)
        self.updates += 1

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within the context the model has the averaged weights; afterwards its own again, bit for bit."""
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.weights)
        try:
            yield model
        finally:
            model.load_state_dict(own)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, whole, under exactly the plain model's keys. Of a sharded model, a collective call."""
        return {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in self.weights.items()}

    @torch.no_grad()
    def load_state_dict(self, weights: Mapping[str, Tensor], updates: int) -> None:
        """Continues from `state_dict`, whole on every process, and `updates`."""
        for name, average in self.weights.items():
            average.copy_(shard_like(average, weights[name].to(average.device)))
        self.updates = updates


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(torch.promote_types(value.dtype, torch.float32)) if value.is_floating_point() else value


def _local(value: Tensor) -> Tensor:
    """This process's part of a tensor that `fully_shard` has distributed; any other tensor itself."""
    return value.to_local() if isinstance(value, DTensor) else value
