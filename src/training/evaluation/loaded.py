"""The model that an evaluation command is about: of which name, with which weights, and how it sees pictures."""
from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from open_clip_elip import identity as identities
from open_clip_elip import weights
from open_clip_elip.identity import Identity

from ..data.transforms import with_decoding
from ..distributed import Ranks
from ..errors import UserError
from ..models import check_reduces, checkpoint_identity, create_filled, told
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

    A checkpoint of this trainer tells its model, and an `options.model` of None is filled in. With the name of another
    model of the same shape it keeps all but its token reduction: picture size, normalisation, activation, ...

    image_tower: weights of an image tower alone will do, as fine-tuning leaves them; it then gives the features before
    the projection into CLIP's space.

    task: of what comes after pre-training; the model is that of the task, and the weights its own or pre-training's.

    pairs: a model will do that judges pairs alone, without features of images and of texts.

    Raises UserError: no such model, or weights that cannot be had, do not fit or are not finite.
    """
    with told():
        content = trained_as = None
        if weights.is_file(options.pretrained):
            content = weights.read(options.pretrained)
            trained_as = checkpoint_identity(content)
        if options.model is None and trained_as is not None:
            options.model = trained_as.name
        if options.model is None and options.pretrained is not None and content is None:
            raise UserError(f"--pretrained {options.pretrained} is not a file; correct the path, or add --model.")
        if options.model is None:
            raise UserError(
                "--model is missing, and only a checkpoint of this trainer as --pretrained tells it by itself."
            )
        identities.describe(options.model)  # there is such a model
        if ":" not in options.model and options.pretrained is None:  # others bring their weights along
            raise UserError("--pretrained is missing: give a checkpoint file or the name of pretrained weights.")
        source = weights.find(options.model, options.pretrained)
        if source is None:
            raise UserError(f"{options.model} brings no weights along; give them with --pretrained.")
        if options.ema:
            if content is None:
                raise UserError("--ema needs a checkpoint file of this trainer as --pretrained.")
            content = content.get("ema")
            if not content:
                raise UserError(f"{options.pretrained} has no averaged weights (--ema-decay was off); leave out --ema.")

        identity = None if trained_as is None else identities.sibling(trained_as, options.model)
        if identity is None:
            identity = identities.describe(options.model, pretrained=options.pretrained)
            if trained_as is not None and (other := identities.differences(trained_as, identity)):
                trained = f"{trained_as.name} with {', '.join(other)}"
                logging.warning(f"{source} was trained as {trained}, which is not kept.")
        changes = {name: getattr(options, name) for name in ("force_image_size", "text_tokenizer")}
        identity = identities.changed(identity, **changes)
        if identity.family != "clip" and content is not None:
            if not any(_LANGUAGE.search(name) for name in weights.tensors(content, source)):
                identity = replace(identity, config=identity.config | {"task": "retrieval"})
        if task is not None:
            model = _of_task(identity, task, options.precision, ranks.device, content, source)
        else:
            model, report = create_filled(
                identity, source, options.precision, ranks.device, content=content, image_tower=image_tower,
            )  # fmt: skip
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


def _of_task(
    identity: Identity, task: str, precision: str, device: torch.device, content: Mapping[str, Any] | None, source: str
) -> nn.Module:
    """A task's model, all of whose weights the file `source` has."""
    if identity.family != "blip":
        raise UserError(f"{identity.name} ({identity.family}) has not learnt {task}: give a BLIP model.")
    from open_clip_elip.fusion.start import start_task

    config = {key: value for key, value in identity.config.items() if key != "token_reduction"} | {"task": task}
    model = identities.create(replace(identity, config=config), precision=precision, device=device)
    start_task(model, weights.read(source) if content is None else content, source)
    return model


def hash_weights(state_dict: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of the SHA-256 of a state dict: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(state_dict.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
