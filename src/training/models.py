"""From options to a model on the device: described, created, filled with weights, locked, and wrapped to be run."""
from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from open_clip_elip import identity as identities
from open_clip_elip import weights
from open_clip_elip.identity import Identity, ModelError

from .distributed import Ranks
from .errors import UserError
from .options.model import LockingOptions
from .sharding import shard

SIGLIP_START = {"init_logit_scale": math.log(10), "init_logit_bias": -10}  # the SigLIP paper's
CHANGES = (
    "force_quick_gelu", "force_custom_text", "force_patch_dropout", "force_image_size", "force_context_length",
    "image_mean", "image_std", "image_interpolation", "image_resize_mode", "cache_dir",
)  # fmt: skip
# Options of the token reduction as older versions' flags had them, under the names of today.
_OLD_FLAGS = {
    "stage_depths": "depths", "reduce_layers": "layers", "merge_per_layer": "r",
    **{name: name for name in (
        "keep_ratio", "keep_count", "lam", "merge", "text_scale", "scoring_depth", "spread", "keep_rate", "prop_attn",
        "target_rrt",
    )},
}  # fmt: skip


class Built(NamedTuple):
    """What `build_model` makes; the transform is that of evaluation."""

    identity: Identity
    model: nn.Module
    transform: Callable
    tokenizer: Callable


@contextmanager
def told() -> Iterator[None]:
    """What a person can mend about a model, as the commands tell it."""
    try:
        yield
    except ModelError as error:
        raise UserError(str(error)) from error


def build_model(options: Any, device: torch.device, *, image_tower: bool = False) -> Built:
    """The model of a run with its weights, its transform and its tokenizer.

    Args:
        options: `ModelOptions`, `ImageOptions` and `SpeedOptions`; `token_reduction` and `siglip` where there are any.
        image_tower: weights of an image tower alone will do, as fine-tuning leaves them.

    Raises:
        UserError: unknown model, weights that do not fit, or a tower that cannot be reduced.
    """
    with told():
        source = weights.find(options.model, options.pretrained, options.cache_dir)
        identity = identity_of(vars(options))
        model, _ = create_filled(
            identity, source, options.precision, device, image_tower=image_tower,
            pretrained_image=options.pretrained_image, cache_dir=options.cache_dir,
        )  # fmt: skip
        transform = identities.transform(identity)
        tokenizer = identities.tokenizer(identity, options.cache_dir)
    if hasattr(model, "tower"):
        model.tower.shortcuts = options.shortcuts
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
    return Built(identity, model, transform, tokenizer)


def lock(model: nn.Module, options: LockingOptions) -> None:
    """Takes towers, or their first layers, out of the training; a UserError if the model cannot."""
    if options.lock_image:
        model.lock_image_tower(options.lock_image_unlocked_groups, options.lock_image_freeze_bn_stats)
    if options.lock_text:
        try:
            model.lock_text_tower(options.lock_text_unlocked_layers, options.lock_text_freeze_layer_norm)
        except AssertionError as error:  # of OpenCLIP's own text tower
            raise UserError(f"{options.model} needs --lock-text-freeze-layer-norm with --lock-text.") from error


def check_works_alone(model: nn.Module, name: str) -> None:
    """For `--vision-guided-reduction`: a UserError unless the model's token reduction can do without captions."""
    reduction = getattr(model, "reduction", None)
    if reduction is None:
        raise UserError(f"--vision-guided-reduction needs a model with token reduction; {name} has none.")
    if not reduction.works_alone:
        raise UserError("--vision-guided-reduction is for elip, evit and tome, not for this model's method.")


def create_filled(
    identity: Identity,
    source: str | None,
    precision: str,
    device: torch.device,
    *,
    content: Mapping[str, Any] | None = None,
    image_tower: bool = False,
    pretrained_image: bool = False,
    cache_dir: str | None = None,
) -> tuple[nn.Module, weights.Report | None]:
    """A model with the weights of a file or URL; None: at random, but for text towers that bring their own.

    Args:
        content: of the file, if it was read already.

    Raises:
        ModelError: see `identity.create` and `weights.load`.
    """
    model = identities.create(
        identity, precision=precision, device=device, pretrained_image=pretrained_image and source is None,
        pretrained_text=source is None, cache_dir=cache_dir,
    )  # fmt: skip
    if source is None:
        return model, None
    if content is None and not source.endswith(weights.NUMPY):
        content = weights.read(source)
        trained_as = checkpoint_identity(content)
        other = identities.differences(trained_as, identity) if trained_as is not None else []
        if other:
            logging.warning(f"{source} was trained with {', '.join(other)}; give the flags that say so to keep it.")
    report = weights.load(
        model, source if content is None else content, name=identity.name, label=source, image_tower=image_tower
    )
    for sentence in report.sentences():
        logging.warning(sentence)
    return model, report


def identity_of(options: Mapping[str, Any]) -> Identity:
    """The model that options name, of this command line or in an older checkpoint; raises ModelError."""
    changes = {name: options[name] for name in CHANGES if options.get(name) is not None}
    if options.get("siglip"):
        changes |= SIGLIP_START
    reduction = token_reduction(options)
    return identities.describe(
        options["model"], pretrained=options.get("pretrained"), token_reduction=reduction, **changes
    )


def token_reduction(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """{"method": ..., options}, as it is or as older versions had it: a method's name and a flag for each option."""
    given = options.get("token_reduction")
    if isinstance(given, dict):
        return given
    found = {} if given is None else {"method": given}
    found |= {new: options[old] for old, new in _OLD_FLAGS.items() if options.get(old) is not None}
    return found or None


def described_reduction(options: Any) -> dict[str, Any]:
    """The token reduction that options name, or else the model's own, or else ELIP's."""
    with told():
        own = identities.describe(options.model, cache_dir=options.cache_dir).token_reduction or {"method": "elip"}
    return {"method": own["method"], **(token_reduction(vars(options)) or {})}


def checkpoint_identity(state: Mapping[str, Any]) -> Identity | None:
    """The model that a checkpoint of this trainer is of; None: the file does not say.

    Raises:
        ModelError: it is of a model that is no longer known.
    """
    if isinstance(state.get("model"), Mapping) and "family" in state["model"]:
        return Identity.from_dict(dict(state["model"]))
    config = state.get("config")
    if not isinstance(config, Mapping) or not isinstance(config.get("model"), str):
        return None
    config = dict(config)
    if "-ELIP-Adaptive" in config["model"] or config.get("token_reduction") == "adaptive":
        # A method that is gone. In evaluation it used all tokens, so the weights are read as those of a plain model.
        config |= {"model": config["model"].replace("-ELIP-Adaptive", "-ELIP"), "token_reduction": {"method": "none"}}
    return identity_of(config)


def build_teacher(options: Any, student: Identity, device: torch.device) -> nn.Module | None:
    """The model to distil from, which sees the student's pictures and token ids; None without `--distill-model`.

    Raises:
        UserError: there is no such model, or it takes other pictures or captions than the student.
    """
    if options.distill_model is None:
        return None
    with told():
        source = weights.find(options.distill_model, options.distill_pretrained, options.cache_dir)
        identity = identities.describe(options.distill_model, pretrained=options.distill_pretrained)
        for what, one, other in zip(("pictures of", "captions of"), _inputs(identity), _inputs(student), strict=True):
            if one != other:
                raise UserError(
                    f"The teacher {identity.name} takes {what} {one}, and {student.name} {other}, but both are given "
                    "the same; choose another --distill-model, or change the student (--force-image-size, "
                    "--force-context-length)."
                )
        other = identities.differences(identity, student)
        if other:
            logging.warning(f"The teacher {identity.name} was made for {', '.join(other)}; it sees the student's.")
        teacher, _ = create_filled(identity, source, options.precision, device, cache_dir=options.cache_dir)
    return teacher.eval().requires_grad_(False)


def _inputs(identity: Identity) -> tuple[str, str]:
    height, width = identity.preprocess["size"]
    text = identity.config["text_cfg"]
    tokens = f"{text.get('context_length', 77)} tokens by {text.get('hf_tokenizer_name') or 'CLIP'}'s tokenizer"
    return f"{height}x{width} pixels", tokens


def wrap(model: nn.Module, options: Any, ranks: Ranks, **ddp: Any) -> nn.Module:
    """The model as it is run: synchronised batch norm, DDP or sharding (in place), compilation.

    Args:
        ddp: further options of DistributedDataParallel, which a task may need.
    """
    runnable = model
    if ranks.world_size > 1 and options.use_bn_sync:
        runnable = nn.SyncBatchNorm.convert_sync_batchnorm(runnable)
    if options.fsdp:
        runnable = shard(runnable, ranks, options.precision)
    elif ranks.world_size > 1:
        device_ids = None if ranks.device.type == "cpu" else [ranks.device]
        ddp = {"static_graph": options.ddp_static_graph, "gradient_as_bucket_view": True, **ddp}
        runnable = DistributedDataParallel(runnable, device_ids=device_ids, **ddp)
    if options.torchcompile:
        if options.grad_checkpointing and ranks.world_size > 1:
            torch._dynamo.config.optimize_ddp = False  # its graph splits do not go together with checkpointing
        runnable = torch.compile(runnable)
    return runnable
