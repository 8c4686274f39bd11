"""Hugging Face text towers: the model is built offline from a configuration in a folder."""

import itertools

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder

from open_clip_elip import TextFirstCustomTextCLIP, with_token_reduction, without_token_reduction
from open_clip_elip.blocks import is_untouched

from . import reference
from .tiny import REDUCTION, VISION, assert_images_train_their_own_tower_only, enliven, step

transformers = pytest.importorskip("transformers")

OPTIONS = {key: tuple(value) for key, value in REDUCTION.items() if key != "method"}
SHAPE = {
    "vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
MT5 = {"vocab_size": 64, "d_model": 24, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}


def build(folder, kind="bert", pooler="mean_pooler", proj="linear", reduce=True):
    configs = {
        "bert": lambda: transformers.BertConfig(**SHAPE, pad_token_id=0),
        "roberta": lambda: transformers.RobertaConfig(**SHAPE, pad_token_id=1),
        "xlm-roberta": lambda: transformers.XLMRobertaConfig(**SHAPE, pad_token_id=1),
        "mt5": lambda: transformers.MT5Config(**MT5, pad_token_id=0, decoder_start_token_id=0),
    }
    configs[kind]().save_pretrained(folder)
    text = {"hf_model_name": str(folder), "hf_model_pretrained": False, "hf_pooler_type": pooler, "hf_proj_type": proj}
    options = {"token_reduction": REDUCTION} if reduce else {}
    model = open_clip.create_model(
        "ViT-S-16", embed_dim=20, vision_cfg=VISION, text_cfg=text, force_custom_text=True, output_dict=True, **options
    )
    model = model.double().train()
    enliven(model)
    return model


def inputs(pad=0, batch=3):
    text = torch.full((batch, 10), pad)
    for sample in range(batch):
        text[sample, : 4 + sample] = torch.randint(3, 64, (4 + sample,))
        text[sample, 0] = 2
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64), text


WITH_CLS = [("bert", "roberta", "xlm-roberta"), ("mean_pooler", "cls_last_hidden_state_pooler"), ("linear", "mlp")]
WITHOUT_CLS = [("mt5", "mean_pooler", "linear"), ("bert", "cls_pooler", "linear")]


@pytest.mark.parametrize(("kind", "pooler", "proj"), [*itertools.product(*WITH_CLS), *WITHOUT_CLS])
def test_guidance_is_the_unpooled_cls_where_there_is_one_else_the_text_feature(tmp_path, kind, pooler, proj):
    model = build(tmp_path, kind, pooler, proj)
    assert type(model) is TextFirstCustomTextCLIP
    pad = model.text.config.pad_token_id
    image, text = inputs(pad)
    output = model(image, text)
    feature = model.encode_text(text)
    torch.testing.assert_close(output["text_features"], F.normalize(feature, dim=-1), rtol=0, atol=1e-12)
    if (kind, pooler, proj) not in WITHOUT_CLS:
        hidden = model.text.transformer(input_ids=text, attention_mask=(text != pad).long()).last_hidden_state
        feature = model.text.proj(hidden[:, 0])
    guidance = (feature @ model.visual.proj.T).detach()  # `match`: its own norm plays no part

    def run(blocks, x):
        return reference.run(blocks, x, guidance, **OPTIONS)[0]

    expected = reference.image_features(model.visual, image, run)
    torch.testing.assert_close(output["image_features"], expected, rtol=0, atol=1e-10)


def test_a_forward_replaced_on_the_class_is_obeyed(tmp_path, monkeypatch):
    model, (image, text) = build(tmp_path), inputs()
    assert is_untouched(model.text)
    forward = HFTextEncoder.forward
    monkeypatch.setattr(HFTextEncoder, "forward", lambda self, x: forward(self, x).roll(1, dims=-1))
    expected = model.encode_text(text, normalize=True)
    torch.testing.assert_close(model(image, text)["text_features"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pooler", ["mean_pooler", "cls_pooler"])
def test_no_gradient_reaches_the_text_tower_through_the_image(tmp_path, pooler):
    assert_images_train_their_own_tower_only(build(tmp_path, pooler=pooler), inputs())


def test_keeping_everything_is_plain_openclip(tmp_path):
    plain = build(tmp_path, reduce=False)
    assert type(plain) is open_clip.CustomTextCLIP
    model = with_token_reduction(plain, depths=(4,), keep_ratio=(1.0,))
    batch = inputs()
    torch.testing.assert_close(step(model, *batch), step(plain, *batch), rtol=0, atol=1e-10)
    assert type(without_token_reduction(model)) is open_clip.CustomTextCLIP


def test_evaluation_is_plain_openclip(tmp_path):
    model = build(tmp_path).eval()
    model.tower.shortcuts = False
    image, text = inputs()
    torch.testing.assert_close(model(image, text[:2]), without_token_reduction(model)(image, text[:2]), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_lock_text_tower_and_checkpointing(tmp_path, kind):
    model = build(tmp_path, kind)
    batch = inputs(pad=model.text.config.pad_token_id)
    model.lock_text_tower()
    _, expected = step(model, *batch)
    assert all(grad is None for name, grad in expected.items() if name.startswith("text.transformer."))
    assert all(grad is not None for name, grad in expected.items() if name.startswith(("visual.", "text.proj.")))
    model.set_grad_checkpointing()
    torch.testing.assert_close(step(model, *batch)[1], expected, rtol=0, atol=1e-12)
