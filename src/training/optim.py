"""Parameter groups, optimizer and learning-rate schedule."""
from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from open_clip_train.scheduler import const_lr, const_lr_cooldown, cosine_lr
from torch import nn

from .errors import UserError


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices are decayed; gains, biases, normalisation and the logit scale are not (OpenCLIP's rule)."""
    decayed, free = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            exempt = p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
            (free if exempt else decayed).append(p)
    return [{"params": free, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def create_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW, or `timm/NAME` for any optimizer of timm.

    Raises:
        UserError: unknown optimizer, or nothing to train.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("Every parameter is locked, so there is nothing to train; drop --lock-image or --lock-text.")
    if args.opt.lower() == "adamw":
        groups = parameter_groups(model, args.wd)
        fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters()) or None
        return torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), eps=args.eps, fused=fused)
    if args.opt.lower().startswith("timm/"):
        from timm.optim import create_optimizer_v2

        options = {"lr": args.lr, "weight_decay": args.wd, "eps": args.eps, "momentum": args.momentum}
        if args.beta1 is not None:
            options["betas"] = (args.beta1, args.beta2)
        options = {k: v for k, v in options.items() if v is not None}
        try:
            return create_optimizer_v2(model, args.opt[len("timm/"):], **options)
        except (AssertionError, ValueError, TypeError) as error:
            raise UserError(f"timm cannot create the optimizer {args.opt!r} with these settings: {error}") from error
    raise UserError(f"Unknown optimizer {args.opt!r}; use adamw or timm/NAME.")


def create_schedule(
    optimizer: torch.optim.Optimizer, args: argparse.Namespace, steps_per_epoch: int
) -> Callable[[int], float] | None:
    """A function step -> lr that also sets the optimizer's groups; None with `--skip-scheduler` (lr stays `--lr`)."""
    if args.skip_scheduler:
        return None
    total = steps_per_epoch * args.epochs
    if args.lr_scheduler == "cosine":
        return cosine_lr(optimizer, args.lr, args.warmup, total)
    if args.lr_scheduler == "const":
        return const_lr(optimizer, args.lr, args.warmup, total)
    cooldown = steps_per_epoch * args.epochs_cooldown
    return const_lr_cooldown(
        optimizer, args.lr, args.warmup, total, cooldown, args.lr_cooldown_power, args.lr_cooldown_end
    )
