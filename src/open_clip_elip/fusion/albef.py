"""ALBEF (Li et al., "Align before Fuse", NeurIPS 2021): image and text are aligned, then fused.

With token reduction, that of Guo et al., "ELIP": in pre-training the caption's `[CLS]` guides the image tower.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import released
from .base import AligningModel, FusionModel
from .bert import Memory, Tokens, fusion_layers, read, run, text_encoder
from .shorter import Shortening, run_shorter


class Encoders(FusionModel):
    """Image tower, text encoder and fusion layers, as every model of the family has them.

    Args:
        vision_cfg, token_reduction: see `FusionModel`.
        text_cfg: `bert`, options of transformers' `BertConfig`; `fusion_layer`, the first that looks at the image;
            `initializer_range`, of the text layers' matrices alone, where they are trained from nothing: with BERT's
            own the `[CLS]` of all texts begin as nearly one.
        language_head: keep BERT's, as `mlm_head`.

    Raises:
        ValueError: the widths of image tower and BERT differ, or an option does not fit.
    """

    def __init__(
        self, vision_cfg: dict[str, Any], text_cfg: dict[str, Any], token_reduction: dict[str, Any] | None = None, *,
        language_head: bool = False,
    ):  # fmt: skip
        super().__init__(vision_cfg, token_reduction)
        bert, first = text_cfg["bert"], text_cfg["fusion_layer"]
        self.width, self.names = bert["hidden_size"], released.albef(first)
        if vision_cfg["width"] != self.width:
            raise ValueError(
                f"The fusion layers read the image at the text's width, so the width of vision_cfg "
                f"({vision_cfg['width']}) and BERT's hidden_size ({self.width}) must be equal."
            )
        self.text, head = text_encoder(bert, first)
        for layer in self.text.encoder.modules() if "initializer_range" in text_cfg else ():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=text_cfg["initializer_range"])
        if language_head:
            self.mlm_head = head
        self.fusion = fusion_layers(bert, bert["num_hidden_layers"] - first)

    IDLE = ("vision_proj.", "text_proj.", "itm_head.", "mlm_head.", "temp", "head.weight", "head.bias")

    @property
    def half(self) -> int:
        return (len(self.text.encoder.layer) + len(self.fusion)) // 2

    def read(self, image_states: Tensor, once: bool = True) -> list[Memory]:
        return read(self.fusion, image_states, once=once and self.tower.shortcuts)

    def fuse(
        self, states: Tensor, text: Tensor, memory: Sequence[Memory], which: Tensor | None = None,
        tokens: Tokens | None = None, how: Shortening | None = None, **more: Any,
    ) -> Tensor:  # fmt: skip
        """See `run_shorter`; `states` (B, L, D) are those of `text` (B, L)."""
        tokens, first = tokens or Tokens(self.mask(text)), self.half - len(self.text.encoder.layer)
        more["shortcuts"] = self.tower.shortcuts
        return run_shorter(how, first, self.fusion, states, tokens, memory, which, **more)


class Albef(Encoders, AligningModel):
    """The model of pre-training and retrieval.

    Args:
        embed_dim: width of the space of contrast.
        language_head: False: for retrieval, which has no use for it.
        others, errors: see `Encoders`.
    """

    caption_length = 30  # tokens of captions in evaluation, `[CLS]` included, whatever there are in training

    def __init__(self, embed_dim: int, *args, language_head: bool = True, **kwargs):
        super().__init__(*args, language_head=language_head, **kwargs)
        self.add_heads(embed_dim, self.width)

    def reduce_texts(self, reduction):
        if self.half < len(self.text.encoder.layer):
            raise ValueError(
                "Text reduction begins in the middle of BERT's layers, where an ALBEF fuses already: take a "
                f"fusion_layer of at most {self.half}."
            )
        super().reduce_texts(reduction)

    def match(self, states, text, memory, which=None, **more):
        return self.itm_head(self.fuse(states, text, memory, which, only_first=True, **more)[:, 0])

    def words(
        self, masked: Tensor, chosen: Tensor, memory: Sequence[Memory], tokens: Tokens, how: Shortening | None = None
    ) -> Tensor:
        """Logits (n, vocabulary) of what is at the places `chosen` (n,) of texts (B, L), counted through all rows.

        Args:
            masked: (B, L) token ids, each text looking at its own image.
            memory, tokens: see `bert.run`.
            how: texts lose tokens, but none of the chosen ones; None: they do not.
        """
        how = None if how is None else how._replace(stays=chosen)
        only, states = chosen if self.tower.shortcuts else None, self.text_states(masked, tokens)
        logits = self.mlm_head(self.fuse(states, masked, memory, tokens=tokens, only=only, how=how))
        return logits if self.tower.shortcuts else logits.flatten(0, 1)[chosen]


class AlbefClassifier(Encoders):
    """Classes of a sentence about one image (visual entailment), or about two (NLVR2).

    For two images each fusion layer is two, the first for the first image, with keys and values in common.

    Args:
        num_classes, num_images: 1 or 2.
        others, errors: see `Encoders`.
    """

    NEW = ("head.",)

    def __init__(self, num_classes: int, num_images: int, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_images = num_images
        self.head = nn.Sequential(nn.Linear(self.width, self.width), nn.ReLU(), nn.Linear(self.width, num_classes))
        if num_images == 2:
            self.fusion = nn.ModuleList(copy.deepcopy(layer) for layer in self.fusion for _ in range(2))
            for first, second in zip(self.fusion[::2], self.fusion[1::2], strict=True):
                first.crossattention.self.key = second.crossattention.self.key
                first.crossattention.self.value = second.crossattention.self.value

    def from_pretraining(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        layers = [name.split(".", 2) for name in state if name.startswith("fusion.")]
        if self.num_images == 1 or len({number for _, number, _ in layers}) == len(self.fusion):
            return state
        found = {name: value for name, value in state.items() if not name.startswith("fusion.")}
        for _, number, rest in layers:
            value = state[f"fusion.{number}.{rest}"]
            found |= {f"fusion.{2 * int(number) + place}.{rest}": value for place in (0, 1)}
        return found

    def read(self, image_states: Tensor, once: bool = False) -> list[Memory]:
        """Of two images a sentence, the states (2B, N, D) are those of all first images, then of all second ones."""
        if self.num_images == 1:
            return super().read(image_states, once)
        half = len(image_states) // 2
        return [part for one in read(self.fusion[::2], image_states, once=once) for part in (one[:half], one[half:])]

    def forward(self, image: Tensor, text: Tensor, reduce: bool = False) -> Tensor:
        """(num_images * B, 3, H, W), all first images first, and (B, L) token ids to logits (B, num_classes)."""
        states = self.text_states(text)
        guidance = states[:, 0].repeat(self.num_images, 1) if reduce else None
        memory = self.read(self.image_states(image, guidance, reduce=reduce))
        return self.head(self.fuse(states, text, memory, only_first=True)[:, 0])


class AlbefAssigner(AlbefClassifier):
    """Says which of two images a text belongs to, or that it is neither: the step between pre-training and NLVR2.

    Args:
        embed_dim: width of the space of contrast, whose projection of images stays as it was.
        others, errors: see `Encoders`.
    """

    def __init__(self, embed_dim: int, *args, **kwargs):
        super().__init__(3, 2, *args, **kwargs)
        self.head = nn.Linear(self.width, 3)
        self.vision_proj = nn.Linear(self.width, embed_dim).requires_grad_(False)

    def forward(self, image: Tensor, text: Tensor, choose: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """(B, 3, H, W), (B, L) token ids to logits (B, 3).

        Args:
            choose: from unit-length features (B, embed_dim) to the first and the second image of each text, (B,) each.
        """
        image_states = self.image_states(image)
        first, second = choose(F.normalize(self.vision_proj(image_states[:, 0]).detach(), dim=-1))
        memory = read(self.fusion[::2], image_states, once=self.tower.shortcuts)
        memory = [part for one in memory for part in (one[first], one[second])]
        return self.head(self.fuse(self.text_states(text), text, memory, only_first=True)[:, 0])


class AlbefAnswerer(Encoders):
    """Answers to questions about images: a decoder that looks at the fused states of the question."""

    def __init__(self, vision_cfg: dict[str, Any], text_cfg: dict[str, Any], *args, **kwargs):
        super().__init__(vision_cfg, text_cfg, *args, **kwargs)
        bert, layers = text_cfg["bert"], len(self.fusion)
        decoder, self.lm_head = text_encoder(bert, layers)
        self.embeddings, self.decoder = decoder.embeddings, fusion_layers(bert, layers)

    def from_pretraining(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The decoder starts as fusion layers."""
        if any(name.startswith("decoder.") for name in state):
            return state
        found = {name: value for name, value in state.items() if not name.startswith("mlm_head.")}
        starts = (("fusion.", "decoder."), ("text.embeddings.", "embeddings."), ("mlm_head.", "lm_head."))
        return found | {
            name.replace(old, new, 1): value
            for old, new in starts
            for name, value in state.items()
            if name.startswith(old)
        }

    def read_questions(self, image: Tensor, text: Tensor, reduce: bool = False) -> list[Memory]:
        """What the decoder reads of Q questions (Q, L) about as many images (Q, 3, H, W)."""
        states = self.text_states(text)
        images = self.image_states(image, states[:, 0] if reduce else None, reduce=reduce)
        fused = self.fuse(states, text, self.read(images, once=False))
        return read(self.decoder, fused, self.mask(text), once=self.tower.shortcuts)

    def answer_states(self, answers: Tensor, memory: Sequence[Memory], which: Tensor | None = None) -> Tensor:
        """(A, L, D) of answers (A, L), token ids, each to question `which` (A,) of the memory."""
        x, more = self.embeddings(answers), {"causal": True, "shortcuts": self.tower.shortcuts}
        return run(self.decoder, x, Tokens(self.mask(answers)), memory, which, **more)

    def forward(self, step: Callable, *args, **kwargs) -> Any:
        """`step(self, ...)`, all passes of a training step within one call of the model."""
        return step(self, *args, **kwargs)
