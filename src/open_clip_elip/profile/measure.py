"""A training step of one model, and what steps take: time, the bytes that one keeps, and the most it needs at once."""
from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from statistics import median, quantiles
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from open_clip import get_input_dtype
from open_clip.loss import ClipLoss, CoCaLoss, SigLipLoss
from open_clip_train.precision import get_autocast
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from ..text import TextParts

LOSS_BYTES = 4 * 4  # times pairs**2: the logits and their log-softmax, both ways, in float32


class TrainStep:
    """Forward, loss, backward and optimizer of a model in training mode, in one of OpenCLIP's precisions, on one batch
    that is on the device already: images (B, 3, H, W), and token ids (B, T) or cut ones."""

    def __init__(self, model: nn.Module, image: Tensor, text: Tensor | TextParts, precision: str = "fp32"):
        self.model, self.runnable, self.precision = model, model, precision
        self.set_batch(image, text)
        self.autocast = get_autocast(precision, device_type=image.device.type)
        self.scaler = torch.amp.GradScaler(image.device.type, enabled=precision == "amp")
        # A learning rate so small that weights at random and noise for images stay finite.
        self.optimizer = AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, fused=True)

    def set_batch(self, image: Tensor, text: Tensor | TextParts) -> None:
        self.batch = image.to(get_input_dtype(self.precision)), text

    def compile(self) -> None:
        self.runnable = torch.compile(self.model)

    def losses(self) -> dict[str, Tensor]:
        if hasattr(self.model, "text_decoder"):
            loss = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
        else:
            loss = ClipLoss() if getattr(self.model, "logit_bias", None) is None else SigLipLoss()
        return loss(**self.runnable(*self.batch), output_dict=True)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = sum(self.losses().values())
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.end()

    @torch.no_grad()
    def end(self) -> None:
        self.model.logit_scale.clamp_(0, math.log(100))


# ---------------------------------------------------------------------- memory


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts in `bytes`, while it is entered, all storages that are kept for a backward pass, each once. The parameters
    and buffers of `model`, and autocast's copies of them, are left out: what remains grows with the batch."""

    def __init__(self, model: nn.Module):
        super().__init__(self._pack, lambda tensor: tensor)
        self.bytes = 0
        self._parameters = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
        self._seen: dict[int, weakref.ref] = {}  # not held, so that a step under this hook needs no more memory

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


def saved_bytes(step: TrainStep) -> int:
    """What `SavedBytes` finds in a step, of which the forward pass and the loss are run; on shapes (the device "meta")
    what it would find on a CPU."""
    saved = SavedBytes(getattr(step, "resident", step.model))
    with torch.random.fork_rng(devices=[]), patch.object(F, "scaled_dot_product_attention", _attend), saved:
        step.losses()
    return saved.bytes


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, attend: Callable[..., Tensor] = F.scaled_dot_product_attention, **more: Any,
) -> Tensor:  # fmt: skip
    """torch's, which knows no fused kernel for shapes: the one that these would have on a CPU."""
    tensors, fused = (query, key, value, attn_mask), SDPBackend.FLASH_ATTENTION.value
    real = (one if one is None else torch.empty_strided(one.shape, one.stride(), dtype=one.dtype) for one in tensors)
    if not query.is_meta or torch._fused_sdp_choice(*real, dropout_p, is_causal, **more) != fused:
        return attend(*tensors, dropout_p, is_causal, **more)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype, device="meta")
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=more.get("scale"))[0]


def peak_bytes(step: TrainStep, inputs: Any) -> int:
    """The most bytes in use at once in a step, as the device's allocator tells it: parameters, gradients, optimizer
    state and inputs (tensors, in whatever they lie) included, and nothing else that was there before. A step is a
    callable with a model (or more, in a module `resident`) and an optimizer, which begins by setting the gradients to
    None."""
    model, optimizer = getattr(step, "resident", step.model), step.optimizer
    if not optimizer.state:  # is made by a step on gradients that are zero
        for p in (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad):
            p.grad = torch.zeros_like(p)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    there = tree_leaves([[*model.parameters()], [*model.buffers()], [*optimizer.state.values()], inputs])
    storages = [one.untyped_storage() for one in there if isinstance(one, Tensor)]
    known = sum({storage._cdata: storage.nbytes() for storage in storages}.values())
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return known + torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return known + max(accumulate((event.nbytes() for event in events), initial=0))


def largest_batch(limit: float, small: tuple[int, int], large: tuple[int, int], saved: float = 0.0) -> int:
    """The largest batch whose peak stays within `limit` bytes (0: not even one pair), by a straight line through two
    measurements, (pairs, peak bytes) each, with `LOSS_BYTES` on top. The line rises by no less than the bytes that a
    pair keeps for the backward pass, `saved`: at batches so small that the optimizer's step needs the most memory, the
    peaks alone would tell too little."""
    (n, a), (m, b) = ((pairs, peak - LOSS_BYTES * pairs**2) for pairs, peak in (small, large))
    slope = max((b - a) / (m - n), saved)
    left = max(0.0, limit - (b - slope * m))
    return int(((slope**2 + 4 * LOSS_BYTES * left) ** 0.5 - slope) / (2 * LOSS_BYTES))


# ---------------------------------------------------------------------- time


def in_turn(
    functions: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    rounds: int,
    warmup: int = 1,
    repeat: int = 1,
    seconds: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds a call of each function, `repeat` calls in a measurement, one measurement a round. All take turns, every
    other round in reverse order, so that what disturbs the machine disturbs all of them alike. `warmup` rounds before
    that are not told. No round begins, but for the first two, that is not likely to end within `seconds`."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    begin = time.perf_counter()
    longest, found = 0.0, {name: [] for name in functions}
    for i in range(warmup + rounds):
        start = time.perf_counter()
        if i >= warmup + 2 and start - begin + longest > seconds:
            break
        for name in list(functions)[:: 1 if i % 2 == 0 else -1]:
            wait(device)
            called = time.perf_counter()
            for _ in range(repeat):
                functions[name]()
            wait(device)
            if i >= warmup:
                found[name].append((time.perf_counter() - called) / repeat)
        longest = max(longest, time.perf_counter() - start)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, first and third quartile of repeated measurements, and how many there were."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median(values), "low": low, "high": high, "count": len(values)}


def ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """value / reference of each round: what both met in it cancels."""
    return [value / base for value, base in zip(values, reference, strict=True)]
