"""Weights in the forms that people have them, and what is said of each tensor."""
from __future__ import annotations

import argparse
import collections
from functools import partial
from pathlib import Path

import numpy
import open_clip
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from open_clip_elip import with_token_reduction
from open_clip_elip.identity import ModelError
from open_clip_elip.loading import load
from open_clip_elip.weights import find, read, tensors

from .tiny import REDUCTION, plain_model

Module = type("Module", (nn.Module,), {"forward": lambda self, x: x})


def model(**changes) -> nn.Module:
    return with_token_reduction(plain_model(**changes).float(), **REDUCTION)


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + key: value for key, value in state.items()}


def within(state: dict) -> dict:
    """As a compiled layer within a model is named."""
    return {key.replace("resblocks.0.", "resblocks.0._orig_mod."): value for key, value in state.items()}


FORMS = {
    "bare": lambda s: s,
    "open_clip's": lambda s: {"epoch": 3, "state_dict": prefixed(s, "module.")},
    "this trainer's": lambda s: {"model": {"family": "clip"}, "state_dict": s, "ema": None, "ema_updates": 0},
    "compiled": lambda s: {"state_dict": prefixed(s, "_orig_mod.")},
    "DDP, compiled": lambda s: {"state_dict": prefixed(s, "module._orig_mod.")},
    "a compiled part": lambda s: within(s),
    "FSDP": lambda s: prefixed(s, "_fsdp_wrapped_module."),
    "model": lambda s: {"model": s, "args": argparse.Namespace(lr=1)},
    "Lightning": lambda s: {"state_dict": prefixed(s, "model."), "hyper_parameters": {}},
    "FSDP, compiled": lambda s: {"model": prefixed(s, "_fsdp_wrapped_module._orig_mod.")},
    "recomputed": lambda s: {k.replace(".0.", ".0._checkpoint_wrapped_module."): v for k, v in s.items()},
    "Lightning, compiled": lambda s: {"state_dict": prefixed(s, "model._orig_mod.")},
    "DDP within Lightning": lambda s: {"state_dict": prefixed(s, "model.module.")},
    "DeepSpeed": lambda s: {"module": s, "optimizer": None, "ds_version": "0.16"},
    "half": lambda s: {"state_dict": {k: v.half() for k, v in s.items()}},
    "averages beside": lambda s: {"state_dict": s, "state_dict_ema": {k: v + 1 for k, v in s.items()}},
    "own": lambda s: {"state_dict": s, "ema": {}, "ema_updates": 0},
    "averages alone": lambda s: {"epoch": 1, "model_ema": {"module": s}},
    "a trainer of one's own": lambda s: {"state_dict": {**prefixed(s, "net.clip."), "n_averaged": torch.tensor(3)}},
    "averages": lambda s: {"n_averaged": torch.tensor(3), **prefixed(s, "module.")},
    "ordered": collections.OrderedDict,
    "any one wrapper": lambda s: {"student": s, "optimizer": {"state": {0: {"step": torch.tensor(1)}}}},
    "a number beside": lambda s: {"step": torch.tensor(3), "state_dict": s},
    "what trainers keep": lambda s: {"net": s, "best": numpy.float64(1), "all": numpy.zeros(2), "in": Path()},
    "scripted": lambda s: {**s, "attn_mask": torch.zeros(12, 12)},
}


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_wrappers_and_prefixes(form, custom_text, tmp_path):
    source, target = model(), model(custom_text=custom_text)
    torch.save(FORMS[form](source.state_dict()), tmp_path / "w.pt")
    report = load(target, read(tmp_path / "w.pt"))
    assert len(report.loaded) == len(target.state_dict())
    assert bool(report.sentences()) == (form == "averages beside") == ("state_dict_ema" in " ".join(report.notes))
    for key, value in source.state_dict().items():
        own = target.state_dict()
        value = value.half().float() if form == "half" else value
        assert torch.equal(own.get(key, own.get(f"text.{key}")), value)


def test_what_fsdp_distributes_is_taken_whole_or_not_at_all(tmp_path):
    state = model().state_dict()
    for world_size in (1, 2):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        try:
            mesh = init_device_mesh("cpu", (world_size,))
            split = partial(distribute_tensor, device_mesh=mesh, placements=[Shard(0)], src_data_rank=None)
            torch.save({k: split(v) if v.ndim else v for k, v in state.items()}, tmp_path / f"{world_size}.pt")
        finally:
            dist.destroy_process_group()
    target = model()
    assert not load(target, read(tmp_path / "1.pt")).sentences()
    assert torch.equal(target.visual.proj, state["visual.proj"])
    for content in (read(tmp_path / "2.pt"), {"_fsdp_wrapped_module._flat_param": torch.zeros(9)}):
        with pytest.raises(ModelError, match="one of several processes has under FSDP; save what get_model_state_dict"):
            load(target, content)


@pytest.mark.parametrize(("file", "sentence"), [(".metadata", "dcp_to_torch"), ("zero_to_fp32.py", "DeepSpeed")])
def test_folders_of_many_processes_are_told(file, sentence, tmp_path):
    (tmp_path / file).touch()
    with pytest.raises(ModelError, match=sentence):
        read(find("ViT-B-32", str(tmp_path)))


def test_safetensors_scripted_archives_and_urls(tmp_path):
    source = model()
    state = {key: value.contiguous() for key, value in source.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")

    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("input_resolution", torch.tensor(32))
            for name in ("visual", "transformer", "token_embedding", "ln_final"):
                self.add_module(name, Holder(getattr(source, name)))
            for name in ("positional_embedding", "text_projection", "logit_scale"):
                self.register_parameter(name, getattr(source, name))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.script(Scripted()).save(tmp_path / "openai.pt")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "pytorch_model.bin").write_bytes((tmp_path / "w.safetensors").read_bytes())
    for place in ("w.safetensors", "openai.pt", "old.pth", "pytorch_model.bin"):
        for path in (tmp_path / place, f"file://{tmp_path / place}"):
            target = model()
            report = load(target, read(path))
            assert torch.equal(target.visual.proj, source.visual.proj) and not (report.new or report.unused)
            assert [bool(report.notes), "--force-quick-gelu" in " ".join(report.notes)] == [place == "openai.pt"] * 2
    assert not load(model(quick_gelu=True), read(tmp_path / "openai.pt")).notes


class Holder(nn.Module):
    """The parameters of a module under its names, without what it does."""

    def __init__(self, module: nn.Module):
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, Holder(child))
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_positions_are_resized_and_the_bias_of_siglip_is_optional():
    shape = {"vision": {"image_size": 48}, "text": {"context_length": 8}}
    target = model(**shape, init_logit_bias=-5)
    report = load(target, model().state_dict())
    assert sorted(report.resized) == ["positional_embedding", "visual.positional_embedding"]
    assert "resized: " in report.sentences()[0] and target.logit_bias.item() == 0
    report = load(model(**shape), target.state_dict())
    assert report.unused == ["logit_bias"] and "not used: logit_bias" in report.sentences()[0]


def test_an_image_tower_alone_is_taken_where_that_is_asked_for():
    state = model().state_dict()
    visual = {key: value for key, value in state.items() if key.startswith("visual.")}
    fine_tuned = {key: value for key, value in visual.items() if key != "visual.proj"}
    fine_tuned |= {"head.weight": torch.zeros(3, 32), "head.bias": torch.zeros(3)}
    bare = {key.removeprefix("visual."): value for key, value in visual.items()}
    for content in (visual, {"state_dict": prefixed(fine_tuned, "module.")}, bare, prefixed(bare, "backbone.")):
        target = model()
        report = load(target, content, image_tower=True)
        assert torch.equal(target.visual.conv1.weight, state["visual.conv1.weight"])
        assert "positional_embedding" in report.new and ("visual.proj" in report.new) == ("state_dict" in content)
        assert report.unused == (["head.weight", "head.bias"] if "state_dict" in content else [])
        with pytest.raises(ModelError, match="holds an image tower without a text tower.*training.linear_probe"):
            load(model(), content)
    del visual["visual.conv1.weight"]
    with pytest.raises(ModelError, match="visual.conv1.weight is missing"):
        load(model(), visual, image_tower=True)


def test_all_that_does_not_fit_is_counted():
    state = model().state_dict()
    state["more"] = torch.zeros(3)
    state["visual.ln_post.weight"] = torch.zeros(5)
    del state["ln_final.bias"]
    first = "visual.ln_post.weight is 5 there and 32 in the model"
    with pytest.raises(ModelError, match=rf"w.pt does not fit ViT: {first} \(and 2 more"):
        load(model(), state, name="ViT", source="w.pt")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "There is no checkpoint at"),
        (b"cut off", "it is neither torch's nor in safetensors' format"),
        (b"", "it is empty"),
        (b"<!DOCTYPE html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "pointer of Git LFS, whose file `git lfs pull` fetches"),
        (b"\x1f\x8b\x08", "it is compressed: unpack it"),
        (b"PK\x03\x04", "it is cut off, or an archive"),
        ({"student": {"a": torch.zeros(1)}, "teacher": {"a": torch.zeros(1)}}, "student and teacher each have some"),
        ([torch.zeros(1)], "it holds a list, not a dictionary"),
        ({"epoch": 3, "model": "x"}, "holds no weights, only epoch, model"),
        ({}, "holds no weights, only an empty dictionary"),
        ({"a.logit_scale": torch.zeros(()), "a_ema.logit_scale": torch.zeros(())}, "several models .a.logit_scale"),
        ({"state_dict": {"a": torch.zeros(1)}, "more": Module()}, "Python object .*Module.*could run code"),
        ({"vision_model.embeddings.class_embedding": torch.zeros(3)}, "of transformers, and not its CLIPModel"),
        ({"blocks.0.attn.qkv.weight": torch.zeros(3)}, "is an image tower of timm's, without a text tower"),
        ({"blocks.0.weight": torch.zeros(3)}, "positional_embedding is missing"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(content, sentence, tmp_path):
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ModelError, match=sentence) as error:
        load(model(), read(path), source=str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_file_of_an_old_torch(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read(tmp_path / "w.pt")["a"], torch.ones(2))


def test_which_file_is_meant(tmp_path, monkeypatch):
    file = tmp_path / "open_clip_pytorch_model.bin"
    torch.save({}, file)
    assert find("ViT-B-32", None) is None
    assert find("ViT-B-32", str(file)) == find(f"local-dir:{tmp_path}", None) == str(file)
    assert find("ViT-B-32", "s3://bucket/w.pt") == "s3://bucket/w.pt"
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag, cache_dir: tag["hf_hub"])
    assert "laion2b_s34b_b79k" not in find("ViT-B-32-ELIP", "laion2b_s34b_b79k")
    with pytest.raises(ModelError, match="neither a file nor a name of weights for ViT-B-32"):
        find("ViT-B-32", "nowhere")
    with pytest.raises(ModelError, match="leave it out, for local-dir:.* brings weights of its own"):
        find(f"local-dir:{tmp_path}", "nowhere.pt")
    assert tensors(read(file) | {"a": torch.zeros(1)}, "w.pt").keys() == {"a"}
