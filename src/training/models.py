"""From flags to a model: creation, token reduction, locking, and the wrappers it runs in."""
from __future__ import annotations

import argparse
import difflib
import logging
import math
import pickle
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import open_clip
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from open_clip_elip import with_shortcuts
from open_clip_elip.clip import SHORTCUT
from open_clip_elip.reduction import drop_alternatives

from . import checkpoint
from .distributed import Ranks
from .errors import UserError
from .options.params import reduction_overrides
from .sharding import shard


def build_model(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Callable, Callable, Callable]:
    """Model, training and evaluation transforms, tokenizer.

    Raises:
        UserError: unknown model, weights that do not fit, or a tower that cannot be reduced.
    """
    model_kwargs = {}
    if args.siglip:  # the SigLIP paper's start values
        model_kwargs |= {"init_logit_scale": math.log(10), "init_logit_bias": -10}
    reduction = reduction_config(args)
    if reduction is not None:
        model_kwargs["token_reduction"] = reduction
    replaced = replaces_weights(args.model, args.pretrained)
    size = args.force_image_size
    with creating(args.model, args.pretrained):
        model, preprocess_train, preprocess_val = open_clip.create_model_and_transforms(
            args.model,
            args.pretrained,
            precision=args.precision,
            device=device,
            force_quick_gelu=args.force_quick_gelu,
            force_custom_text=args.force_custom_text,
            force_patch_dropout=args.force_patch_dropout,
            force_image_size=size[0] if isinstance(size, (list, tuple)) and len(size) == 1 else size,
            force_context_length=args.force_context_length,
            image_mean=args.image_mean,
            image_std=args.image_std,
            image_interpolation=args.image_interpolation,
            image_resize_mode=args.image_resize_mode,
            aug_cfg=args.aug_cfg,
            pretrained_image=args.pretrained_image,
            cache_dir=args.cache_dir,
            load_weights=not replaced,
            output_dict=True,
            **model_kwargs,
        )
        tokenizer = open_clip.get_tokenizer(
            args.model, cache_dir=args.cache_dir, context_length=args.force_context_length
        )
    if replaced:
        load_replacement(model, args.pretrained)
    if args.full_tokens_last is not None and not hasattr(model, "reduction"):
        raise UserError(f"--full-tokens-last needs a model with token reduction; {args.model} has none.")
    model = with_shortcuts(model) if type(model) in SHORTCUT else model
    if hasattr(model, "tower"):
        model.tower.shortcuts = args.shortcuts
    if args.lock_image:
        model.lock_image_tower(
            unlocked_groups=args.lock_image_unlocked_groups, freeze_bn_stats=args.lock_image_freeze_bn_stats
        )
    if args.lock_text:
        model.lock_text_tower(
            unlocked_layers=args.lock_text_unlocked_layers, freeze_layer_norm=args.lock_text_freeze_layer_norm
        )
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    return model, preprocess_train, preprocess_val, tokenizer


def reduction_config(args: argparse.Namespace) -> dict | None:
    """The model's own token reduction with the flags on top; None leaves the model as its configuration says."""
    schema, identifier = open_clip.factory.parse_model_name(args.model)
    if schema is None:
        check_model_name(identifier.replace("/", "-"))
    overrides = reduction_overrides(args)
    if args.token_reduction is None and not overrides:
        return None
    if args.token_reduction == "none":  # the baseline of a recipe: its other reduction options no longer matter
        return {"method": "none"}
    own = own_reduction(args.model)
    method = args.token_reduction or own.get("method")
    if method is None:
        raise UserError(
            f"{args.model} has no token reduction for {', '.join(overrides)} to change; "
            "add --token-reduction elip, or another."
        )
    base = dict(own) if own.get("method") == method else {}
    return {**drop_alternatives(base, overrides), "method": method, **overrides}


def replaces_weights(model: str, pretrained: str | None) -> bool:
    """Whether `--pretrained` is a file in the place of the weights that a model brings along (`local-dir:`, `hf-hub:`).

    open_clip would take the model's own. They are then left out, and the file is loaded by `load_replacement`.

    Raises:
        UserError: it is no file.
    """
    if ":" not in model or not pretrained:
        return False
    if not Path(pretrained).is_file():
        raise UserError(
            f"--pretrained {pretrained} is not a file, and {model} brings weights of its own; correct the path, or "
            "leave out --pretrained."
        )
    return True


def load_replacement(model: nn.Module, pretrained: str) -> None:
    state = checkpoint.load(pretrained)
    checkpoint.load_weights(model, state.get("state_dict", state), pretrained)


def own_reduction(name: str) -> dict:
    """The token reduction in a model's own configuration; {} if it has none."""
    if open_clip.factory.parse_model_name(name)[0] is None:
        name = name.replace("/", "-")
    with creating(name):
        return (open_clip.get_model_config(name) or {}).get("token_reduction", {})


def check_model_name(name: str) -> None:
    known = open_clip.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "open_clip.list_models() lists what there is."
        raise UserError(f"There is no model named {name!r}; {hint}")


def build_teacher(args: argparse.Namespace, device: torch.device) -> nn.Module | None:
    if args.distill_model is None:
        return None
    check_model_name(args.distill_model)
    with creating(args.distill_model, args.distill_pretrained):
        teacher, _, _ = open_clip.create_model_and_transforms(
            args.distill_model, args.distill_pretrained, device=device, precision=args.precision,
            output_dict=True, cache_dir=args.cache_dir,
        )
    teacher = with_shortcuts(teacher) if type(teacher) in SHORTCUT else teacher
    return teacher.eval().requires_grad_(False)


@contextmanager
def creating(name: str, weights: str | None = None):
    """Turns what open_clip raises while it builds a model into one sentence, and keeps its chatter out of the log."""
    root = logging.getLogger()
    level = root.level
    if level > logging.DEBUG:
        root.setLevel(logging.ERROR)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # from AssertionError to UnpicklingError, according to what is wrong with the file
        text, source = str(error), weights or name
        sizes = re.findall(
            r"size mismatch for (\S+): .*?shape torch\.Size\(\[(.*?)\]\).*?is torch\.Size\(\[(.*?)\]\)", text
        )
        if sizes:
            key, there, here = sizes[0]
            more = f" (and {len(sizes) - 1} more differences)" if len(sizes) > 1 else ""
            raise UserError(
                f"{source} does not fit {name}: {key} is [{there}] there and [{here}] in the model{more}; "
                "check --model and --pretrained."
            ) from error
        first = " ".join(text.split())[:300] or type(error).__name__
        if isinstance(error, (pickle.UnpicklingError, EOFError, IndexError, KeyError)):
            raise UserError(f"{source} cannot be read as weights for {name} ({type(error).__name__}).") from error
        unloaded = f", or {weights} not loaded" if weights else ""
        raise UserError(f"The model {name} cannot be created{unloaded}: {first}") from error
    finally:
        root.setLevel(level)


def wrap(model: nn.Module, args: argparse.Namespace, ranks: Ranks) -> nn.Module:
    """The model as it is run: synchronised batch norm, DDP or sharding (in place), compilation."""
    runnable = model
    if ranks.world_size > 1 and args.use_bn_sync:
        runnable = nn.SyncBatchNorm.convert_sync_batchnorm(runnable)
    if args.fsdp:
        runnable = shard(runnable, ranks, args.precision)
    elif ranks.world_size > 1:
        runnable = DistributedDataParallel(
            runnable,
            device_ids=None if ranks.device.type == "cpu" else [ranks.device],
            static_graph=args.ddp_static_graph,
            gradient_as_bucket_view=True,
        )
    if args.torchcompile:
        if args.grad_checkpointing and ranks.world_size > 1:
            torch._dynamo.config.optimize_ddp = False  # its graph splits do not go together with checkpointing
        runnable = torch.compile(runnable)
    return runnable
