"""The private names of open_clip that this package leans on.

When one of these fails after an upgrade of open_clip, the message says which line of ours to change.
"""

import inspect

import open_clip
import pytest
import torch
from open_clip import factory
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

import open_clip_elip  # noqa: F401  the seams are looked at as the package leaves them

from .tiny import plain_model


@pytest.fixture
def visual():
    return plain_model().visual


@pytest.mark.parametrize("name", ["CLIP", "CustomTextCLIP"])
def test_the_factory_looks_its_classes_up_as_globals(name, monkeypatch):
    advice = (
        f"open_clip.factory.create_model no longer builds its models through the module global `{name}`; "
        "change open_clip_elip/registry.py, which replaces that global."
    )
    assert hasattr(factory, name), advice
    asked = []

    def build(**kwargs):
        asked.append(kwargs)
        raise KeyboardInterrupt  # leaves create_model at once; nothing in it catches this

    build.__name__ = name
    monkeypatch.setattr(factory, name, build)
    with pytest.raises(KeyboardInterrupt):
        open_clip.create_model("ViT-B-32", force_custom_text=name == "CustomTextCLIP", some_key={"a": 1})
    assert asked, advice
    assert asked[0].get("some_key") == {"a": 1}, (
        "open_clip.factory.create_model no longer hands unknown keys of a model configuration to the model class; "
        "change open_clip_elip/registry.py, which receives `token_reduction` that way."
    )


def test_model_configurations_keep_unknown_keys():
    configuration = open_clip.get_model_config("ViT-S-16-ELIP")
    assert configuration is not None, (
        "open_clip.add_model_config no longer registers a folder of JSON files; change open_clip_elip/registry.py."
    )
    assert "token_reduction" in configuration, (
        "open_clip drops unknown keys of a model configuration; `token_reduction` has to travel another way: "
        "change open_clip_elip/registry.py."
    )
    assert "ViT-S-16-ELIP" in factory._MODEL_CONFIGS, "open_clip.factory._MODEL_CONFIGS is no longer the registry."


def test_pretrained_tags_are_a_dict_by_model_name():
    assert isinstance(getattr(open_clip.pretrained, "_PRETRAINED", None), dict), (
        "open_clip.pretrained._PRETRAINED is gone; change open_clip_elip/registry.py, which gives our names its tags."
    )


def test_the_vision_tower_can_be_driven_from_outside(visual):
    advice = "; change open_clip_elip/tower.py, which drives the tower from outside."
    assert isinstance(visual, VisionTransformer), "open_clip.CLIP.visual is no VisionTransformer" + advice
    for name in ("_embeds", "_pool", "transformer", "proj", "grid_size", "patch_dropout", "output_dim"):
        assert hasattr(visual, name), f"open_clip's VisionTransformer has no `{name}` any more" + advice
    for name in ("resblocks", "width", "grad_checkpointing", "batch_first"):
        assert hasattr(visual.transformer, name), f"open_clip's Transformer has no `{name}` any more" + advice

    x = visual._embeds(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert x.shape == (2, 17, 32), "VisionTransformer._embeds no longer gives (B, 1+M, D) with [CLS] first" + advice
    pooled = visual._pool(x)
    assert isinstance(pooled, tuple) and pooled[0].shape == (2, 32), (
        "VisionTransformer._pool no longer gives (pooled, tokens)" + advice
    )


def test_these_pieces_are_the_whole_tower(visual):
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x = visual._embeds(image)
    for block in visual.transformer.resblocks:
        x = block(x)
    by_hand = visual._pool(x)[0] @ visual.proj
    torch.testing.assert_close(
        by_hand,
        visual(image),
        rtol=0,
        atol=1e-12,
        msg="VisionTransformer.forward does more than _embeds, resblocks, _pool and proj; add the missing step to "
        "open_clip_elip/tower.py.",
    )


def test_patch_dropout_has_a_probability():
    dropout = plain_model(vision={"patch_dropout": 0.25}).visual.patch_dropout
    assert getattr(dropout, "prob", None) == 0.25, (
        "open_clip's PatchDropout has no `prob` any more; change ImageTower.num_patches in open_clip_elip/tower.py."
    )


def test_a_block_has_the_parts_that_scoring_reads(visual):
    advice = "; change open_clip_elip/reduction/attention.py, which runs a block by its parts."
    block = visual.transformer.resblocks[0]
    assert isinstance(block, ResidualAttentionBlock), "the default block is no ResidualAttentionBlock" + advice
    for name in ("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"):
        assert hasattr(block, name), f"ResidualAttentionBlock has no `{name}` any more" + advice
    attn = block.attn
    assert isinstance(attn, torch.nn.MultiheadAttention), "a block's attention is no MultiheadAttention" + advice
    assert attn.batch_first, "ResidualAttentionBlock is no longer batch first" + advice
    assert attn.in_proj_weight.shape == (96, 32), "the query, key and value projections are no longer packed" + advice
    assert attn.in_proj_bias.shape == (96,), "the packed projection has no bias any more" + advice
    assert attn.bias_k is None and not attn.add_zero_attn and attn.dropout == 0, (
        "the attention has gained a dropout, a bias token or a zero token" + advice
    )


@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
def test_the_models_keep_their_signatures(kind):
    advice = "; change TextFirst in open_clip_elip/clip.py, which overrides it."
    parameters = list(inspect.signature(kind.forward).parameters)
    assert parameters == ["self", "image", "text"], f"{kind}.forward changed" + advice
    for name in ("encode_image", "encode_text"):
        parameters = list(inspect.signature(getattr(kind, name)).parameters)
        assert parameters[1:] == [name.removeprefix("encode_"), "normalize"], f"{kind}.{name} changed" + advice
    model = plain_model(kind is open_clip.CustomTextCLIP)
    for name in ("visual", "logit_scale", "logit_bias", "output_dict"):
        assert hasattr(model, name), f"{kind} has no `{name}` any more" + advice


def test_hugging_face_towers_have_the_parts_that_guidance_reads(tmp_path):
    transformers = pytest.importorskip("transformers")
    advice = "; change TextFirst.encode_text_and_guidance in open_clip_elip/clip.py, which reads its [CLS]."
    shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertConfig(**shape, intermediate_size=16, max_position_embeddings=16).save_pretrained(tmp_path)
    tower = HFTextEncoder(str(tmp_path), 8, pooler_type="mean_pooler", proj_type="linear", pretrained=False).eval()
    for name in ("transformer", "pooler", "proj", "config"):
        assert hasattr(tower, name), f"HFTextEncoder has no `{name}` any more" + advice
    text = torch.tensor([[2, 5, 9, 0], [2, 7, 0, 0]])
    mask = (text != tower.config.pad_token_id).long()
    out = tower.transformer(input_ids=text, attention_mask=mask)
    torch.testing.assert_close(
        tower(text), tower.proj(tower.pooler(out, mask)), msg="HFTextEncoder.forward computes something else" + advice
    )
    for name in ("ClsPooler", "ClsLastHiddenStatePooler"):
        assert hasattr(open_clip.hf_model, name), f"open_clip.hf_model.{name} is gone" + advice
