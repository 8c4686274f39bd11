"""From options, and from checkpoints old and new, to models."""
from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace

import open_clip
import pytest
import torch

from open_clip_elip import weights
from open_clip_elip.identity import CHANGES, ModelError, create, describe
from training.distributed import Ranks
from training.errors import UserError
from training.evaluation.loaded import hash_weights, load_model
from training.models import build_model, build_teacher, checkpoint_identity, create_filled

TINY = "ViT-Pico-8-64-ELIP"
CPU = torch.device("cpu")


def options(**changes) -> argparse.Namespace:
    values = dict.fromkeys((*CHANGES, "cache_dir")) | {
        "model": TINY, "pretrained": None, "pretrained_image": False, "token_reduction": None, "siglip": False,
        "precision": "fp32", "cache_dir": None, "shortcuts": True, "grad_checkpointing": False, "distill_model": None,
        "distill_pretrained": None,
    }  # fmt: skip
    return argparse.Namespace(**(values | changes))


def evaluation(pretrained, **changes) -> argparse.Namespace:
    values = {
        "model": None, "pretrained": str(pretrained), "ema": False, "precision": "fp32", "image_decode": "plain",
        "vision_guided_reduction": False, "force_image_size": None, "text_tokenizer": None,
    }  # fmt: skip
    return argparse.Namespace(**(values | changes))


def test_a_model_from_options_and_back_from_its_checkpoint(tmp_path, caplog):
    torch.manual_seed(0)
    changes = {"siglip": True, "force_image_size": [48], "image_mean": [0.5] * 3}
    changes |= {"text_reduction": "post", "text_keep": 0.5}
    built = build_model(options(token_reduction={"lam": 0.3}, **changes), CPU)
    assert built.identity.config["text_reduction"] == {"rule": "post", "keep": 0.5}
    assert built.model.reduction.config.lam == 0.3 and built.model.logit_bias.item() == -10
    state = {"model": built.identity.to_dict(), "state_dict": built.model.state_dict(), "config": {"model": "other"}}
    torch.save(state, tmp_path / "c.pt")
    assert checkpoint_identity(torch.load(tmp_path / "c.pt", weights_only=True)) == built.identity
    loaded = load_model(evaluation(tmp_path / "c.pt", vision_guided_reduction=True), Ranks(CPU))
    assert loaded.described["weights"] == hash_weights(built.model.state_dict()) and loaded.described["model"] == TINY
    assert loaded.model.reduction.config.lam == 0.3 and loaded.model.tower.vision_guided
    assert "48" in loaded.described["settings"]["transform"]

    again = build_model(options(pretrained=str(tmp_path / "c.pt"), siglip=True, force_image_size=48), CPU)
    assert hash_weights(again.model.state_dict()) == loaded.described["weights"]
    assert "c.pt was trained with mean [0.5, 0.5, 0.5] (not [0.48" in caplog.text
    build_model(options(pretrained=str(tmp_path / "c.pt"), force_image_size=48), CPU)
    assert "not used: logit_bias" in caplog.text


OLD = {
    "model": "ViT-S-16-ELIP", "token_reduction": None, "lam": 0.5, "merge": False, "keep_ratio": [1.0, 0.8, 0.6, 0.4],
    "stage_depths": [3, 3, 3, 3], "text_scale": None, "reduce_layers": None, "merge_per_layer": None, "siglip": True,
    "force_quick_gelu": True, "force_image_size": [96], "force_context_length": None, "image_mean": [0.5] * 3, "lr": 1,
    "pretrained": "logs/old/epoch_1.pt", "prop_attn": None, "spread": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reduction"),
    [
        ({}, {"method": "elip", "lam": 0.5, "merge": False, "keep_ratio": [1.0, 0.8, 0.6, 0.4], "depths": [3] * 4}),
        ({"token_reduction": "none"}, None),
        ({"token_reduction": "tome", "merge_per_layer": 3}, {"method": "tome", "r": 3}),
        ({"model": "ViT-S-16-EViT", "reduce_layers": [4]}, {"method": "evit", "layers": [4]}),
        ({"model": "ViT-S-16-ELIP-Adaptive", "lam": None, "spread": 0.5}, None),
    ],
)
def test_an_older_checkpoint_tells_its_model_by_its_flags(changes, reduction):
    config = OLD | changes
    if len(changes) > 0:
        config |= dict.fromkeys(set(OLD) & {"lam", "merge", "keep_ratio", "stage_depths"} - set(changes))
    identity = checkpoint_identity({"state_dict": {}, "config": config})
    assert (identity.token_reduction or {}).items() >= (reduction or {}).items()
    assert (identity.token_reduction is None) == (reduction is None)
    assert identity.config["quick_gelu"] and identity.config["init_logit_bias"] == -10
    assert identity.preprocess["size"] == [96, 96] and identity.preprocess["mean"] == [0.5] * 3
    assert checkpoint_identity({"state_dict": {}}) is None  # OpenCLIP's
    with pytest.raises(ModelError, match="no model named"):
        checkpoint_identity({"config": {"model": "ViT-Q"}})


def test_the_name_of_a_sibling_keeps_a_checkpoints_settings(tmp_path, caplog, monkeypatch):
    config = {"model": TINY, "force_quick_gelu": True, "image_mean": [0.5] * 3, "force_image_size": 48}
    weights = open_clip.create_model(TINY, force_image_size=48).state_dict()
    averages = {k: v / 2 for k, v in weights.items()}
    torch.save({"state_dict": weights, "config": config, "ema": averages}, tmp_path / "c.pt")
    own = load_model(evaluation(tmp_path / "c.pt"), Ranks(CPU))
    assert own.described["weights"] == hash_weights(weights)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-Pico-8-64", describe(TINY).config)
    for name in (TINY, "ViT-Pico-8-64"):
        sibling = load_model(evaluation(tmp_path / "c.pt", model=name), Ranks(CPU))
        assert sibling.described["settings"] == own.described["settings"]
    averaged = load_model(evaluation(tmp_path / "c.pt", ema=True), Ranks(CPU))
    assert torch.equal(averaged.model.visual.proj, weights["visual.proj"] / 2)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": open_clip.get_model_config(TINY)}))
    load_model(evaluation(tmp_path / "c.pt", model=f"local-dir:{tmp_path}"), Ranks(CPU))
    assert f"trained as {TINY} with mean [0.5, 0.5, 0.5]" in caplog.text and "quick_gelu True" in caplog.text


def test_a_fine_tuned_checkpoint_where_an_image_tower_is_enough(tmp_path, caplog):
    state = {k: v for k, v in create(describe(TINY)).state_dict().items() if k.startswith("visual.")}
    del state["visual.proj"]
    width = len(state["visual.ln_post.weight"])
    state["head.weight"] = torch.zeros(3, width)
    torch.save({"state_dict": state, "config": {"model": TINY, "head": "random"}}, tmp_path / "f.pt")
    with pytest.raises(UserError, match="without a text tower, fine-tuned"):
        load_model(evaluation(tmp_path / "f.pt"), Ranks(CPU))
    with caplog.at_level(logging.WARNING):
        loaded = load_model(evaluation(tmp_path / "f.pt"), Ranks(CPU), image_tower=True)
    assert loaded.model.encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, width)  # before the lost projection
    assert "not used: head.weight" in caplog.text and "left as new: " in caplog.text
    build_model(options(pretrained=str(tmp_path / "f.pt")), CPU, image_tower=True)


def test_a_teacher_sees_what_the_student_sees(caplog):
    student = describe(TINY)
    assert build_teacher(options(), student, CPU) is None
    teacher = build_teacher(options(distill_model="ViT-Nano-8-64-ELIP"), student, CPU)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    with pytest.raises(UserError, match="takes pictures of 224x224 pixels, and ViT-Pico-8-64-ELIP pictures of 64x64"):
        build_teacher(options(distill_model="ViT-S-16"), student, CPU)
    with pytest.raises(UserError, match="--distill-pretrained no.pt is neither a file nor a name"):
        build_teacher(options(distill_model="ViT-S-16", distill_pretrained="no.pt"), student, CPU)
    with pytest.raises(UserError, match="takes captions of 77 tokens"):
        build_teacher(options(distill_model="ViT-S-16"), describe("ViT-S-16", force_context_length=24), CPU)


def test_half_precision_on_a_cpu_is_told_to_be_slow(caplog):
    for precision, told in (("fp32", 0), ("amp", 1)):
        build_model(options(precision=precision), CPU)
        assert len([message for message in caplog.messages if "fp32 may be three times as fast" in message]) == told


def test_what_a_person_can_mend():
    with pytest.raises(UserError, match="There is no model named"):
        build_model(options(model="Tiny-ELPI"), CPU)
    with pytest.raises(UserError, match="neither a file nor a name"):
        build_model(options(pretrained="nowhere.pt"), CPU)


def test_a_folder_of_transformers_tells_what_it_was_trained_as(tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"text_config": tower, "vision_config": tower | {"image_size": 16, "patch_size": 8}, "projection_dim": 8}
    transformers.CLIPModel(transformers.CLIPConfig(**sizes)).save_pretrained(tmp_path)
    identity = checkpoint_identity(weights.read(tmp_path))
    assert identity == describe(f"local-dir:{tmp_path}")
    other = replace(identity, config=identity.config | {"quick_gelu": False})
    for one, told in ((identity, False), (other, True)):
        create_filled(one, str(tmp_path), "fp32", CPU)
        assert ("was trained with quick_gelu True (not False)" in caplog.text) == told
