"""Makes the models with token reduction known to open_clip. The one place that touches open_clip's internals.

Its `create_model` passes unknown keys of a model's JSON on to the model class, which it looks up as a module global.
These are replaced by builders that return our class for a JSON with `token_reduction`, and else open_clip's, untouched.
"""
from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
from open_clip import factory, pretrained

from . import hugging_face
from .reduction import METHODS

DESCRIPTIONS = ("open_clip_config.json", "config.json")  # in a folder of OpenCLIP's, of transformers'
MODEL_CONFIGS = Path(__file__).parent / "model_configs"


def register() -> None:
    """Registers the model configurations and the builders. Calling it again changes nothing."""
    for plain in (open_clip.CLIP, open_clip.CustomTextCLIP, open_clip.CoCa):
        setattr(factory, plain.__name__, _builder(plain))
    open_clip.add_model_config(MODEL_CONFIGS)
    # The weights are the plain model's, so its pretrained tags are valid here too.
    for path in MODEL_CONFIGS.glob("*.json"):
        if tags := pretrained._PRETRAINED.get(plain_name(path.stem)):
            pretrained._PRETRAINED.setdefault(path.stem, tags)


def plain_name(name: str) -> str:
    """The plain model of the same shape: `ViT-B-16` for `ViT-B-16-ToMe`."""
    suffixes = sorted((method.suffix for method in METHODS.values() if method.suffix), key=len, reverse=True)
    return next((name.removesuffix(suffix) for suffix in suffixes if name.endswith(suffix)), name)


def _builder(plain: type):
    def build(
        *args, token_reduction: dict | None = None, text_reduction: dict | None = None, family: str = "clip", **kwargs
    ):
        reductions = {"token_reduction": token_reduction, "text_reduction": text_reduction}
        if family != "clip":
            return _build_fusion(family, **reductions, **kwargs)
        if text_reduction is None and (token_reduction is None or token_reduction.get("method") == "none"):
            return plain(*args, **kwargs)
        from .clip import TEXT_FIRST  # which may be what imports open_clip, and so this module

        if plain not in TEXT_FIRST:
            raise ValueError(f"Token reduction is for contrastive models; {plain.__name__} captions from all tokens.")
        return TEXT_FIRST[plain](*args, **reductions, **kwargs)

    build.__name__ = plain.__name__  # create_model logs it
    return build


def _build_fusion(
    family: str, *, token_reduction: dict | None, text_reduction: dict | None, task: str = "pretraining",
    answers: list[str] | None = None, **config: Any,
):  # fmt: skip
    """A model of `fusion/` from what open_clip calls a CLIP model with."""
    try:
        from .fusion import build
    except ModuleNotFoundError as error:
        raise ValueError(
            f"Models of the family {family} need {error.name}; pip install 'open_clip_elip[fusion]' brings it."
        ) from error
    parts = (config[name] for name in ("embed_dim", "vision_cfg", "text_cfg"))
    reduction = None if (token_reduction or {}).get("method") == "none" else token_reduction
    return build(family, task, *parts, reduction, answers, text_reduction)


@contextmanager
def registered(name: str, config: dict[str, Any]) -> Iterator[None]:
    """Within it, open_clip knows `config` by this name; afterwards it knows what it knew before."""
    before = dict(factory._MODEL_CONFIGS)
    factory._MODEL_CONFIGS[name] = config
    try:
        yield
    finally:
        factory._MODEL_CONFIGS.clear()
        factory._MODEL_CONFIGS.update(before)


def model_folder(name: str, cache_dir: str | None = None) -> dict[str, Any]:
    """What open_clip_config.json of `local-dir:` or `hf-hub:` says, or would say of the CLIPModel of a `local-dir:`."""
    schema, place = factory.parse_model_name(name)
    if schema == "hf-hub":
        return factory._get_hf_config(place, cache_dir=cache_dir)
    own, of_transformers = (Path(place) / file for file in DESCRIPTIONS)
    if of_transformers.is_file() and not own.is_file():
        return hugging_face.read_config(place)
    return json.loads(own.read_text(encoding="utf-8"))


def weights_in_folder(name: str, cache_dir: str | None = None) -> str | None:
    """The file of weights that `local-dir:` or `hf-hub:` brings along; None if there is none."""
    schema, place = factory.parse_model_name(name)
    if schema == "local-dir":
        return factory._find_checkpoint_in_dir(Path(place))
    try:
        return pretrained.download_pretrained_from_hf(place, cache_dir=cache_dir)
    except Exception:  # of many kinds, from huggingface_hub; a repository may hold a description alone
        return None


register()
