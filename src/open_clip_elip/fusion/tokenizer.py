"""Text as fusion models take it: cleaned by the rules of the released programs, in WordPiece tokens."""
from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoTokenizer

_BLIP = re.compile(r"[.!\"()*#:;~]")
_ALBEF = re.compile(r"[,.'!?\"()*#:;~]")


def albef_caption(text: str, words: int = 30) -> str:
    """ALBEF's rule for captions and sentences: no punctuation, one space between at most `words` words."""
    text = _ALBEF.sub("", text.lower()).replace("-", " ").replace("/", " ").replace("<person>", "person")
    return " ".join(re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ").split(" ")[:words])


def albef_question(text: str, words: int = 30) -> str:
    """ALBEF's rule for questions, which leaves runs of spaces alone."""
    text = _ALBEF.sub("", text.lower()).replace("-", " ").replace("/", " ")
    return " ".join(text.rstrip(" ").split(" ")[:words])


def blip_caption(text: str, words: int = 30) -> str:
    """BLIP's rule for captions and sentences: punctuation, but for the comma and others, becomes space."""
    text = re.sub(r"\s{2,}", " ", _BLIP.sub(" ", text.lower())).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:words])


def blip_question(text: str, words: int = 50) -> str:
    """BLIP's rule for questions: punctuation is removed."""
    return " ".join(_BLIP.sub("", text.lower()).rstrip(" ").split(" ")[:words])


class Rules(NamedTuple):
    """How a family cleans texts, and at how many tokens it cuts them in fine-tuning; None: not at all."""

    caption: Callable[..., str]
    question: Callable[..., str]
    longest_caption: int | None
    longest_question: int | None
    longest_sentence: int | None = None


RULES = {
    "albef": Rules(albef_caption, albef_question, None, None),
    "blip": Rules(blip_caption, blip_question, 35, 35),
    "meter": Rules(str, str, 40, 50, 50),
}


class WordPieces:
    """Texts to token ids, `[CLS]` first.

    Args:
        vocabulary: a name on Hugging Face, or a folder or file (`vocab.txt`) of one's own.
        context_length: of how many tokens a text has, `[CLS]` included; longer ones are cut.
        clean: what is done to a text first.
        ends: with `[SEP]`, as BLIP's texts do; ALBEF is trained without.
        own: words that are the model's own, by their ids; the vocabulary may have them there, or nothing.

    Raises:
        ValueError: the vocabulary cannot be had, or has other words in those places.
    """

    def __init__(
        self, vocabulary: str, context_length: int, clean: Callable[[str], str] = albef_caption, *,
        ends: bool = False, own: Mapping[int, str] | None = None,
    ):  # fmt: skip
        if Path(vocabulary).name == "vocab.txt":
            vocabulary = str(Path(vocabulary).parent)
        # A folder with nothing else does not say that its words are WordPiece's.
        kind = {"tokenizer_type": "bert"} if (Path(vocabulary) / "vocab.txt").is_file() else {}
        self.context_length, self.clean = context_length, clean
        try:
            self.pieces = AutoTokenizer.from_pretrained(vocabulary, **kind)
            self.pieces("\N{SNOWMAN}")  # an unknown word, which an empty vocabulary has no token for
        except Exception as error:  # tokenizers raises no other
            raise ValueError(
                f"There is no vocabulary {vocabulary}: give --text-tokenizer a folder with a vocab.txt, or a name on "
                "Hugging Face that can be reached."
            ) from error
        for number, word in (own or {}).items():
            if number < len(self.pieces) and (other := self.pieces.convert_ids_to_tokens(number)) != word:
                raise ValueError(f"Token {number} of the vocabulary is {other!r}, where the model has {word}.")
        start, end = self.pieces.cls_token, self.pieces.sep_token
        self.pieces.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{start} $A {end}" if ends else f"{start} $A",
            special_tokens=[(start, self.pieces.cls_token_id), (end, self.pieces.sep_token_id)],
        )

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that tell this vocabulary from others, wherever it lies."""
        words = sorted(self.pieces.get_vocab().items(), key=itemgetter(1))
        return hashlib.sha256(repr(words).encode()).hexdigest()[:16]

    @property
    def pad(self) -> int:
        """The id of padding."""
        return self.pieces.pad_token_id

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """(n, context length) ids of n texts, padded."""
        texts = [self.clean(text) for text in ([texts] if isinstance(texts, str) else texts)]
        found = self.pieces(
            texts, padding="max_length", truncation=True, max_length=context_length or self.context_length
        )
        return torch.tensor(found["input_ids"])
