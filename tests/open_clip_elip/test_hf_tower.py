"""Hugging Face text towers: the model is built offline from a configuration in a folder."""

import open_clip
import pytest
import torch
import torch.nn.functional as F

from open_clip_elip import TextFirstCustomTextCLIP, with_token_reduction, without_token_reduction

from . import reference
from .tiny import REDUCTION, VISION, contrastive_loss, enliven, gradients

transformers = pytest.importorskip("transformers")

OPTIONS = {key: tuple(value) for key, value in REDUCTION.items() if key != "method"}
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
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


def image_features_by_reference(model, image, guidance):
    visual = model.visual
    x, _, _ = reference.run(visual.transformer.resblocks, visual._embeds(image), guidance, **OPTIONS)
    pooled, _ = visual._pool(x)
    return F.normalize(pooled @ visual.proj, dim=-1)


@pytest.mark.parametrize("proj", ["linear", "mlp"])
@pytest.mark.parametrize(("kind", "pad"), [("bert", 0), ("roberta", 1), ("xlm-roberta", 1)])
@pytest.mark.parametrize("pooler", ["mean_pooler", "cls_last_hidden_state_pooler"])
def test_a_real_cls_is_the_guidance(tmp_path, kind, pad, pooler, proj):
    model = build(tmp_path, kind, pooler, proj)
    assert type(model) is TextFirstCustomTextCLIP
    image, text = inputs(pad)
    output = model(image, text)

    mask = (text != pad).long()
    cls = model.text.transformer(input_ids=text, attention_mask=mask).last_hidden_state[:, 0]
    guidance = (model.text.proj(cls) @ model.visual.proj.T).detach()
    expected = image_features_by_reference(model, image, guidance)  # `match`: the guidance's own norm plays no part
    torch.testing.assert_close(output["image_features"], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(output["text_features"], model.encode_text(text, normalize=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "pooler"), [("mt5", "mean_pooler"), ("bert", "cls_pooler")])
def test_a_tower_without_an_unpooled_cls_gives_its_text_feature(tmp_path, kind, pooler):
    model = build(tmp_path, kind, pooler)
    image, text = inputs()
    output = model(image, text)
    guidance = (model.encode_text(text) @ model.visual.proj.T).detach()
    expected = image_features_by_reference(model, image, guidance)
    torch.testing.assert_close(output["image_features"], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(output["text_features"], model.encode_text(text, normalize=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pooler", ["mean_pooler", "cls_pooler"])
def test_no_gradient_reaches_the_text_tower_through_the_image(tmp_path, pooler):
    model = build(tmp_path, pooler=pooler)
    model(*inputs())["image_features"].square().mul(torch.rand(20, dtype=torch.float64)).sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("visual."):
            assert parameter.grad is not None and parameter.grad.any(), name
        else:
            assert parameter.grad is None or not parameter.grad.any(), name


def test_keeping_everything_is_plain_openclip(tmp_path):
    plain = build(tmp_path, reduce=False)
    assert type(plain) is open_clip.CustomTextCLIP
    model = with_token_reduction(plain, depths=(4,), keep_ratio=(1.0,))
    image, text = inputs()
    contrastive_loss(plain(image, text)).backward()
    expected = gradients(plain)
    plain.zero_grad()
    contrastive_loss(model(image, text)).backward()
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=1e-10)
    assert type(without_token_reduction(model)) is open_clip.CustomTextCLIP


def test_evaluation_is_plain_openclip(tmp_path):
    model = build(tmp_path).eval()
    model.tower.shortcuts = False
    image, text = inputs()
    torch.testing.assert_close(model(image, text[:2]), without_token_reduction(model)(image, text[:2]), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_lock_text_tower_and_checkpointing(tmp_path, kind):
    model = build(tmp_path, kind)
    image, text = inputs(pad=model.text.config.pad_token_id)
    model.lock_text_tower()
    contrastive_loss(model(image, text)).backward()
    expected = gradients(model)
    assert all(grad is None for name, grad in expected.items() if name.startswith("text.transformer."))
    assert all(grad is not None for name, grad in expected.items() if name.startswith(("visual.", "text.proj.")))
    model.zero_grad()
    model.set_grad_checkpointing()
    contrastive_loss(model(image, text)).backward()
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=1e-12)
