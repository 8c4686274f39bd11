"""From options to a model on the device: described, created, filled with weights, locked, and wrapped to be run."""
from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from open_clip_elip import identity as identities
from open_clip_elip import weights
from open_clip_elip.adapters import train_new
from open_clip_elip.identity import Identity, ModelError
from open_clip_elip.pretrained import Pretrained

from .distributed import Ranks
from .errors import UserError
from .options.model import LockingOptions, reduction_of
from .sharding import shard


class Built(NamedTuple):
    identity: Identity
    model: nn.Module
    transform: Callable
    tokenizer: Callable


@contextmanager
def told(flags: str = "--") -> Iterator[None]:
    """What a person can mend about a model, as the commands tell it; `flags` begin --model and --pretrained."""
    try:
        yield
    except ModelError as error:
        raise UserError(re.sub("--(?=model|pretrained)", flags, str(error))) from error


def build_model(
    options: Any, device: torch.device, *, image_tower: bool = False, filled: bool = True, task: str | None = None,
    answers: list[str] | None = None,
) -> Built:  # fmt: skip
    """The model of a run with its weights, its transform for evaluation and its tokenizer, or a UserError.

    options: `ModelOptions`, `ImageOptions` and `SpeedOptions`; `token_reduction`, `siglip` and adapters where there are
        any.
    image_tower: weights of an image tower alone will do, as fine-tuning leaves them.
    filled: False leaves the weights for a checkpoint to fill.
    task: of a fusion model, what it is for instead of pre-training. answers: that a METER model tells apart.
    """
    if device.type == "cpu" and options.precision != "fp32":
        logging.warning(f"Most CPUs are slow at --precision {options.precision}; fp32 may be three times as fast.")
    with told():
        identity, cached = identity_of(vars(options)), {"cache_dir": options.cache_dir}
        if adapter := getattr(options, "adapter", None):
            identity = identity.with_adapter(adapter, options.adapter_rank)
        if task is not None:
            more = {"task": task} | ({} if answers is None else {"answers": answers})
            identity = replace(identity, config=identity.config | more)
        tokenizer = identities.tokenizer(identity, options.cache_dir)
        if identity.family != "clip":
            text = identity.config["text_cfg"] | {"words": tokenizer.digest}
            identity = replace(identity, config=identity.config | {"text_cfg": text})
        if filled:
            source, own = weights.find(options.model, options.pretrained, **cached), options.pretrained_image
            if own and source is None and "timm_model_name" not in identity.config["vision_cfg"]:
                raise UserError(f"--pretrained-image needs an image tower of timm's; {options.model} has another one.")
            more = {"image_tower": image_tower, "pretrained_image": own, **cached}
            model = create_filled(identity, source, options.precision, device, **more)
        else:
            more = {"precision": options.precision, "device": device, **cached}
            model = identities.create(identity, pretrained_text=False, **more)
        transform = identities.transform(identity)
        start(model, options)
        if adapter and filled and source is None:
            train_new(model)
    if hasattr(model, "tower"):
        model.tower.shortcuts = options.shortcuts
    if identity.family != "clip":  # else it is compiled whole, see `wrap`; but these texts differ in length
        model.tower.compiles = getattr(options, "torchcompile", False)
        model.set_drop_path(getattr(options, "drop_path", 0.0))
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
    return Built(identity, model, transform, tokenizer)


def start(model: nn.Module, options: Any) -> None:
    """Fills parts of a fusion model with what `--start-image` and `--start-text` name."""
    for part in ("image", "text"):
        source = getattr(options, f"start_{part}", None)
        if source is None:
            continue
        if not hasattr(model, "own_names"):
            raise UserError(f"--start-{part} is for fusion models, not for {options.model}; leave it out.")
        from open_clip_elip.fusion import start as starts

        left = getattr(starts, f"start_{part}")(model, source)
        if left:
            logging.info(f"Not in {source}, so new: {len(left)} weights, {left[0]} for one.")


def lock(model: nn.Module, options: LockingOptions) -> None:
    """Takes towers, or their first layers, out of the training; a UserError if the model cannot."""
    if options.lock_image:
        model.lock_image_tower(options.lock_image_unlocked_groups, options.lock_image_freeze_bn_stats)
    if options.lock_text:
        try:
            model.lock_text_tower(options.lock_text_unlocked_layers, options.lock_text_freeze_layer_norm)
        except AssertionError as error:  # of OpenCLIP's own text tower
            raise UserError(f"{options.model} needs --lock-text-freeze-layer-norm with --lock-text.") from error


def check_reduces(model: nn.Module, name: str, alone: bool = True) -> None:
    """For `--vision-guided-reduction`: a UserError unless the model has token reduction, which (`alone`) can do without
    captions."""
    reduction = getattr(getattr(model, "tower", None), "reduction", None)
    if reduction is None:
        raise UserError(f"--vision-guided-reduction needs a model with token reduction; {name} has none.")
    if alone and not reduction.works_alone:
        raise UserError("--vision-guided-reduction is for elip, evit and tome, not for this model's method.")


def create_filled(
    identity: Identity,
    source: str | None,
    precision: str,
    device: torch.device,
    *,
    image_tower: bool = False,
    pretrained_image: bool = False,
    cache_dir: str | None = None,
) -> nn.Module:
    """A model with the weights of a file or URL; None: at random, but for text towers that bring their own.

    Raises ModelError as `identity.create` and `loading.load` do.
    """
    how = {"precision": precision, "device": device, "cache_dir": cache_dir}
    if source is None:
        return identities.create(identity, pretrained_image=pretrained_image, **how)
    content = weights.read(source)
    trained_as = checkpoint_identity(content)
    other = identities.differences(trained_as, identity) if trained_as is not None else []
    if other:
        logging.warning(f"{source} was trained with {', '.join(other)}; give the flags that say so to keep it.")
    model, _ = Pretrained(identity, source, content).create(image_tower=image_tower, **how)
    return model


def identity_of(options: Mapping[str, Any]) -> Identity:
    """The model that options name, of this command line or in an older checkpoint; raises ModelError."""
    changes = {name: options.get(name) for name in (*identities.CHANGES, "pretrained", "cache_dir")}
    if options.get("siglip"):
        changes |= {"init_logit_scale": math.log(10), "init_logit_bias": -10}  # the SigLIP paper's
    texts = None
    if options.get("text_reduction"):
        texts = {"rule": options["text_reduction"], "keep": options["text_keep"]}
    return identities.describe(
        options["model"], token_reduction=reduction_of(options), text_reduction=texts, **changes
    )


def checkpoint_identity(state: Mapping[str, Any]) -> Identity | None:
    """The model that a checkpoint of this trainer is of, but for LoRA, which is merged into the weights as they are
    read; None: the file does not say. ModelError: it is not known."""
    if (identity := weights.told_identity(state)) is not None:
        return identity
    config = state.get("config")
    if not isinstance(config, Mapping) or not isinstance(config.get("model"), str):
        return None
    config = dict(config)
    if "-ELIP-Adaptive" in config["model"] or config.get("token_reduction") == "adaptive":
        # A method that is gone. In evaluation it used all tokens, so the weights are read as those of a plain model.
        config |= {"model": config["model"].replace("-ELIP-Adaptive", "-ELIP"), "token_reduction": {"method": "none"}}
    return identity_of(config)


def check_words(trained: Mapping[str, Any], own: Mapping[str, Any], source: str) -> None:
    """UserError if both models' configurations tell vocabularies, and these differ: ids would mean other words."""
    words = [config.get("text_cfg", {}).get("words") for config in (trained, own)]
    if None not in words and words[0] != words[1]:
        raise UserError(f"{source} was trained on another vocabulary: give that in --text-tokenizer.")


def build_teacher(options: Any, student: Identity, device: torch.device) -> nn.Module | None:
    """The model to distil from, which sees the student's pictures and token ids; None without `--distill-model`.

    Raises UserError: there is no such model, or it takes other pictures or captions than the student.
    """
    if options.distill_model is None:
        return None
    with told("--distill-"):
        source = weights.find(options.distill_model, options.distill_pretrained, options.cache_dir)
        identity = identities.describe(options.distill_model, pretrained=options.distill_pretrained)
        for one, other in zip(_inputs(identity), _inputs(student), strict=True):
            if one != other:
                raise UserError(
                    f"The teacher {identity.name} takes {one}, and {student.name} {other}, but both are given the "
                    "same; choose another --distill-model, or change the student (--force-image-size, "
                    "--force-context-length)."
                )
        other = identities.differences(identity, student)
        if other:
            logging.warning(f"The teacher {identity.name} was made for {', '.join(other)}; it sees the student's.")
        teacher = create_filled(identity, source, options.precision, device, cache_dir=options.cache_dir)
    return teacher.eval().requires_grad_(False)


def _inputs(identity: Identity) -> tuple[str, str]:
    (height, width), text = identity.preprocess["size"], identity.config["text_cfg"]
    length, tokenizer = text.get("context_length", 77), text.get("hf_tokenizer_name") or "CLIP"
    return f"pictures of {height}x{width} pixels", f"captions of {length} tokens by {tokenizer}'s tokenizer"


def wrap(model: nn.Module, options: Any, ranks: Ranks, **ddp: Any) -> nn.Module:
    """The model as it is run: synchronised batch norm, DDP (with more options, `ddp`) or sharding, compiled."""
    runnable = model
    if ranks.world_size > 1 and options.use_bn_sync:
        runnable = nn.SyncBatchNorm.convert_sync_batchnorm(runnable)
    if options.fsdp:
        runnable = shard(runnable, ranks, options.precision)
    elif ranks.world_size > 1:
        device_ids = None if ranks.device.type == "cpu" else [ranks.device]
        ddp = {"static_graph": options.ddp_static_graph, "gradient_as_bucket_view": True, **ddp}
        runnable = DistributedDataParallel(runnable, device_ids=device_ids, **ddp)
    if options.torchcompile and not hasattr(model, "image_states"):
        if options.grad_checkpointing and ranks.world_size > 1:
            torch._dynamo.config.optimize_ddp = False  # its graph splits do not go together with checkpointing
        runnable = torch.compile(runnable)
    return runnable
