"""METER (Dou et al., CVPR 2022): CLIP's ViT and a BERT or RoBERTa, whose states look at each other in two streams.

With token reduction it is the METER of Guo et al., "ELIP": the text's first state guides the image tower.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel
from transformers.models.bert.modeling_bert import BertLayer, BertPooler, BertPredictionHeadTransform

from .base import FusionModel, init
from .bert import Memory, Tokens, fusion_layers, read, run
from .released import METER
from .shorter import Shortening, Shorter, shorten

_TEXT = {"bert": (BertConfig, BertModel), "roberta": (RobertaConfig, RobertaModel)}


class CoAttention(FusionModel):
    """Image tower, text encoder and the two streams, as every model of the family has them.

    Args:
        embed_dim: width H of the streams.
        vision_cfg: see `FusionModel`; its `layers` are CLIP's but the last.
        text_cfg: `bert`, options of transformers' `BertConfig`, or of its `RobertaConfig` with the `model_type`
            "roberta"; `fusion`, options of a `BertConfig` of the streams' layers, all but H.
        token_reduction: see `FusionModel`.
        num_images: that a text looks at, 1 or 2.

    Raises:
        ValueError: an option does not fit.
    """

    names, taught, quick_gelu, conv_bias = METER, False, True, False
    rates: Mapping[str, float] = {"cross_modal": 5}
    IDLE = ("mlm_head.", "itm_head.", "rank_output.", "head.")

    def __init__(
        self, embed_dim: int, vision_cfg: dict[str, Any], text_cfg: dict[str, Any],
        token_reduction: dict[str, Any] | None = None, *, num_images: int = 1,
    ):  # fmt: skip
        super().__init__(vision_cfg, token_reduction)
        kind, model = _TEXT[text_cfg.get("model_type", "bert")]
        text, width = kind(**text_cfg["bert"]), vision_cfg["width"]
        if token_reduction is not None and text.hidden_size != width:
            raise ValueError(
                f"The text guides the image tower at its own width ({text.hidden_size}), and vision_cfg has another "
                f"({width}): take a model whose widths are equal, or --token-reduction none."
            )
        self.text, self.num_images = model(text, add_pooling_layer=False), num_images
        self.width, self.pad, self.context_length = text.hidden_size, text.pad_token_id, text_cfg["context_length"]
        options = {"hidden_size": embed_dim, "vocab_size": 1, **text_cfg["fusion"]}
        self.config = BertConfig(**options)
        self.add(
            cross_modal_text_transform=nn.Linear(self.width, embed_dim),
            cross_modal_image_transform=nn.Linear(width, embed_dim),
            token_type_embeddings=nn.Embedding(1 + num_images, embed_dim),
            cross_modal_text_layers=fusion_layers(options, self.config.num_hidden_layers),
            cross_modal_image_layers=fusion_layers(options, self.config.num_hidden_layers),
            cross_modal_text_pooler=BertPooler(self.config),
            cross_modal_image_pooler=BertPooler(self.config),
        )

    def add(self, **parts: nn.Module) -> None:
        """Parts that begin at random."""
        for name, part in parts.items():
            setattr(self, name, part.apply(partial(init, std=self.config.initializer_range)))

    def decays(self, name: str, parameter: Tensor) -> bool:
        """As the release, which finds what normalises by the names that BERT's layers have: not in the image tower."""
        return "bias" not in name and "LayerNorm.weight" not in name

    def from_image_tower(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of CLIP, of whose image tower the last layer and the projection have no place here."""
        own = self.state_dict()
        return {name: value for name, value in state.items() if name.startswith("visual.") and name in own}

    def from_bert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = (name.partition(".") for name in state)
        found = {f"text.{rest}": state[f"{part}.{rest}"] for part, _, rest in parts if part in _TEXT}
        return {name: value for name, value in found.items() if not name.startswith("text.pooler.")}

    def from_pretraining(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A second image begins as the first, and is left out where there is none."""
        name, types = "token_type_embeddings.weight", 1 + self.num_images
        rows = state.get(name)
        if rows is None or len(rows) == types:
            return state
        return state | {name: torch.cat([rows, rows[-1:]])[:types]}

    def image_stream(self, image_states: Tensor, kind: int | Tensor = 1) -> Tensor:
        """(B, N, D) to what the streams begin with, (B, N, H); `kind`: 1, or 2 for second images, or (B,) of these."""
        types = self.token_type_embeddings.weight[kind]
        return self.cross_modal_image_transform(image_states) + (types[:, None] if types.ndim > 1 else types)

    def streams(
        self, states: Tensor, tokens: Tokens, image: Tensor, *, only_first: bool = False, only: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What text and image are after the streams' layers, each of which reads both outputs of the one before.

        Args:
            states: (B, L, D) `text_states`; tokens: of (B, L).
            image: (B, N, H) `image_stream`.
            only_first, only: see `bert.run`. `only`: the image is as before its last layer, for no text reads more.
        """
        text = self.cross_modal_text_transform(states) + self.token_type_embeddings.weight[0]
        pixels, mask, shortcuts = Tokens.all_of(image), tokens.mask.to(image.device), self.tower.shortcuts
        layers = list(zip(self.cross_modal_text_layers, self.cross_modal_image_layers, strict=True))
        for number, (of_text, of_image) in enumerate(layers, 1):
            last, more = number == len(layers), {"shortcuts": shortcuts}
            more |= {"only_first": only_first} if last else {}
            seen = self._memory(of_text, image, 1 if last and only_first else text.shape[1])
            read_on = run([of_text], text, tokens, seen, only=only if last else None, **more)
            if not (shortcuts and last and only is not None):
                seen = self._memory(of_image, text, 1 if last and only_first else image.shape[1], mask)
                image = run([of_image], image, pixels, seen, **more)
            text = read_on
        return text, image

    def _memory(self, layer: BertLayer, states: Tensor, asking: int, mask: Tensor | None = None) -> list[Memory]:
        """For `asking` tokens, which may be so few that it is less work to leave keys and values out."""
        (_, length, width), heads = states.shape, self.config.num_attention_heads
        once = asking * (width + (heads - 1) * length) >= length * width
        return read([layer], states, mask, once=once and self.tower.shortcuts)

    def pooled(self, states: Tensor, tokens: Tokens, image: Tensor) -> Tensor:
        """(B, 2H): what the poolers make of text and image; arguments as `streams`."""
        text, image = self.streams(states, tokens, image, only_first=True)
        return torch.cat([self.cross_modal_text_pooler(text), self.cross_modal_image_pooler(image)], dim=-1)

    def forward(self, image: Tensor, text: Tensor, step: Callable, **more: Any) -> Any:
        """`step(self, image, text, ...)`, all passes of a training step within one call of the model."""
        return step(self, image, text, **more)


class Meter(CoAttention):
    """The model of pre-training: with heads of masked words, and of matching."""

    caption_length = 40  # tokens of captions in retrieval, first and last included
    rates = {"cross_modal": 5, "mlm_head": 5, "itm_head": 5}

    def __init__(self, embed_dim: int, *args: Any, **kwargs: Any):
        super().__init__(embed_dim, *args, **kwargs)
        self.add(itm_head=nn.Linear(2 * embed_dim, 2))
        self.add_task(embed_dim)

    def add_task(self, embed_dim: int) -> None:
        words = nn.Linear(embed_dim, self.text.config.vocab_size)  # not tied to the text encoder's
        self.add(mlm_head=nn.Sequential(BertPredictionHeadTransform(self.config), words))

    def reduce_texts(self, reduction):
        if reduction.rule == "learned" and self.visual.output_dim != self.width:
            raise ValueError(
                f"The image chooses among the text's tokens at their width ({self.width}), and vision_cfg has another "
                f"({self.visual.output_dim}): take --text-reduction post or random."
            )
        super().reduce_texts(reduction)

    def read_text(self, text: Tensor, tokens: Tokens, how: Shortening | None = None) -> Shorter:
        """States of texts (B, L), token ids, and what the streams go on with."""
        if how is None:
            return Shorter(self.text_states(text, tokens), tokens)
        layers = self.text.encoder.layer
        x = run(layers[: self.half], self.text.embeddings(text), tokens)
        left = shorten(how, layers[self.half], x, tokens)
        return left._replace(states=run(layers[self.half :], left.states, left.tokens))

    def words(self, states: Tensor, tokens: Tokens, image: Tensor, chosen: Tensor) -> Tensor:
        """Logits (n, vocabulary) of what is at the places `chosen` (n,) of texts (B, L), counted through all rows;
        other arguments as `streams`."""
        if self.tower.shortcuts:
            return self.mlm_head(self.streams(states, tokens, image, only=chosen)[0])
        return self.mlm_head(self.streams(states, tokens, image)[0]).flatten(0, 1)[chosen]

    def judge(self, pooled: Tensor) -> Tensor:
        """(B, 2H) to logits (B, 2) that text and image do not belong together, or do."""
        return self.itm_head(pooled)

    def to_match(self, image: Tensor) -> Tensor:
        """What `match` needs of images (B, 3, H, W): their states, or, where each text reduces them, themselves."""
        by_text = self.tower.vision_guided and self.tower.reduction.uses_text
        return image if by_text else self.image_states(image)

    def read(self, image: Tensor, once: bool = True) -> Tensor:
        """Of one image, (1, ...), out of `to_match`."""
        return image if image.ndim == 4 else self.image_stream(image)

    def match(self, states: Tensor, text: Tensor, image: Tensor) -> Tensor:
        """Logits (P, 2), see `judge`, of texts (P, L), token ids, with an image, out of `read`; `states` (P, L, D)."""
        if image.ndim == 4:
            which = torch.zeros(len(text), dtype=torch.long, device=text.device)
            image = self.image_stream(self.image_states(image, states[:, 0].contiguous(), reduce=True, which=which))
        return self.judge(self.pooled(states, Tokens(self.mask(text)), image.expand(len(text), -1, -1)))


class MeterRetriever(Meter):
    """Ranks captions. The head of matching stays as it was, and ranks by what it began as: its second row."""

    rates = {"cross_modal": 5}

    def add_task(self, embed_dim: int) -> None:
        self.itm_head.requires_grad_(False)
        self.add(rank_output=nn.Linear(2 * embed_dim, 1))

    def from_pretraining(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        heads = {one: value for one in ("weight", "bias") if (value := state.get(f"itm_head.{one}")) is not None}
        rows = {f"rank_output.{one}": value[1:].clone() for one, value in heads.items()}
        return rows | super().from_pretraining(state)

    def judge(self, pooled: Tensor) -> Tensor:
        """Nothing but the second column ranks."""
        return F.pad(self.rank_output(pooled), (1, 0))


class MeterClassifier(CoAttention):
    """Classes of a sentence or question about one image (entailment, VQA), or about two (NLVR2).

    Args:
        rate: what multiplies the head's learning rate.
        others, errors: see `CoAttention`.
    """

    NEW = ("head.",)

    def __init__(self, num_classes: int, rate: float, embed_dim: int, *args: Any, **kwargs: Any):
        super().__init__(embed_dim, *args, **kwargs)
        self.rates, wide = self.rates | {"head": rate}, 2 * embed_dim
        layers = nn.Linear(wide * self.num_images, wide), nn.LayerNorm(wide), nn.GELU(), nn.Linear(wide, num_classes)
        self.add(head=nn.Sequential(*layers))

    def forward(self, image: Tensor, text: Tensor, reduce: bool = False) -> Tensor:
        """(num_images * B, 3, H, W), all first images first, and (B, L) token ids to logits (B, num_classes)."""
        count, states = self.num_images, self.text_states(text)
        states, mask = states.repeat(count, 1, 1), self.mask(text).repeat(count, 1)
        images = self.image_states(image, states[:, 0].contiguous() if reduce else None, reduce=reduce)
        kinds = torch.arange(1, 1 + count, device=text.device).repeat_interleave(len(text))
        pooled = self.pooled(states, Tokens(mask), self.image_stream(images, kinds))
        return self.head(torch.cat(pooled.chunk(count), dim=-1))
