"""Names with options to models: `ViT-S-16`, `ViT-S-16-ELIP:scoring_depth=1`, `ViT-B-16:method=elip,lam=0.5`."""
from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import torch
from torch import nn

from ..clip import without_token_reduction
from ..identity import Identity, create, describe
from .errors import ProfileError


class Candidate(NamedTuple):
    """A model as it is named on the command line.

    Attributes:
        label: what the person wrote.
        identity: what it is.
        shortcuts: whether it runs with this package's exact shortcuts; None: a model with token reduction does, a plain
            OpenCLIP model does not.
    """

    label: str
    identity: Identity
    shortcuts: bool | None = None

    @classmethod
    def parse(cls, text: str, image_size: int | None = None) -> Candidate:
        """`NAME[:option=value,...]`, the options being those of the token reduction; numbers of a list are separated by
        commas too.

        Raises:
            ProfileError: something behind the colon that is no `option=value`.
            ModelError: no such model, or options that do not fit it.
        """
        name, colon, tail = text.rpartition(":")
        if not colon or "=" not in tail:
            name, tail = text, ""
        options: dict[str, Any] = {}
        for item in re.split(r",(?=\s*[A-Za-z_]\w*=)", tail) if tail else ():
            key, equals, value = item.partition("=")
            if not equals or not value:
                raise ProfileError(f"{item!r} in {text!r} is not option=value; write NAME:option=value,option=value.")
            options[key.strip()] = _value(value)
        shortcuts = options.pop("shortcuts", None)
        if not isinstance(shortcuts, (bool, type(None))):
            raise ProfileError(f"shortcuts is true or false in {text!r}.")
        return cls(text, describe(name, token_reduction=options or None, force_image_size=image_size), shortcuts)

    def build(self, device: torch.device | str, precision: str = "fp32") -> nn.Module:
        """In training mode, weights at random; raises ModelError if it cannot be made."""
        model = create(self.identity, device=device, precision=precision, pretrained_text=False)
        if self.shortcuts is not None:
            model.tower.shortcuts = self.shortcuts
        elif self.identity.token_reduction is None and hasattr(model, "tower"):
            model = without_token_reduction(model)  # OpenCLIP's own class
        return model.train()


def _value(text: str) -> Any:
    parts = [_scalar(part) for part in text.strip().strip("[]").split(",")]
    return parts if len(parts) > 1 else parts[0]


def _scalar(text: str) -> Any:
    text = text.strip()
    try:
        return json.loads("0" + text if text.startswith(".") else text)
    except ValueError:
        return text
