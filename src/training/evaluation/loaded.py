"""The model that an evaluation command is about: of which name, with which weights, and how it sees pictures."""
from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from open_clip_elip import identity as identities
from open_clip_elip import pretrained, weights
from open_clip_elip.pretrained import Pretrained

from ..data.transforms import with_decoding
from ..distributed import Ranks
from ..errors import UserError
from ..models import check_reduces, checkpoint_identity, told
from .results import described_model

# What writes words in a fusion model; the models that are fine-tuned for retrieval have none of it.
_LANGUAGE = re.compile(r"\b(mlm_head|cls\.predictions|\w*decoder)\.")


class LoadedModel(NamedTuple):
    """A model with its weights, on the device and in eval mode; `described` is its `described_model`, for all keys."""

    model: nn.Module
    tokenizer: Callable
    preprocess: Callable
    described: dict[str, Any]


def load_model(
    options: Any, ranks: Ranks, *, image_tower: bool = False, task: str | None = None, pairs: bool = False
) -> LoadedModel:
    """The model of an evaluation's `--model` and `--pretrained`; for the block of a `ranks.agree()`.

    An `options.model` of None is filled in, see `pretrained.find`.

    image_tower: weights of an image tower alone will do, as fine-tuning leaves them; it then gives the features before
    the projection into CLIP's space.

    task: of what comes after pre-training; the model is that of the task, and the weights its own or pre-training's.

    pairs: a model will do that judges pairs alone, without features of images and of texts.

    Raises UserError: no such model, or weights that cannot be had, do not fit or are not finite.
    """
    with told():
        found = pretrained.find(options.model, options.pretrained, ema=options.ema, told_identity=checkpoint_identity)
        options.model = found.identity.name
        changes = {name: getattr(options, name) for name in ("force_image_size", "text_tokenizer")}
        identity = identities.changed(found.identity, **changes)
        if identity.family != "clip" and not any(map(_LANGUAGE.search, weights.tensors(found.content, found.source))):
            identity = replace(identity, config=identity.config | {"task": "retrieval"})
        found = found._replace(identity=identity)
        how = {"precision": options.precision, "device": ranks.device}
        if task is not None:
            model = _of_task(found, task, **how)
        else:
            model, report = found.create(image_tower=image_tower, **how)
            if "visual.proj" in report.new:
                model.visual.proj = None
        tokenizer, preprocess = identities.tokenizer(identity), identities.transform(identity)
    if not (task or pairs or hasattr(model, "encode_image")):
        raise UserError(f"{options.model} has no features of images by themselves: take training.retrieval.")
    if options.vision_guided_reduction:
        check_reduces(model, options.model)
        model.tower.vision_guided = True
    preprocess = with_decoding(preprocess, options.image_decode)
    described = described_model(options, identity, hash_weights(model.state_dict()), preprocess, tokenizer)
    return LoadedModel(model.eval(), tokenizer, preprocess, described)


def _of_task(found: Pretrained, task: str, **how: Any) -> nn.Module:
    """A task's model, all of whose weights the file has."""
    identity = found.identity
    if identity.family != "blip":
        raise UserError(f"{identity.name} ({identity.family}) has not learnt {task}: give a BLIP model.")
    from open_clip_elip.fusion.start import start_task

    config = {key: value for key, value in identity.config.items() if key != "token_reduction"} | {"task": task}
    model = identities.create(replace(identity, config=config), **how)
    start_task(model, found.content, found.source)
    return model


def hash_weights(state_dict: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of the SHA-256 of a state dict: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(state_dict.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
