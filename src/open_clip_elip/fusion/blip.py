"""BLIP (Li et al., ICML 2022): one text transformer that encodes, looks at the image, and writes captions.

With token reduction it is the BLIP of Guo et al., "ELIP": the caption's `[CLS]` guides the image tower in pre-training.
"""
from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextAttention, BlipTextLMHeadModel, BlipTextModel

from .base import AligningModel, FusionModel
from .bert import Memory, Tokens, read, run
from .generate import beam_search, sample
from .released import BLIP
from .shorter import Shortening, run_shorter

_LOOKS = re.compile(r"decoder\..*\.crossattention\.self\.(key|value)\.weight")
MERGED_FROM = 6  # NLVR2: the layers from here on merge what they find in two images


class MixedEncoderDecoder(FusionModel):
    """Image tower and text transformer, as every model of the family has them.

    The two last words of the vocabulary are `[DEC]` and `[ENC]`, which stand in place of `[CLS]` where a text is
    written, or looks at an image.

    Args:
        vision_cfg, token_reduction: see `FusionModel`.
        text_cfg: `bert`, options of transformers' `BlipTextConfig`.
        encoder, decoder: which of the two there are, as `text` and `decoder`.

    Raises:
        ValueError: an option does not fit.
    """

    names = BLIP
    IDLE = ("text.", "decoder.", "vision_proj.", "text_proj.", "itm_head.", "temp")

    def __init__(
        self, vision_cfg: dict[str, Any], text_cfg: dict[str, Any], token_reduction: dict[str, Any] | None = None, *,
        encoder: bool = True, decoder: bool = True,
    ):  # fmt: skip
        super().__init__(vision_cfg, token_reduction)
        config = text_config(text_cfg, vision_cfg["width"])
        self.width, words = config.hidden_size, config.vocab_size
        guides = encoder and not isinstance(self, AligningModel)  # which has projections between the widths
        if token_reduction is not None and guides and self.width != vision_cfg["width"]:
            raise ValueError(
                f"The text guides the image tower at its own width ({self.width}), and vision_cfg has another "
                f"({vision_cfg['width']}): take a model whose widths are equal, or leave out --vision-guided-reduction."
            )
        self.decode_id, self.encode_id = words - 2, words - 1
        if encoder:
            self.text = BlipTextModel(config, add_pooling_layer=False)
        if decoder:
            self.decoder = tied(BlipTextLMHeadModel(config))

    def decays(self, name: str, parameter: Tensor) -> bool:
        """All, as in BLIP's recipes."""
        return True

    def read(self, image_states: Tensor, once: bool = True) -> list[Memory]:
        bert = self.text if hasattr(self, "text") else self.decoder.bert
        return read(bert.encoder.layer, image_states, once=once and self.tower.shortcuts)

    def look(
        self, text: Tensor, memory: Sequence[Memory], which: Tensor | None = None, tokens: Tokens | None = None,
        how: Shortening | None = None, **more: Any,
    ) -> Tensor:  # fmt: skip
        """States of texts (B, L), token ids, that look at images; see `run_shorter`."""
        text, tokens = beginning_with(self.encode_id, text), tokens or Tokens(self.mask(text))
        more["shortcuts"], x = self.tower.shortcuts, self.text.embeddings(text)
        return run_shorter(how, self.half, self.text.encoder.layer, x, tokens, memory, which, **more)

    def next_words(
        self, text: Tensor, places: Tensor, memory: Sequence[Memory], which: Tensor | None = None,
        tokens: Tokens | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits (n, vocabulary) of what comes after `places` (n,) of texts (B, L), counted through all rows; see
        `bert.run`."""
        text, tokens, bert = beginning_with(self.decode_id, text), tokens or Tokens(self.mask(text)), self.decoder.bert
        x, more = bert.embeddings(text), {"causal": True, "shortcuts": self.tower.shortcuts}
        if self.tower.shortcuts:
            return self.decoder.cls(run(bert.encoder.layer, x, tokens, memory, which, only=places, **more))
        return self.decoder.cls(run(bert.encoder.layer, x, tokens, memory, which, **more)).flatten(0, 1)[places]


class Blip(MixedEncoderDecoder, AligningModel):
    """The model of pre-training and retrieval. Its encoder and decoder have all in common but self-attention.

    Args:
        embed_dim: width of the space of contrast.
        decoder: False: for retrieval, which has no use for it.
        others, errors: see `MixedEncoderDecoder`.
    """

    caption_length = 35  # tokens of captions in evaluation, `[CLS]` and `[SEP]` included
    adds_cosine = True
    UNTAUGHT = ("decoder",)

    def __init__(self, embed_dim: int, *args: Any, decoder: bool = True, **kwargs: Any):
        super().__init__(*args, decoder=decoder, **kwargs)
        self.add_heads(embed_dim, self.width)
        if decoder:
            share(self.text, self.decoder)

    def from_bert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Words that BERT does not know keep their weights."""
        found, own = {}, self.state_dict()
        for name, value in state.items():
            names = [f"decoder.{name}", *([f"text.{name.removeprefix('bert.')}"] if name.startswith("bert.") else [])]
            for name in names:
                if name in own:
                    more = own[name].shape[:1] != value.shape[:1] and own[name].shape[1:] == value.shape[1:]
                    found[name] = torch.cat([value, own[name][len(value) :]]) if more else value
        return found

    def match(self, states, text, memory, which=None, **more):
        """`states` have no part in it."""
        return self.itm_head(self.look(text, memory, which, only_first=True, **more)[:, 0])


class BlipCaptioner(MixedEncoderDecoder):
    """Writes captions."""

    taught = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, encoder=False, **kwargs)

    def write(self, image: Tensor, prompt: Tensor, end: int, sampled: bool = False, **limits: Any) -> Tensor:
        """(B, L) ids of captions of images (B, 3, H, W), by `generate.beam_search` or, with `sampled`, by `sample`."""
        memory = self.read(self.image_states(image))
        return (sample if sampled else beam_search)(self.decoder, memory, prompt, end, **limits)

    def forward(self, image: Tensor, text: Tensor, places: Tensor, tokens: Tokens | None = None) -> Tensor:
        """Of images (B, 3, H, W) and captions (B, L): see `next_words`."""
        return self.next_words(text, places, self.read(self.image_states(image)), tokens=tokens)


class BlipAnswerer(MixedEncoderDecoder):
    """Answers to questions about images: a decoder, not tied to the encoder, looks at the states of the question."""

    taught = False

    def __init__(self, vision_cfg: dict[str, Any], text_cfg: dict[str, Any], *args: Any, **kwargs: Any):
        super().__init__(vision_cfg, text_cfg, *args, decoder=False, **kwargs)
        self.decoder = tied(BlipTextLMHeadModel(text_config(text_cfg, self.width)))
        if self.width != vision_cfg["width"]:  # pre-training's decoder looks at images, this one at texts
            self.NEW = tuple(name for name, _ in self.named_parameters() if _LOOKS.match(name))

    def from_pretraining(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        own = self.state_dict()
        return {name: v for name, v in state.items() if name not in self.NEW or v.shape == own[name].shape}

    @property
    def lm_head(self) -> nn.Module:
        return self.decoder.cls

    def read_questions(self, image: Tensor, text: Tensor, reduce: bool = False) -> list[Memory]:
        """What the decoder reads of Q questions (Q, L) about as many images (Q, 3, H, W)."""
        guidance = self.text_states(text, only_first=True)[:, 0] if reduce else None
        images = self.image_states(image, guidance, reduce=reduce)
        states, layers = self.look(text, self.read(images, once=False)), self.decoder.bert.encoder.layer
        return read(layers, states, self.mask(text), once=self.tower.shortcuts)

    def answer_states(self, answers: Tensor, memory: Sequence[Memory], which: Tensor | None = None) -> Tensor:
        """(A, L, D) of answers (A, L), token ids, each to question `which` (A,) of the memory."""
        answers, bert = beginning_with(self.decode_id, answers), self.decoder.bert
        x, more = bert.embeddings(answers), {"causal": True, "shortcuts": self.tower.shortcuts}
        return run(bert.encoder.layer, x, Tokens(self.mask(answers)), memory, which, **more)

    def forward(self, step: Callable, *args: Any, **kwargs: Any) -> Any:
        """`step(self, ...)`, all passes of a training step within one call of the model."""
        return step(self, *args, **kwargs)


class BlipPairClassifier(MixedEncoderDecoder):
    """Classes of a sentence about two images (NLVR2), at which each layer looks with a cross-attention of its own."""

    taught = False
    NEW = ("head.", *(f"text.encoder.layer.{n}.crossattention.output.merge_layer." for n in range(MERGED_FROM, 99)))

    def __init__(self, num_classes: int, *args: Any, **kwargs: Any):
        super().__init__(*args, decoder=False, **kwargs)
        for number, layer in enumerate(self.text.encoder.layer):
            layer.crossattention = PairAttention(layer.crossattention, merge=number >= MERGED_FROM)
        self.head = nn.Sequential(nn.Linear(self.width, self.width), nn.ReLU(), nn.Linear(self.width, num_classes))

    def from_pretraining(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, value in state.items():
            once = re.search(r"^text\..*\.crossattention\.(self|output\.dense)\.", name)
            both = [name.replace(f".{once[1]}.", f".{once[1]}{n}.", 1) for n in (0, 1)] if once else [name]
            found |= dict.fromkeys(both, value)
        return found

    def forward(self, image: Tensor, text: Tensor, reduce: bool = False) -> Tensor:
        """(2B, 3, H, W), all first images first, and (B, L) token ids to logits (B, num_classes)."""
        guidance = self.text_states(text, only_first=True)[:, 0].repeat(2, 1) if reduce else None
        both = torch.cat(self.image_states(image, guidance, reduce=reduce).chunk(2), dim=2)
        return self.head(self.look(text, self.read(both), only_first=True)[:, 0])


class PairAttention(nn.Module):
    """Two cross-attentions of the same tokens, to first and second images, whose states lie beside each other: as one
    that has the heads of both.

    Args:
        once: what both begin as.
        merge: what they find is put together by a layer; else it is averaged.
    """

    def __init__(self, once: BlipTextAttention, merge: bool):
        super().__init__()
        self.self0, self.self1 = once.self, copy.deepcopy(once.self)
        self.output, self.dropout = PairOutput(once.output, merge), once.self.dropout
        self.num_attention_heads = 2 * once.self.num_attention_heads

    @property
    def self(self) -> PairAttention:
        """Where a cross-attention of transformers has its parts."""
        return self

    def query(self, x: Tensor) -> Tensor:
        return torch.cat([self.self0.query(x), self.self1.query(x)], dim=-1)

    def key(self, states: Tensor) -> Tensor:
        first, second = states.chunk(2, dim=-1)
        return torch.cat([self.self0.key(first), self.self1.key(second)], dim=-1)

    def value(self, states: Tensor) -> Tensor:
        first, second = states.chunk(2, dim=-1)
        return torch.cat([self.self0.value(first), self.self1.value(second)], dim=-1)


class PairOutput(nn.Module):
    """What a `PairAttention` makes of both findings."""

    def __init__(self, once: nn.Module, merge: bool):
        super().__init__()
        self.dense0, self.dense1 = once.dense, copy.deepcopy(once.dense)
        self.dropout, self.LayerNorm = once.dropout, once.LayerNorm
        self.merge_layer = nn.Linear(2 * once.dense.out_features, once.dense.out_features) if merge else None

    def forward(self, found: Tensor, x: Tensor) -> Tensor:
        """found: (n, 2D); x: (n, D)."""
        first, second = (dense(one) for dense, one in zip((self.dense0, self.dense1), found.chunk(2, -1), strict=True))
        if self.merge_layer is None:
            merged = (first + second) / 2
        else:
            merged = self.merge_layer(torch.cat([first, second], dim=-1))
        return self.LayerNorm(self.dropout(merged) + x)


def text_config(text_cfg: dict[str, Any], looks_at: int) -> BlipTextConfig:
    """With cross-attention to states of the width `looks_at`."""
    own = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, **text_cfg["bert"]}
    decode = own["vocab_size"] - 2  # transformers' own number is none of a small vocabulary's, of which it warns
    return BlipTextConfig(**own, bos_token_id=decode, is_decoder=True, encoder_hidden_size=looks_at)


def tied(decoder: BlipTextLMHeadModel) -> BlipTextLMHeadModel:
    """With the word embeddings as output weights, whatever transformers does about it."""
    head = decoder.cls.predictions
    head.decoder.weight, head.decoder.bias = decoder.bert.embeddings.word_embeddings.weight, head.bias
    return decoder


def share(encoder: BlipTextModel, decoder: BlipTextLMHeadModel) -> None:
    """Gives the decoder the encoder's embeddings, and of each layer all but self-attention."""
    decoder.bert.embeddings = encoder.embeddings
    for one, other in zip(decoder.bert.encoder.layer, encoder.encoder.layer, strict=True):
        one.crossattention, one.intermediate, one.output = other.crossattention, other.intermediate, other.output
    tied(decoder)


def beginning_with(token: int, text: Tensor) -> Tensor:
    """(B, L) ids with another first token."""
    text = text.clone()
    text[:, 0] = token
    return text
