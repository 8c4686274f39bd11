"""Parameter groups, optimizer and learning-rate schedule."""
from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from open_clip.transformer import TextTransformer, VisionTransformer
from open_clip_train.scheduler import const_lr, const_lr_cooldown, cosine_lr
from torch import nn

from .errors import UserError

_EMBEDDINGS = ("conv1", "class_embedding", "ln_pre", "token_embedding", "positional_embedding", "cls_emb")


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float | None = None) -> list[dict]:
    """Matrices are decayed; gains, biases, normalisation and the logit scale are not (OpenCLIP's rule).

    Without `layer_decay` the groups are OpenCLIP's two, in its order, so its optimizer states load. With it there are
    two for each distance from the heads, nearest first, with `lr_scale` = layer_decay ** distance.
    """
    distances = defaultdict(int) if layer_decay is None else distances_from_head(model)
    groups: dict[int, tuple[list, list]] = defaultdict(lambda: ([], []))
    for name, p in model.named_parameters():
        if p.requires_grad:
            exempt = p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
            groups[distances[name]][0 if exempt else 1].append(p)
    if layer_decay is None:
        free, decayed = groups[0]
        return [{"params": free, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]
    return [
        {"params": params, "weight_decay": decay, "lr_scale": layer_decay**distance}
        for distance, pair in sorted(groups.items())
        for params, decay in zip(pair, (0.0, weight_decay), strict=True)
        if params
    ]


def distances_from_head(model: nn.Module) -> dict[str, int]:
    """Layers between each parameter and the head of its tower, by parameter name.

    0 for what comes after the last block and for what is in no tower (logit scale and bias, a classifier's head); 1 for
    the last block, L for the first of L, L + 1 for the embeddings. UserError: a tower is not OpenCLIP's own.
    """
    # open_clip.CLIP holds the parts of its text tower itself; a model for images alone has none.
    text = getattr(model, "text", model if hasattr(model, "transformer") else None)
    for tower in (model.visual, text):
        if tower not in (model, None) and not isinstance(tower, (VisionTransformer, TextTransformer)):
            what = f"but this model has a {type(tower).__name__}"
            raise UserError(f"--layer-decay needs OpenCLIP's own transformers, {what}; leave it out.")
    distances = {}
    for name, _ in model.named_parameters():
        tower = model.visual if name.startswith("visual.") else text
        layers = 0 if tower is None else len(tower.transformer.resblocks)
        block = re.search(r"\bresblocks\.(\d+)\.", name)
        embeds = name.removeprefix("visual.").removeprefix("text.").split(".")[0] in _EMBEDDINGS
        distances[name] = layers - int(block[1]) if block else layers + 1 if embeds else 0
    return distances


def create_optimizer(model_or_groups: nn.Module | list[dict], options: Any) -> torch.optim.Optimizer:
    """AdamW, or `timm/NAME` for any optimizer of timm.

    model_or_groups: a model, of which `parameter_groups` (or timm's own, as usual with its optimizers) are taken, or a
    task's own groups, with `weight_decay` and perhaps `lr_scale` each. UserError: it cannot be made, or has no work.
    """
    groups, layer_decay, timm = model_or_groups, options.layer_decay, options.opt.lower() != "adamw"
    if layer_decay is not None and options.lr is None:
        raise UserError("--layer-decay scales the learning rate, so it needs --lr.")
    if isinstance(groups, nn.Module) and (layer_decay is not None or not timm):
        groups = parameter_groups(groups, options.wd, layer_decay)
    own = groups.parameters() if isinstance(groups, nn.Module) else (p for group in groups for p in group["params"])
    parameters = list(own)
    if not any(p.requires_grad for p in parameters):
        raise UserError("Every parameter is locked, so there is nothing to train; drop --lock-image or --lock-text.")
    if timm:
        optimizer = _timm_optimizer(groups, options)
    else:
        betas, fused = (options.beta1, options.beta2), all(p.device.type in ("cpu", "cuda") for p in parameters) or None
        optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=betas, eps=options.eps, fused=fused)
    for group in optimizer.param_groups:
        group["lr"] *= group.get("lr_scale", 1)
    return optimizer


def _timm_optimizer(model_or_groups: nn.Module | list[dict], options: Any) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2

    given = {"lr": options.lr, "weight_decay": options.wd, "eps": options.eps, "momentum": options.momentum}
    given["betas"] = None if options.beta1 is None else (options.beta1, options.beta2)
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return create_optimizer_v2(model_or_groups, options.opt[len("timm/"):], **given)
    except (AssertionError, IndexError, ValueError, TypeError) as error:
        raise UserError(f"timm cannot create the optimizer {options.opt!r} with these settings: {error}") from error


def create_schedule(
    optimizer: torch.optim.Optimizer, options: Any, *, total_steps: float, warmup_steps: float,
    cooldown_steps: float | None = None, epoch_steps: int | None = None,
) -> Callable[[float], float] | None:  # fmt: skip
    """A function step -> lr that also sets the optimizer's groups; None with `--skip-scheduler` (lr stays `--lr`).

    The lengths and the step are counted in steps of one fixed global batch and need not be whole: a run that goes on
    with another batch size keeps its schedule by giving samples seen / that batch. For whole steps the values are those
    of OpenCLIP's schedules; steps beyond `total_steps` get the last one. A group with `lr_scale` gets lr * lr_scale;
    what is returned is lr. `cooldown_steps`: at the end, for const-cooldown. `epoch_steps`: of one, for epoch-...
    """
    if options.skip_scheduler:
        return None
    lengths = (optimizer, options.lr, warmup_steps, total_steps)
    if options.lr_scheduler == "linear":
        set_lr = partial(linear, peak=options.lr, warmup=warmup_steps, total=total_steps)
    elif options.lr_scheduler == "const-cooldown":
        set_lr = const_lr_cooldown(*lengths, cooldown_steps, options.lr_cooldown_power, options.lr_cooldown_end)
    elif options.lr_scheduler.startswith("epoch-"):
        shared = {"peak": options.lr, "start": options.lr_start, "end": options.lr_end, "epoch": epoch_steps}
        more = {"epochs": math.ceil(total_steps / epoch_steps)}
        by_epoch = epoch_cosine
        if options.lr_scheduler == "epoch-decay":
            by_epoch, more = epoch_decay, {"factor": options.lr_decay}
        set_lr = partial(by_epoch, warmup=warmup_steps, **shared, **more)
    else:
        set_lr = {"cosine": cosine_lr, "const": const_lr}[options.lr_scheduler](*lengths)
    scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]  # the option's, whatever is resumed

    def schedule(step: float) -> float:
        # OpenCLIP's warm-up gives --lr at warmup - 1 and would go beyond it at a fraction of a step later.
        warms_up = step < warmup_steps and not options.lr_scheduler.startswith(("epoch-", "linear"))
        lr = set_lr(min(step, warmup_steps - 1) if warms_up else min(step, total_steps))
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = lr * scale
        return lr

    return schedule


def linear(step: float, *, peak: float, warmup: float, total: float) -> float:
    """METER's learning rate: from 0, which is that of the first step, to `peak` in the warm-up, then to 0 again."""
    return peak * (step / warmup if step < warmup else max(0.0, (total - step) / max(1, total - warmup)))


def epoch_cosine(
    step: float, *, peak: float, start: float, end: float, warmup: float, epoch: int, epochs: int
) -> float:
    """ALBEF's learning rate: a warm-up in steps of 100 updates, then a cosine in steps of an epoch.

    Args:
        step: updates that are done.
        peak, start, end: rates after the warm-up, before it, and that the cosine falls to.
        warmup: updates that the warm-up takes.
        epoch, epochs: updates in an epoch; epochs of the run.
    """
    if step <= warmup:  # the first rise comes after the 101st update
        return start + (peak - start) * (max(0, step - 1) // 100) / max(1, warmup / 100)
    return end + (peak - end) * (1 + math.cos(math.pi * (step // epoch) / epochs)) / 2


def epoch_decay(
    step: float, *, peak: float, start: float, end: float, warmup: float, epoch: int, factor: float
) -> float:
    """BLIP's learning rate: a linear warm-up, then multiplied by `factor` from epoch to epoch, down to `end`.

    Args:
        others: see `epoch_cosine`.
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    return max(end, peak * factor ** (step // epoch))
