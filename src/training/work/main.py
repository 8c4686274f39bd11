"""The work of `training.main`."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from open_clip import AugmentationCfg
from PIL import Image
from torch import nn

from open_clip_elip import identity as identities

from ..data import ValData, build_train_data, build_val_data
from ..data.false_pairs import FalsePairs
from ..data.samples import PairEncoding
from ..data.transforms import with_decoding
from ..distributed import Ranks, seed_everything
from ..errors import UserError, reason
from ..evaluation.kept import KeptPatches
from ..evaluation.prompts import load_zero_shot_data
from ..evaluation.suite import Suite
from ..models import build_model, build_teacher, lock
from ..options.fusion import NO_FSDP
from ..options.main import PretrainingOptions
from ..options.parser import forbid
from ..run import Parts, run
from ..tasks.base import Task
from ..tasks.contrastive import ContrastiveTask


def work(options: PretrainingOptions, ranks: Ranks, argv: Sequence[str]) -> None:
    """One training, or without training data one evaluation."""
    run(options, ranks, pretraining)


def pretraining(options: PretrainingOptions, ranks: Ranks, resume: str | None) -> Parts:
    """Training on image-text pairs; see `run.Build`."""
    with ranks.agree():
        check_augmentation(options.aug_cfg)
        seed_everything(options.seed)
        identity, model, transform, tokenizer = build_model(options, ranks.device)
        fuses = identity.family != "clip"
        own = fuses and not options.aug_cfg
        train_transform = augmentation(identity, options.aug_cfg)
        if own:
            train_transform = fusion_augmentation(identity) or transform
        train_transform, transform = (with_decoding(t, options.image_decode) for t in (train_transform, transform))
        seed_everything(options.seed + ranks.rank)
        place = {"rank": ranks.rank, "world_size": ranks.world_size}
        pairs, val_pairs = (PairEncoding(one, tokenizer) for one in (train_transform, transform))
        if identity.family == "meter":
            pairs = FalsePairs(pairs, same_file=True, own=options.own_images)
            val_pairs = FalsePairs(val_pairs, same_file=True, validates=True)
        train_data = build_train_data(options, pairs, **place)
        val_data = build_val_data(options, val_pairs, **place)
        if identity.family == "meter":
            task = matching_task(options, ranks, model, tokenizer, val_data)
        else:
            suite = Suite(options, ranks, tokenizer, transform, val_data, load_zero_shot_data(options))
            if fuses:
                task = fusion_task(identity.family, options, ranks, model, suite)
            else:
                lock(model, options)
                teacher = build_teacher(options, identity, ranks.device)
                task = ContrastiveTask(options, ranks, model, suite, teacher)
        if options.visualize_frequency and options.trains and val_data is not None:
            task.picture = KeptPatches(options.visualize_frequency, ranks, model, val_data, transform, tokenizer)
    return Parts(identity, model, task, train_data)


def fusion_task(family: str, options: PretrainingOptions, ranks: Ranks, model: nn.Module, suite: Suite) -> Task:
    """The pre-training of a family of `open_clip_elip.fusion`, which is imported only where it is needed."""
    from ..tasks.albef import AlbefPretraining
    from ..tasks.alignment import check_step
    from ..tasks.blip import BlipPretraining

    forbid(options.fsdp, NO_FSDP)
    check_step(options, ranks.world_size)
    return {"albef": AlbefPretraining, "blip": BlipPretraining}[family](
        model, tokenizer=suite.tokenizer, suite=suite, queue_size=options.queue_size, gather=ranks.gather_tensor,
        momentum=options.twin_momentum, alpha=options.twin_weight, dropout=options.twin_dropout,
    )  # fmt: skip


def matching_task(
    options: PretrainingOptions, ranks: Ranks, model: nn.Module, tokenizer: Callable, val_data: ValData | None
) -> Task:
    """The pre-training of a METER model."""
    from ..tasks.meter import MeterPretraining

    lone = "A batch of one pair has no negative to match with: raise --batch-size."
    contrast = any((options.val_rerank, options.zeroshot_data, options.imagenet_val, options.imagenet_v2))
    forbid(options.fsdp, NO_FSDP)
    forbid(options.trains and options.batch_size == 1, lone)
    forbid(contrast, "A METER model has no space of contrast: leave out --val-rerank, --zeroshot-data, --imagenet-val.")
    task = MeterPretraining(model, tokenizer, whole_words=options.whole_words)
    if val_data is not None:
        task.suite = task.suite_on(val_data, options.val_frequency if options.trains else 1, ranks, options.precision)
    return task


def fusion_augmentation(identity: identities.Identity) -> Callable | None:
    """As in the released programs, of which METER's has none (None); `--aug-cfg` replaces it."""
    from ..data.fusion_augment import MAGNITUDE, FusionTransform

    if identity.family not in MAGNITUDE:
        return None
    return FusionTransform(identity.preprocess, scale=(0.2, 1.0), magnitude=MAGNITUDE[identity.family])


def check_augmentation(settings: dict[str, Any]) -> None:
    """UserError: OpenCLIP has no such setting."""
    known = [field.name for field in fields(AugmentationCfg)]
    for key in settings:
        forbid(key not in known, f"--aug-cfg has no setting {key!r}: it knows {', '.join(known)}.")


def augmentation(identity: identities.Identity, settings: dict[str, Any]) -> Callable:
    """The transform of `--aug-cfg`, tried on a picture, for OpenCLIP and timm look at few of its settings before."""
    try:
        transform = identities.transform(identity, train=True, aug_cfg=settings)
        for _ in range(20):  # some of it happens now and then
            transform(Image.new("RGB", (64, 64)))
    except Exception as error:
        raise UserError(f"--aug-cfg {settings} does not work: {reason(error)}; correct it.") from error
    return transform
