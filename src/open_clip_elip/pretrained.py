"""The model that a name and weights mean together, as a command is given them in `--model` and `--pretrained`."""
from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from . import identity as identities
from . import loading, weights
from .errors import ModelError
from .identity import Identity


class Pretrained(NamedTuple):
    """A model that is meant, with its weights, which `create` puts into it; its identity may be replaced before."""

    identity: Identity
    source: str  # file or URL
    content: Mapping[str, Any]  # of it

    def create(self, *, image_tower: bool = False, **how: Any) -> tuple[nn.Module, loading.Report]:
        """The model and what became of each tensor, which is logged where it is worth a warning.

        image_tower: as in `loading.load`. how: as in `identity.create`. Raises ModelError: weights that do not fit, or
        are not finite.
        """
        model = identities.create(self.identity, pretrained_text=False, **how)
        of = {"name": self.identity.name, "source": self.source}
        report = loading.load(model, self.content, image_tower=image_tower, **of)
        for sentence in report.sentences():
            logging.warning(sentence)
        loading.check_finite(model, self.source)
        return model, report


def find(
    name: str | None,
    pretrained: str | None,
    *,
    ema: bool = False,
    told_identity: Callable[[Mapping[str, Any]], Identity | None] = weights.told_identity,
) -> Pretrained:
    """What is meant. A checkpoint of this trainer, or a folder, tells its model, and needs no name; with the name of
    another model of the same shape it keeps all but its token reduction: picture size, normalisation, activation, ...

    Args:
        ema: the averaged weights of a checkpoint.
        told_identity: the model that a file's content tells, if it does.

    Raises ModelError: there is no such model, or none of such weights.
    """
    content = weights.read(pretrained) if weights.is_file(pretrained) else None
    trained_as = None if content is None else told_identity(content)
    if name is None:
        if pretrained and content is None:
            raise ModelError(f"--pretrained {pretrained} is not a file; correct the path, or add --model.")
        if trained_as is None:
            raise ModelError(
                "--model is missing, and only a checkpoint of this trainer, or a folder, as --pretrained tells it by "
                "itself."
            )
        name = trained_as.name
    identity = None if trained_as is None else identities.sibling(trained_as, name)
    identity = identity or identities.describe(name, pretrained=pretrained)
    if ema:  # before anything is downloaded
        content = (content or {}).get("ema")
        if not content:
            raise ModelError(f"{pretrained or name} has no averaged weights; leave out --ema.")
    source = weights.find(name, pretrained)
    if source is None:
        raise ModelError(f"{name} brings no weights along; give them with --pretrained.")
    if trained_as is not None and (other := identities.differences(trained_as, identity)):
        trained = f"{trained_as.name} with {', '.join(other)}"
        logging.warning(f"{source} was trained as {trained}, which {name} does not keep; leave out --model to keep it.")
    return Pretrained(identity, source, weights.read(source) if content is None else content)
