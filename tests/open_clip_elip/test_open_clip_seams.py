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


def test_the_registry_keeps_unknown_keys_and_tags():
    advice = "; change open_clip_elip/registry.py."
    configuration = open_clip.get_model_config("ViT-S-16-ELIP")
    assert configuration is not None, "open_clip.add_model_config no longer registers a folder of JSON files" + advice
    assert "token_reduction" in configuration, "open_clip drops unknown keys of a model configuration" + advice
    assert "ViT-S-16-ELIP" in factory._MODEL_CONFIGS, "factory._MODEL_CONFIGS is no longer the registry" + advice
    assert isinstance(getattr(open_clip.pretrained, "_PRETRAINED", None), dict), "_PRETRAINED is gone" + advice


def test_the_parts_are_there(visual):
    block = visual.transformer.resblocks[0]
    assert isinstance(visual, VisionTransformer) and isinstance(block, ResidualAttentionBlock)
    for part, names, module in (
        (visual, ("_embeds", "_pool", "transformer", "proj", "grid_size", "patch_dropout", "output_dim"), "tower.py"),
        (visual.transformer, ("resblocks", "width", "grad_checkpointing", "batch_first"), "tower.py"),
        (block, ("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"), "reduction/attention.py"),
        (open_clip.hf_model, ("ClsPooler", "ClsLastHiddenStatePooler"), "clip.py"),
        (plain_model(), ("visual", "logit_scale", "logit_bias", "output_dict"), "clip.py"),
        (plain_model(True), ("visual", "text", "logit_scale", "logit_bias", "output_dict"), "clip.py"),
    ):
        for name in names:
            assert hasattr(part, name), f"{part} has no `{name}` any more; change open_clip_elip/{module}."
    dropout = plain_model(vision={"patch_dropout": 0.25}).visual.patch_dropout
    assert dropout.prob == 0.25, "PatchDropout has no `prob` any more; change ImageTower.num_patches in tower.py."


def test_these_pieces_are_the_whole_tower(visual):
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x = visual._embeds(image)
    for block in visual.transformer.resblocks:
        x = block(x)
    assert x.shape == (2, 17, 32), "_embeds no longer gives (B, 1+M, D) with [CLS] first; change tower.py."
    advice = "VisionTransformer.forward does more than _embeds, resblocks, _pool and proj; add it to tower.py."
    torch.testing.assert_close(visual._pool(x)[0] @ visual.proj, visual(image), rtol=0, atol=1e-12, msg=advice)


def test_attention_has_packed_weights(visual):
    advice = "; change open_clip_elip/reduction/attention.py, which runs a block by its parts."
    attn = visual.transformer.resblocks[0].attn
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


def test_hugging_face_towers_have_the_parts_that_guidance_reads(tmp_path):
    transformers = pytest.importorskip("transformers")
    advice = "; change TextFirst.encode_text_and_guidance in open_clip_elip/clip.py, which reads its [CLS]."
    shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertConfig(**shape, intermediate_size=16, max_position_embeddings=16).save_pretrained(tmp_path)
    tower = HFTextEncoder(str(tmp_path), 8, pooler_type="mean_pooler", proj_type="linear", pretrained=False).eval()
    text = torch.tensor([[2, 5, 9, 0], [2, 7, 0, 0]])
    mask = (text != tower.config.pad_token_id).long()
    out = tower.transformer(input_ids=text, attention_mask=mask)
    torch.testing.assert_close(
        tower(text), tower.proj(tower.pooler(out, mask)), msg="HFTextEncoder.forward computes something else" + advice
    )
