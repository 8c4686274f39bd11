"""Text-first CLIP: the caption is encoded first and guides which image tokens go through the image tower.

The classes add behaviour only. Their state dict has exactly the keys of the plain OpenCLIP model, so checkpoints load
both ways with `strict=True`.
"""
from __future__ import annotations

import copy

import open_clip
import torch
import torch.nn.functional as F
from open_clip.hf_model import ClsLastHiddenStatePooler, ClsPooler, HFTextEncoder
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from .blocks import is_traced, is_untouched
from .reduction import METHODS, TokenReduction, check_blocks, resolve
from .reduction.text import TextReduction
from .text import TextParts, can_cut, cut_text, encode_parts
from .tower import ImageTower

# Hugging Face text models whose first token is a `[CLS]`; the others (mT5, M2M100) have none and use what they pool.
HF_MODELS_WITH_CLS = ("bert", "roberta", "xlm-roberta")


class TextFirst(nn.Module):
    """Mixin for OpenCLIP's two CLIP classes: token reduction in training, guided by the paired caption if the method
    is one that uses it, and the same features, up to rounding, for less time and memory.

    - `forward(image, text)` in training mode encodes the text first; its detached feature guides the image tower.
    - `forward(image, text)` in eval mode, `forward(image=...)` and `encode_image(image)` use all tokens: no caption
      ever reaches an image feature that is evaluated.
    - Captions are cut (see `text.py`), of the last layers only the row that is pooled is computed, and blocks run
      without copies (see `blocks.py`); what does not allow it, or was changed, runs as OpenCLIP runs it.
    """

    text_reduction: TextReduction | None = None  # how captions lose tokens in training; None: they do not

    def __init__(self, *args, token_reduction: dict | None = None, text_reduction: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if text_reduction is not None:
            self.text_reduction = TextReduction(**text_reduction)
            if self.text_reduction.rule == "learned":
                raise ValueError("A CLIP model reads captions without the image: text reduction is post or random.")
            self._check_text()
        self._tower = ImageTower(self.visual, make_reduction(self.visual, token_reduction or {"method": "none"}))

    @property
    def tower(self) -> ImageTower:
        """How the image tower is run; its switches are the model's."""
        if self._tower.visual is not self.visual:  # another one was put in its place
            self._tower.visual = self.visual
        return self._tower

    @property
    def reduction(self) -> TokenReduction | None:
        """The method; has no parameters."""
        return self.tower.reduction

    def encode_text(self, text: Tensor | TextParts, normalize: bool = False) -> Tensor:
        """(B, T) token ids, or what `cut_text` makes of them, to (B, embed_dim), of unit length with `normalize`.

        Token ids are cut here, except where a training step would wait for a GPU, or in a compiled graph. Nothing is
        cut while a graph is traced or exported, which is to fit other captions too. In training mode they are reduced.
        """
        fewer = self.text_reduction if self.training and self.tower.reduces else None
        if fewer is not None:
            self._check_text()
        if isinstance(text, TextParts):
            text = text if can_cut(self) else text.whole(self.context_length)
        elif self.tower.shortcuts and not is_traced():
            waits = self.training and text.device.type != "cpu"
            if not waits and not torch.compiler.is_compiling():
                text = cut_text(text, self)
            elif can_cut(self):
                text = TextParts((text,), torch.arange(len(text), device=text.device))
        if fewer is not None and not isinstance(text, TextParts):
            text = TextParts((text,), torch.arange(len(text), device=text.device))
        if not isinstance(text, TextParts):
            return super().encode_text(text, normalize=normalize)
        features = encode_parts(self, text, fewer)
        return F.normalize(features, dim=-1) if normalize else features

    def _check_text(self) -> None:
        if not can_cut(self):
            raise ValueError(
                "Text reduction needs OpenCLIP's own text tower, causal, pooled at the end of text and unchanged."
            )

    def encode_image(
        self, image: Tensor, normalize: bool = False, guidance: Tensor | None = None, reduce: bool | None = None
    ) -> Tensor:
        """(B, 3, H, W) to (B, embed_dim), of unit length with `normalize`; guidance: (B, vision width) from
        `guidance_from_text`, reduce: remove tokens (None: if there is guidance, or with `tower.vision_guided`)."""
        if guidance is not None:
            _check_pairs(image, guidance)
        features = self.tower.features(image, guidance, reduce=reduce)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text_and_guidance(self, text: Tensor, normalize: bool = False) -> tuple[Tensor, Tensor]:
        """Text features (B, embed_dim) and the guidance (B, vision width) they give, from one pass over the text: the
        unit-length text feature (CLIP's counterpart of the text `[CLS]` in Eq. 1), or the projected `[CLS]` of a
        Hugging Face tower that has one, through the transposed visual projection."""
        tower = getattr(self, "text", None)
        has_cls = isinstance(tower, HFTextEncoder) and tower.config.model_type in HF_MODELS_WITH_CLS
        if has_cls and not isinstance(tower.pooler, (ClsPooler, ClsLastHiddenStatePooler)):
            mask = (text != tower.config.pad_token_id).long()
            out = tower.transformer(input_ids=text, attention_mask=mask)
            features = tower.proj(tower.pooler(out, mask)) if is_untouched(tower) else tower(text)
            cls_features = tower.proj(out.last_hidden_state[:, 0])
            features = F.normalize(features, dim=-1) if normalize else features
        else:
            features = cls_features = self.encode_text(text, normalize=normalize)
        return features, self.guidance_from_text(cls_features)

    @torch.no_grad()
    def guidance_from_text(self, text_features: Tensor) -> Tensor:
        """Brings text features (B, embed_dim), normalised or not, to the vision width: (B, vision width), detached."""
        features = F.normalize(text_features.detach(), dim=-1)
        return features if self.visual.proj is None else features @ self.visual.proj.detach().t()

    def forward(self, image: Tensor | None = None, text: Tensor | None = None):
        """As OpenCLIP's: a dict (or tuple) of unit-length image_features, text_features, and logit_scale (logit_bias);
        a ValueError if, in training mode, image and text are not pairs."""
        if self.reduction is None:
            return super().forward(image, text)
        image_features = text_features = guidance = reduce = None
        if text is not None:
            if self.training and image is not None:
                reduce = self.tower.reduces
            if reduce and self.reduction.uses_text:
                text_features, guidance = self.encode_text_and_guidance(text, normalize=True)
            else:
                text_features = self.encode_text(text, normalize=True)
        if image is not None:
            if reduce:
                _check_pairs(image, text_features)
            image_features = self.encode_image(image, normalize=True, guidance=guidance, reduce=reduce)

        out = {"image_features": image_features, "text_features": text_features, "logit_scale": self.logit_scale.exp()}
        if self.logit_bias is not None:
            out["logit_bias"] = self.logit_bias
        return out if self.output_dict else tuple(out.values())

    def __prepare_scriptable__(self) -> nn.Module:
        return without_token_reduction(self)  # TorchScript compiles OpenCLIP's own


class TextFirstCLIP(TextFirst, open_clip.CLIP):
    """`open_clip.CLIP` with token reduction."""


class TextFirstCustomTextCLIP(TextFirst, open_clip.CustomTextCLIP):
    """`open_clip.CustomTextCLIP` with token reduction, for any text tower, Hugging Face's included."""


TEXT_FIRST = {open_clip.CLIP: TextFirstCLIP, open_clip.CustomTextCLIP: TextFirstCustomTextCLIP}


def make_reduction(visual: nn.Module, token_reduction: dict) -> TokenReduction | None:
    """The method of options such as `{"method": "elip", "lam": 0.6}` for the image tower of a CLIP model; a ValueError
    if there is no such method or option, or if the tower cannot be reduced."""
    if token_reduction.get("method") == "none":
        return None
    method, config = resolve(token_reduction)
    if not isinstance(visual, VisionTransformer):
        raise ValueError(
            f"Token reduction needs OpenCLIP's own ViT as the image tower; this model has a {type(visual).__name__}."
        )
    blocks = visual.transformer.resblocks
    check_blocks(blocks)
    if not visual.transformer.batch_first:
        raise ValueError("Token reduction needs a batch-first image tower.")
    width = visual.transformer.width
    if width != (visual.output_dim if visual.proj is None else visual.proj.shape[0]):
        raise ValueError("Token reduction needs an image tower whose pooled features have the width of its tokens.")
    return METHODS[method](config, len(blocks))


def with_token_reduction(model: nn.Module, method: str = "elip", **options) -> nn.Module:
    """The text-first version of an `open_clip.CLIP` or `open_clip.CustomTextCLIP` with a ViT, plain or text-first
    already, which stays as it is; they share weights and the towers' modules, so that `train()`, `eval()` and gradient
    checkpointing on one show in the other. Options are the method's, e.g. `lam=0.5` or `keep_ratio=(1, .9, .4, .4)`;
    what does not fit is a ValueError."""
    return _twin(model, TEXT_FIRST[_plain_class(model)], make_reduction(model.visual, {"method": method, **options}))


def with_shortcuts(model: nn.Module) -> nn.Module:
    """A plain OpenCLIP model, else a ValueError, with the exact shortcuts, sharing its weights; ours as they are."""
    plain = _plain_class(model)
    return _twin(model, TEXT_FIRST[plain]) if type(model) is plain else model


def without_token_reduction(model: nn.Module) -> nn.Module:
    """The plain OpenCLIP model behind a text-first one, sharing its weights; a plain model is returned as it is."""
    plain = _plain_class(model)
    return model if type(model) is plain else _twin(model, plain)


def _check_pairs(image: Tensor, captions: Tensor) -> None:
    if len(image) != len(captions):
        raise ValueError(
            f"Token reduction needs one caption per image; got {len(image)} images and {len(captions)} captions."
        )


def _plain_class(model: nn.Module) -> type[nn.Module]:
    for plain, text_first in TEXT_FIRST.items():
        if type(model) in (plain, text_first):
            return plain
    raise ValueError(
        f"Token reduction applies to open_clip.CLIP and open_clip.CustomTextCLIP models, not to {type(model).__name__}"
        + ("; unwrap it first (model.module or model._orig_mod)." if hasattr(model, "module") else ".")
    )


def _twin(model: nn.Module, cls: type[nn.Module], reduction: TokenReduction | None = None) -> nn.Module:
    """Another object over the same submodules, parameters and buffers, with an image tower of its own."""
    twin = cls.__new__(cls)
    twin.__dict__.update(model.__dict__)
    for registry in ("_modules", "_parameters", "_buffers"):  # own dicts, so that adding a module to one stays there
        twin.__dict__[registry] = dict(model.__dict__[registry])
    tower = copy.copy(twin.__dict__.pop("_tower", None)) or ImageTower(model.visual)
    tower.reduction = reduction
    if issubclass(cls, TextFirst):
        twin._tower = tower
    return twin
