"""What a training step keeps, and the most it needs at once.

On CUDA the peak is the allocator's. On the CPU, whose allocator keeps no statistics, it is the most bytes of tensors
alive at the same time: the storages of each operation's results count from their birth until the last tensor (or graph)
lets go of them. What a kernel takes and gives back within one call is not seen, nor what Python itself needs.
"""
from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of the storages that are alive, while it is entered: now (`live`), and at most (`peak`).

    Args:
        known: tensors that exist already and count from the start.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._finalizers: list[weakref.finalize] = []
        for tensor in known:
            self._add(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        for finalizer in self._finalizers:
            finalizer.detach()

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += self._sizes[key]
            self.peak = max(self.peak, self.live)
            self._finalizers.append(weakref.finalize(storage, self._remove, key))

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


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
    with LiveBytes([*model.parameters(), *model.buffers(), *state, *inputs]) as live:
        step()
    return live.peak


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
