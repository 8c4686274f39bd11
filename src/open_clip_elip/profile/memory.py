"""What a training step keeps, and the most it needs at once, as the device's allocator tells it."""
from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts in `bytes`, while it is entered, all storages that are kept for a backward pass, each once.

    The parameters of `model`, and autocast's copies of them, are left out: what remains grows with the batch.
    """

    def __init__(self, model: nn.Module):
        super().__init__(self._pack, lambda tensor: tensor)
        self.bytes = 0
        self._parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        self._seen: dict[int, weakref.ref] = {}  # not held, so that a step under this hook needs no more memory

    def __enter__(self) -> SavedBytes:
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = key in self._seen and self._seen[key]() is not None  # a number is given out again after a storage's end
        if not known and _origin(tensor).untyped_storage()._cdata not in self._parameters:
            self._seen[key] = weakref.ref(storage)
            self.bytes += storage.nbytes()
        return tensor


# What lies between a parameter and the copy of it that enters a matrix product under autocast.
_RESHAPES = {
    f"{name}Backward0"
    for name in ("ToCopy", "T", "Transpose", "View", "Split", "SplitWithSizes", "Slice", "Permute", "Unbind")
}


def _origin(tensor: Tensor) -> Tensor:
    """The leaf of the graph that a tensor is a copy or view of, or the tensor itself."""
    node = tensor.grad_fn
    while node is not None and node.name() in _RESHAPES:
        node = node.next_functions[0][0]
    return getattr(node, "variable", tensor)  # a leaf's


def allocated(device: torch.device) -> int:
    """Bytes that are in use on a CUDA device now; 0 for others."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def prepare_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Makes the optimizer's state, by a step on gradients that are zero."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def peak_bytes(
    step: Callable[[], object],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Iterable[Tensor],
    device: torch.device,
    others: int = 0,
) -> int:
    """The most bytes in use at once in `step`: parameters, gradients, optimizer state and inputs included.

    Args:
        step: a training step, which begins by setting the gradients to None.
        optimizer: its state exists already.
        others: bytes on the device that are not this model's (CUDA).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - others
    optimizer.zero_grad(set_to_none=True)
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    known = (tensor.untyped_storage() for tensor in [*model.parameters(), *model.buffers(), *state, *inputs])
    live = peak = sum({storage._cdata: storage.nbytes() for storage in known}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def loss_bytes(pairs: int) -> int:
    """Of the logits and their log-softmax, both ways, in float32: what grows with the square of the batch."""
    return 4 * 4 * pairs**2


def largest_batch(
    limit: float, small: tuple[int, int], large: tuple[int, int], saved: float = 0.0
) -> tuple[int, float, float]:
    """The largest batch whose peak stays within `limit` bytes (0: not even one pair), and the fixed bytes and bytes a
    pair that say so: a straight line through two measurements, (pairs, peak bytes) each, with `loss_bytes` on top.

    Args:
        saved: bytes that a pair keeps for the backward pass. The line rises by no less: at batches so small that the
            optimizer's step needs the most memory, the peaks alone would tell too little.
    """
    (n, a), (m, b) = ((pairs, peak - loss_bytes(pairs)) for pairs, peak in (small, large))
    slope = max((b - a) / (m - n), saved)
    fixed = b - slope * m
    square = loss_bytes(1)
    root = ((slope**2 + 4 * square * max(0.0, limit - fixed)) ** 0.5 - slope) / (2 * square)
    return int(root), fixed, slope
