"""A tiny ALBEF, a tiny BLIP and a tiny METER with a vocabulary of their own, for runs on files."""
from __future__ import annotations

import json

from .runs import WORDS, write_model

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ALBEF = {
    "family": "albef",
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32, "patch_size": 8, "layers": 6, "width": 32, "head_width": 16, "no_ln_pre": True,
        "norm_kwargs": {"eps": 1e-6},
    },
    "text_cfg": {
        "context_length": 12, "hf_tokenizer_name": "here", "fusion_layer": 2,
        "bert": {
            "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64,
            "vocab_size": 64, "max_position_embeddings": 40,
        },
    },
    "token_reduction": {"method": "elip"},
    "preprocess_cfg": {"resize_mode": "squash"},
}  # fmt: skip
METER = {
    "family": "meter",
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 6, "width": 32, "head_width": 16},
    "text_cfg": {
        "context_length": 12, "hf_tokenizer_name": "here",
        "bert": {k: v for k, v in ALBEF["text_cfg"]["bert"].items() if k != "num_hidden_layers"} | {
            "num_hidden_layers": 2},
        "fusion": {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    },
    "token_reduction": {"method": "elip"},
}  # fmt: skip
BLIP = ALBEF | {"family": "blip", "text_cfg": {k: v for k, v in ALBEF["text_cfg"].items() if k != "fusion_layer"}}


def write_vocabulary(folder, words=("a", "thing", *WORDS)):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join((*SPECIAL, *words)) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder


def write_albef(folder, weights=None, **changes) -> str:
    return write_fusion(folder, ALBEF | changes, weights)


def write_fusion(folder, config=BLIP, weights=None) -> str:
    """The name of a model in this folder, by which each process finds it."""
    write_model(folder, config, weights)
    return f"local-dir:{write_vocabulary(folder)}"
