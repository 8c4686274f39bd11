"""Fully sharded data parallelism (FSDP2): weights, gradients and optimizer states are split over the processes.

A sharded model trains as under DistributedDataParallel: the same autocast, gradients averaged over the processes, the
same checkpoints. Each function here also takes a model that is not sharded, so that the trainer need not ask.
"""
from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from .distributed import Ranks
from .errors import UserError


def shard(model: nn.Module, ranks: Ranks, precision: str) -> nn.Module:
    """Shards `model` in place, each layer of its towers by itself, the rest together; one process changes nothing.

    All processes start from rank 0's weights. Parameters are replaced, so the optimizer is created afterwards; those of
    one element, such as the logit scale, stay whole on every process, and their gradient is averaged as it arrives.
    There is no mixed-precision policy: autocast alone decides what is computed in half precision, as under DDP.
    UserError: the model's batch norm or number formats do not go with sharding.
    """
    if ranks.world_size == 1:
        return model
    if any(isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        raise UserError("With --fsdp the processes' batch norm statistics would differ; add --use-bn-sync.")
    if len({p.dtype for p in model.parameters() if p.requires_grad and p.numel() > 1}) > 1:
        what = f"--fsdp cannot split weights of several number formats, as with --precision {precision}"
        raise UserError(f"{what}; use --precision amp_bf16 or pure_bf16.")
    stacks = list(_stacks(model))
    for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
        dist.broadcast(tensor.detach(), src=0)

    scalars = {p for p in model.parameters() if p.numel() == 1}
    for p in scalars:
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(_average_gradient)
    options = {"mesh": init_device_mesh(ranks.device.type, (ranks.world_size,)), "ignored_params": scalars}
    for stack in stacks:
        for layer in stack:
            fully_shard(layer, **options)
    fully_shard(model, **options)
    # The backward pass would fetch ahead in the order of all forward calls so far, with ELIP's scoring passes and
    # evaluations among them, which need not be the same on every process; so the order is told.
    model.set_modules_to_backward_prefetch([stack[-1] for stack in stacks] or [model])
    for stack in stacks:
        for layer, earlier in zip(stack, [model, *stack], strict=False):
            layer.set_modules_to_backward_prefetch([earlier])
    if dist.get_backend() == "gloo":  # in torch 2.8 it adds up where it is asked for the mean
        for module in _sharded_modules(model):
            module.set_force_sum_reduction_for_comms(True)
    # The first module that runs becomes the root, which in an evaluation may be a layer; so that is settled here.
    model.settle_root = lambda: None
    register_fsdp_forward_method(model, "settle_root")
    model.settle_root()
    del model.settle_root
    model.reshard()
    return model


def check_optimizer(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Tries two steps on copies of a few split parameters, if there are any. A collective call then.

    UserError, which calls the optimizer `name`: it does not work on them, or keeps a state that could not be resumed.
    """
    if not any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"]):
        return
    trial = copy.copy(optimizer)
    trial.state, trial.param_groups = defaultdict(dict), []
    for group in optimizer.param_groups:
        copies = [nn.Parameter(p.detach().clone()) for p in {p.ndim: p for p in group["params"]}.values()]
        for p in copies:
            p.grad = p.detach().clone()
        trial.param_groups.append({**group, "params": copies})
    try:
        trial.step()
        trial.step()
        kept = [(p, v) for p, values in trial.state.items() for v in values.values() if isinstance(v, Tensor)]
        if any(value.ndim > 0 and value.shape != p.shape for p, value in kept):
            raise ValueError("It keeps a state that cannot be split.")
    except Exception as error:  # of any kind, from the depths of torch
        raise UserError(f"--opt {name} does not work on split weights; use adamw, or leave out --fsdp.") from error


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Context in which backward passes add up gradients on each process, to be averaged by the first one after it."""
    model = _bare(model)
    sharded = isinstance(model, FSDPModule)
    if sharded:
        model.set_requires_gradient_sync(False)
    with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
        yield
    if sharded:
        model.set_requires_gradient_sync(True)


@contextmanager
def gathered(model: nn.Module) -> Iterator[nn.Module]:
    """Context in which every process holds all weights whole, for evaluation only; a collective call.

    Any method of the model can be called there, and not equally often on all processes, which sharded layers require.
    """
    root = _bare(model)
    modules = _sharded_modules(root)
    for module in modules:
        module.reshard()  # what a forward pass left whole may be out of date
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield model
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(module is not root, recurse=False)


def unscale(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """`scaler.unscale_(optimizer)`; an infinite gradient on one process counts on all. A collective call if sharded."""
    groups = optimizer.param_groups
    # torch takes the layout of all gradients from the first one, which must not be a whole one then.
    parameters = sorted((p for group in groups for p in group["params"]), key=lambda p: not isinstance(p, DTensor))
    optimizer.param_groups = [{"params": parameters}]
    scaler.unscale_(optimizer)
    optimizer.param_groups = groups


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """The norm of all gradients together, (), before they are scaled down to `max_norm` if one is given and exceeded.

    It is the same on every process; a collective call for a sharded model.
    """
    parameters = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in parameters]
    norm = nn.utils.get_total_norm(gradients)
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        norm = norm.full_tensor()
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def full_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """State dicts of model and optimizer as if nothing were sharded: on rank 0 on the CPU, on others empty. Collective.

    Of a model that is not sharded, the state dicts as they are.
    """
    states = model.state_dict(), optimizer.state_dict()
    if not isinstance(_bare(model), FSDPModule):
        return states
    main = dist.get_rank() == 0

    def whole(value: Any) -> Any:
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if isinstance(value, Tensor):
            return value.detach().to("cpu", copy=True) if main else None  # the others drop it at once
        return value

    states = tree_map(whole, tuple(map(dict, states)))
    return states if main else ({}, {})


def load_full_state_dict(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, weights: dict[str, Any], state: dict[str, Any] | None
) -> None:
    """Loads what `full_state_dict` gave, of a sharded model or another; each process passes it whole.

    Without an optimizer, the weights only. RuntimeError, ValueError: the weights, the optimizer's state do not fit.
    """
    own = model.state_dict()
    model.load_state_dict({name: shard_like(own.get(name), value) for name, value in weights.items()})
    if optimizer is None:
        return
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    numbers = (i for group in state["param_groups"] for i in group["params"])
    owner = dict(zip(numbers, parameters, strict=False))  # other numbers are refused by load_state_dict below
    parts = {i: {k: shard_like(owner.get(i), v) for k, v in values.items()} for i, values in state["state"].items()}
    optimizer.load_state_dict({**state, "state": parts})


def _stacks(module: nn.Module) -> Iterator[list[nn.Module]]:
    """The outermost sequences of layers of one kind: a transformer's blocks, the stages of a ResNet."""
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        if len(module) > 1 and len({type(layer) for layer in module}) == 1 and any(True for _ in module.parameters()):
            yield list(module)
            return
    for child in module.children():
        yield from _stacks(child)


def _average_gradient(p: nn.Parameter) -> None:
    dist.all_reduce(p.grad)
    p.grad /= dist.get_world_size()


def _sharded_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _bare(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # out of torch.compile


def shard_like(own: Any, value: Any) -> Any:
    """This process's part of `value` if it is a tensor that belongs to the sharded tensor `own`, else itself."""
    if not isinstance(own, DTensor) or not isinstance(value, Tensor) or value.shape != own.shape:
        return value
    part = distribute_tensor(value.detach(), own.device_mesh, own.placements, src_data_rank=None)
    return part.clone()  # a part that shares the whole's memory would keep all of it alive
