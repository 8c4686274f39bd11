"""What the fusion families have in common: the image tower of ALBEF's and BLIP's shape, and the heads of alignment."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import _build_vision_tower
from torch import Tensor, nn

from ..adapters import Bottleneck
from ..blocks import DropPath
from ..clip import make_reduction
from ..reduction.text import TextReduction
from ..tower import ImageTower
from .bert import Memory, Tokens
from .released import Names, Released, read_released
from .shorter import Shortening, run_shorter


class FusionModel(nn.Module):
    """A model with an image tower whose tokens are all used. A family adds text and fusion.

    Args:
        vision_cfg: OpenCLIP's, of a ViT; it has no projection of its own, and with `conv_bias` its convolution a bias.
        token_reduction: {"method": ..., options}, see `clip.make_reduction`; None: all tokens always.

    Raises:
        ValueError: an option does not fit.
    """

    pad = 0  # the id of padding
    names: Names  # of weights in released files
    adds_cosine = False  # to the scores by which shortlists are ranked again
    taught = True  # training has a momentum twin
    quick_gelu, conv_bias = False, True  # of the image tower
    rates: Mapping[str, float] = {}  # by how a weight's name begins, what multiplies its learning rate
    UNTAUGHT: tuple[str, ...] = ()  # parts that a momentum twin does without
    NEW: tuple[str, ...] = ()  # how the names of weights begin that pre-training has none for
    IDLE: tuple[str, ...] = ()  # and of those of pre-training that a model of a task may have no use for
    text_reduction: TextReduction | None = None  # how texts lose tokens in pre-training; None: they do not

    def __init__(self, vision_cfg: dict[str, Any], token_reduction: dict[str, Any] | None = None):
        super().__init__()
        width = vision_cfg["width"]
        self.visual = _build_vision_tower(width, vision_cfg, self.quick_gelu)
        self.visual.proj, conv = None, self.visual.conv1
        if self.conv_bias:
            self.visual.conv1 = nn.Conv2d(3, width, conv.kernel_size, conv.stride)
        std = 0.02 * (768 / width) ** 0.5  # BERT's, at the width that it is meant for
        self.visual.apply(partial(init, std=std))
        nn.init.trunc_normal_(self.visual.class_embedding, std=std)
        reduction = None if token_reduction is None else make_reduction(self.visual, token_reduction)
        self._tower = ImageTower(self.visual, reduction)

    @property
    def tower(self) -> ImageTower:
        """How the image tower is run."""
        if self._tower.visual is not self.visual:  # this is a copy
            self._tower.visual = self.visual
        return self._tower

    @property
    def half(self) -> int:
        """Layers that see all of a text's tokens: the first half of those of BERT's."""
        return len(self.text.encoder.layer) // 2

    def reduce_texts(self, reduction: TextReduction) -> None:
        """Sets `text_reduction`; ValueError if the model has no part in which it can be."""
        self.text_reduction = reduction

    def shortening(self) -> Shortening | None:
        """Of texts, in a step of pre-training."""
        return Shortening(self.text_reduction) if self.text_reduction is not None and self.training else None

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.visual.set_grad_checkpointing(enable)
        for module in self.modules():
            if hasattr(module, "feed_forward_chunk"):  # a layer of BERT's kind
                module.gradient_checkpointing = enable

    def set_drop_path(self, rate: float) -> None:
        """Of the image tower, in training: `rate` is that of the last layer, and those before have less in equal steps
        from 0 on. 0 changes nothing."""
        blocks = self.visual.transformer.resblocks
        for block, own in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist(), strict=True):
            for name in ("ls_1", "ls_2") if own else ():
                end = getattr(block, name)
                place = (end, "base_layer") if isinstance(end, Bottleneck) else (block, name)
                setattr(*place, DropPath(own))

    def own_names(self, state: Mapping[str, Tensor]) -> Released:
        """Weights of a released file, or of this model, by the names that they have here."""
        return read_released(state, self.names)

    def from_image_tower(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of DeiT or of timm's ViT, but for their head, by the names that they have here."""
        state = {f"visual_encoder.{name}": value for name, value in state.items() if not name.startswith("head")}
        return self.own_names(state).model

    def from_bert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a `BertForMaskedLM` by the names that they have here."""
        return self.own_names({f"text_encoder.{name}": value for name, value in state.items()}).model

    def from_pretraining(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of pre-training's model, or of this one's, by the names that they have here."""
        return state

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay is meant for it: for all but biases, what normalises, and the temperature."""
        # The class embedding of OpenCLIP's tower has lost its other dimensions.
        return parameter.ndim > 1 or name.endswith("class_embedding")

    def mask(self, text: Tensor) -> Tensor:
        """(B, L), true where there is a token."""
        return text != self.pad

    def tokens_in(self, text: Tensor) -> Tokens:
        """What layers run on, of (B, L) ids on the CPU: no padding where there is some, but with `--no-shortcuts`."""
        mask = self.mask(text)
        return Tokens.of(mask) if self.tower.shortcuts and not bool(mask.all()) else Tokens(mask)

    def image_states(self, image: Tensor, guidance: Tensor | None = None, **more: Any) -> Tensor:
        """(B, 3, H, W) to (B, N, D), `[CLS]` first, N the reduced length; `guidance` (B, D): the text's first state.
        See `ImageTower.tokens`."""
        return self.visual.ln_post(self.tower.tokens(image, guidance, **more))

    def text_states(
        self, text: Tensor, tokens: Tokens | None = None, *, only_first: bool = False, how: Shortening | None = None
    ) -> Tensor:
        """(B, L) token ids to (B, L, D); `tokens`: those that layers run on, `only_first`: see `bert.run`; `how` tokens
        are lost, if there are layers here behind the first half."""
        layers, tokens = self.text.encoder.layer, tokens or Tokens(self.mask(text))
        how = how if self.half < len(layers) else None
        return run_shorter(how, self.half, layers, self.text.embeddings(text), tokens, only_first=only_first)

    def guidance(self, states: Tensor) -> Tensor:
        """What guides the image tower, (B, its width), of texts' states (B, L, D): the first."""
        return states[:, 0].contiguous()  # or a compiled tower would be compiled for each length of the texts

    def read(self, image_states: Tensor, once: bool = True) -> list[Memory]:
        """What the layers that look at images read of them, (M, N, D); `once`: see `bert.read`."""
        raise NotImplementedError


class AligningModel(FusionModel):
    """One with a space of contrast and a head that tells whether image and text match.

    Answers `encode_image`, `encode_text` and `logit_scale` as a CLIP model does, in the space of contrast.
    """

    def add_heads(self, embed_dim: int, width: int) -> None:
        """Of the space of contrast, `embed_dim` wide, and of matching, for texts of this width."""
        self.vision_proj = nn.Linear(self.visual.output_dim, embed_dim)
        self.text_proj, self.itm_head = nn.Linear(width, embed_dim), nn.Linear(width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of what similarities are multiplied by, as CLIP's."""
        return -self.temp.log()

    @torch.no_grad()
    def guidance(self, states: Tensor) -> Tensor:
        """As `FusionModel.guidance`, but where the first state has another width: there the unit-length text feature by
        the transposed image projection, as in CLIP."""
        first = super().guidance(states)
        if first.shape[1] == self.visual.output_dim:
            return first
        return F.normalize(self.text_proj(first), dim=-1) @ self.vision_proj.weight

    @torch.no_grad()
    def clue(self, image_states: Tensor) -> Tensor:
        """What chooses among the tokens of texts, (B, their width), of images' states (B, N, D): the first, or the
        unit-length image feature by the transposed text projection; as `guidance`, the other way round."""
        first = image_states[:, 0]
        if first.shape[1] == self.text_proj.in_features:
            return first
        return F.normalize(self.vision_proj(first), dim=-1) @ self.text_proj.weight

    def match(
        self, states: Tensor, text: Tensor, memory: Sequence[Memory], which: Tensor | None = None, *,
        texts: Tensor | None = None, tokens: Tokens | None = None, how: Shortening | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits (P, 2) that a text and the image it looks at do not belong together, or do.

        Args:
            states: (B, L, D) `text_states` of the text.
            text: (B, L) token ids.
            memory, which, texts, tokens: see `bert.run`.
            how: texts lose tokens; None: they do not.
        """
        raise NotImplementedError

    def encode_text(self, text: Tensor, normalize: bool = False, tokens: Tokens | None = None) -> Tensor:
        """(B, L) token ids to (B, embed_dim), of unit length with `normalize`; `tokens`: those that layers run on."""
        features = self.text_proj(self.text_states(text, tokens, only_first=self.tower.shortcuts)[:, 0])
        return F.normalize(features, dim=-1) if normalize else features

    def encode_image(
        self, image: Tensor, normalize: bool = False, guidance: Tensor | None = None, reduce: bool | None = None
    ) -> Tensor:
        """(B, 3, H, W) to (B, embed_dim), of unit length with `normalize`."""
        features = self.vision_proj(self.tower.pooled(image, guidance, reduce=reduce))
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor, text: Tensor, step: Callable | None = None, **more: Any) -> Any:
        """As CLIP's, a dict of unit-length image_features and text_features, and logit_scale.

        With `step`: `step(self, image, text, **more)`, all passes of a training step within one call of the model.
        """
        if step is not None:
            return step(self, image, text, **more)
        return {
            "image_features": self.encode_image(image, normalize=True),
            "text_features": self.encode_text(text, normalize=True),
            "logit_scale": self.logit_scale.exp(),
        }


def init(module: nn.Module, std: float) -> None:
    """As BERT's, where no weights are at hand."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim >= 2:
            nn.init.trunc_normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
