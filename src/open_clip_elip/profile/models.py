"""Names with options to models: `ViT-S-16`, `ViT-S-16-ELIP:scoring_depth=1`, `ViT-B-16:method=elip,lam=0.5`."""
from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import open_clip
import torch
from torch import nn

from ..clip import with_shortcuts
from ..reduction import drop_alternatives
from .errors import ProfileError

_LISTS = ("depths", "keep_ratio", "keep_count", "layers")


@dataclass(frozen=True)
class ModelSpec:
    """A model as it is named on the command line.

    Attributes:
        label: what the person wrote.
        name: OpenCLIP's, or with its schema (`hf-hub:`, `local-dir:`).
        reduction: options of the token reduction that differ from the model's own.
        shortcuts: whether it runs with this package's exact shortcuts (`model.Shortcuts`); None: an ELIP model does, a
            plain OpenCLIP model does not.
    """

    label: str
    name: str
    reduction: dict[str, Any] = field(default_factory=dict)
    shortcuts: bool | None = None

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """`NAME[:option=value,...]`; numbers of a list are separated by commas too.

        Raises:
            ProfileError: something behind the colon that is no `option=value`, or no such model.
        """
        name, colon, tail = text.rpartition(":")
        if not colon or "=" not in tail:
            name, tail = text, ""
        options: dict[str, Any] = {}
        for item in re.split(r",(?=\s*[A-Za-z_]\w*=)", tail) if tail else ():
            key, equals, value = item.partition("=")
            if not equals or not value:
                raise ProfileError(f"{item!r} in {text!r} is not option=value; write NAME:option=value,option=value.")
            options[key.strip()] = _value(key.strip(), value)
        shortcuts = options.pop("shortcuts", None)
        if not isinstance(shortcuts, (bool, type(None))):
            raise ProfileError(f"shortcuts is true or false in {text!r}.")
        _check_name(name)
        return cls(text, name, options, shortcuts)

    def build(
        self, *, device: torch.device | str, precision: str = "fp32", image_size: int | None = None
    ) -> nn.Module:
        """The model in training mode with weights at random; on the device "meta" it has shapes but no numbers.

        Raises:
            ProfileError: options that do not fit the model, or a model that cannot be created.
        """
        options = {} if image_size is None else {"force_image_size": image_size}
        if self.reduction:
            options["token_reduction"] = self._token_reduction()
        with _creating(self.label), torch.device(device):
            model = open_clip.create_model(
                self.name, load_weights=False, pretrained_text=False, device=device, precision=precision,
                output_dict=True, **options,
            )  # fmt: skip
            if self.shortcuts is not None:  # an ELIP model has them
                model = with_shortcuts(model)
                model.tower.shortcuts = self.shortcuts
        return model.train()

    def _token_reduction(self) -> dict[str, Any]:
        """The model's own token reduction with these options on top."""
        with _creating(self.label):
            own = (open_clip.get_model_config(self.name) or {}).get("token_reduction", {})
        method = self.reduction.get("method", own.get("method"))
        if method is None:
            raise ProfileError(
                f"{self.name} has no token reduction for {', '.join(self.reduction)} to change; "
                "add method=elip, or another."
            )
        if method == "none":
            return {"method": "none"}
        base = dict(own) if own.get("method") == method else {}
        return {**drop_alternatives(base, self.reduction), **self.reduction, "method": method}


def _value(key: str, text: str) -> Any:
    parts = [_scalar(part) for part in text.strip().strip("[]").split(",")]
    return parts if len(parts) > 1 or key in _LISTS else parts[0]


def _scalar(text: str) -> Any:
    text = text.strip()
    try:
        return json.loads("0" + text if text.startswith(".") else text)
    except ValueError:
        return text


def _check_name(name: str) -> None:
    schema, identifier = open_clip.factory.parse_model_name(name)
    known = open_clip.list_models()
    if schema is None and identifier.replace("/", "-") not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "open_clip.list_models() lists what there is."
        raise ProfileError(f"There is no model named {name!r}; {hint}")


@contextmanager
def _creating(label: str) -> Iterator[None]:
    """Turns what open_clip raises while it builds a model into one sentence, and keeps its chatter back."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    except ProfileError:
        raise
    except Exception as error:  # from AssertionError to OSError, according to what is wrong
        first = " ".join(str(error).split())[:300] or type(error).__name__
        raise ProfileError(f"The model {label} cannot be created: {first}") from error
    finally:
        root.setLevel(level)
