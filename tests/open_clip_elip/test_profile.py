"""The cost report: counts against known ones, memory against what is known, the command."""
from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from functools import partial

import open_clip
import pytest
import torch

from open_clip_elip import TextParts, cut_text, with_shortcuts, with_token_reduction
from open_clip_elip.profile import command, measure, report
from open_clip_elip.profile.flops import Flops, count, count_flops, on_meta
from open_clip_elip.profile.measure import SavedBytes, TrainStep, largest_batch, peak_bytes
from open_clip_elip.profile.models import Candidate, ProfileError, caption_ids, caption_lengths
from open_clip_elip.text import end_of_text, text_tower

from .tiny import REDUCTION, TEXT, VISION, plain_model

TINY = "ViT-Ti-8-64-ELIP"
LENGTHS = [4, 12, 7, 5, 9, 4, 6, 11, 5, 8, 3, 10, 6, 5, 7, 9]


def tiny(kind: str) -> torch.nn.Module:
    model = plain_model(custom_text="custom text" in kind).float()
    if "text first" in kind:
        model = with_token_reduction(model, **REDUCTION)
    elif "shortcuts" in kind:
        model = with_shortcuts(model)
    if "one layer" in kind:
        model = with_token_reduction(model, **REDUCTION, scoring_depth=1)
    return model


def batch(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor | TextParts]:
    return torch.randn(len(LENGTHS), 3, *model.visual.image_size), cut_text(caption_ids(model, LENGTHS), model)


# ---------------------------------------------------------------------- captions


def test_captions_have_the_mean_and_the_lengths_that_are_asked_for(tmp_path):
    for pairs in (16, 1000):
        lengths = caption_lengths("15", pairs)
        assert sum(lengths) / pairs == pytest.approx(15, rel=0.02)
        assert lengths == caption_lengths("15", pairs) != sorted(lengths)
    assert max(caption_lengths("15", 1000, context=20)) == 20
    assert caption_lengths("full", 2) == [77, 77]
    file = tmp_path / "captions.txt"
    file.write_text("5\n9\n\n900\n")
    assert sorted(caption_lengths(str(file), 6)) == [5, 5, 9, 9, 77, 77]
    file.write_text("a cat\na photo of a cat\n")
    lengths = caption_lengths(str(file), 2, tokenizer=lambda: open_clip.get_tokenizer("ViT-B-32"))
    assert sorted(lengths) == [4, 7]  # start and end included
    for content, sentence in ((b"\n", "is empty"), (b"\xff", "cannot be read")):
        file.write_bytes(content)
        with pytest.raises(ProfileError, match=sentence):
            caption_lengths(str(file), 2)


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("text", [{}, {"pool_type": "eos", "eos_id": 7}])
def test_caption_ids_end_where_they_should(custom_text, text):
    model = plain_model(custom_text, text=text)
    ids = caption_ids(model, LENGTHS)
    assert ids.shape == (len(LENGTHS), TEXT["context_length"])
    assert (end_of_text(text_tower(model), ids) + 1).tolist() == LENGTHS
    assert ids.max() < TEXT["vocab_size"]


# ---------------------------------------------------------------------- models


def test_a_name_with_options():
    one = Candidate.parse("ViT-S-16-ELIP:keep_ratio=1,.9,0.5,.4,lam=0.5,merge=false,scoring_depth=1,text_scale=none")
    assert one.identity.name == "ViT-S-16-ELIP"
    assert one.identity.token_reduction == {
        "method": "elip", "keep_ratio": [1, 0.9, 0.5, 0.4], "lam": 0.5, "merge": False, "scoring_depth": 1,
        "text_scale": "none",
    }  # fmt: skip
    assert one.build("meta").reduction.config.keep_ratio == (1, 0.9, 0.5, 0.4)
    assert Candidate.parse("ViT-B-16:method=elip,depths=12,keep_ratio=.5").build("meta").tower.rrt() > 0.4
    assert type(Candidate.parse(f"{TINY}:method=none").build("meta")) is open_clip.CLIP
    assert Candidate.parse("ViT-S-16:shortcuts=true").build("meta").tower.shortcuts
    assert not Candidate.parse(f"{TINY}:shortcuts=false").build("meta").tower.shortcuts
    assert Candidate.parse(TINY, image_size=32).build("meta").visual.image_size == (32, 32)


# ---------------------------------------------------------------------- operations


# Of a step on 16 pairs with captions of typical lengths: forward, backward, scoring, and the text tower's. Both an
# analysis by hand and torch's counter gave these numbers.
COUNTED = {
    "ViT-S-16": (201229664256, 400609640448, 0, 162218999808),
    "ViT-S-16-ELIP": (112701161472, 223552634880, 74179952640, 39429586944),
    "ViT-B-16-ELIP:scoring_depth=1": (405678522368, 807657668608, 274464768, 69924618240),
    "ViT-S-16-EViT": (106602147840, 211354607616, 0, 39429586944),
    "ViT-S-16-ToMe": (97541603328, 193233518592, 107646976, 39429586944),
    "ViT-S-16-Random": (80293625856, 158737563648, 0, 39429586944),
}


@pytest.mark.parametrize("name", COUNTED)
def test_operations_of_real_shapes(name):
    model = Candidate.parse(name).build("meta")
    text = cut_text(caption_ids(model, caption_lengths("14.5", 16)), model)
    found = count_flops(model, torch.empty(16, 3, 224, 224, device="meta"), text.to("meta"))
    assert (found.forward, found.backward, found.scoring, found.text) == COUNTED[name]
    assert found.total == sum(COUNTED[name][:3])


@pytest.mark.parametrize("kind", ["plain custom text", "shortcuts", "text first", "text first one layer"])
def test_operations_of_a_real_step_equal_those_counted_without_numbers(kind):
    model = tiny(kind)
    image, text = batch(model)
    before = torch.get_rng_state()
    real = count_flops(model, image, text)
    assert torch.equal(torch.get_rng_state(), before)
    assert real == count_flops(on_meta(model), image.to("meta"), text.to("meta"))
    assert all(p.grad is None for p in model.parameters())
    assert (real.scoring > 0) == ("text first" in kind)


def test_operations_of_a_plain_transformer_are_those_of_its_products():
    model = tiny("plain")
    image, text = batch(model)
    patches, width, layers, pairs, context = 16, 32, 4, len(image), TEXT["context_length"]
    tokens, stem = 1 + patches, 2 * patches * 3 * 8 * 8 * width
    of_image = stem + layers * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width) + 2 * width * 20
    of_text = TEXT["layers"] * (2 * context * 12 * 24**2 + 4 * context**2 * 24) + 2 * 24 * 20
    found = count_flops(model, image, text)
    assert (found.forward, found.text_forward) == (pairs * (of_image + of_text), pairs * of_text)
    assert found.backward == 2 * found.forward - pairs * stem  # the pixels have no gradient


def test_what_is_locked_has_no_backward_and_what_saves_memory_is_not_counted():
    model = tiny("text first")
    image, text = batch(model)
    before = count_flops(model, image, text)
    model.set_grad_checkpointing()
    assert count_flops(model, image, text).backward > before.backward
    twin = on_meta(model)
    assert count_flops(twin, image.to("meta"), text.to("meta")) == before
    assert model.visual.transformer.grad_checkpointing and model.visual.proj.device.type == "cpu"
    model.lock_image_tower()
    locked = count_flops(on_meta(model), image.to("meta"), text.to("meta"))
    assert (locked.forward, locked.backward) == (before.forward, before.text_backward)


def test_a_step_of_any_kind_is_counted():
    layer = torch.nn.Linear(8, 4, bias=False)
    x = torch.randn(3, 8)

    def step():
        with torch.no_grad():
            layer(x)
        return {"once": [layer(x), x], "twice": layer(layer(x) @ layer.weight.detach())}

    product = 2 * 3 * 8 * 4
    # Backward: each weight, and on the way of the third product the second's input and the first's.
    assert count(layer, step) == Flops(4 * product, 5 * product, product)
    assert layer.weight.grad is None


# ---------------------------------------------------------------------- memory


def test_saved_bytes_are_those_of_the_storages_that_the_graph_keeps():
    weight = torch.nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    saved = SavedBytes(weight)
    with saved:
        y = weight(x)  # keeps x, and the weight, which is not counted
        z = y.exp()  # keeps z
        (z.view(8, 4) * z.view(8, 4)).sum().backward()  # keeps z again
    assert saved.bytes == 2 * 4 * 8 * 4
    saved = SavedBytes(weight)
    with saved, torch.autocast("cpu", torch.bfloat16):
        weight(x).sum().backward()  # keeps x in half precision, and a copy of the weight
    assert saved.bytes == 4 * 8 * 2


def test_the_peak_of_a_step_is_more_than_what_is_there_and_what_it_keeps():
    torch.manual_seed(0)
    model = tiny("text first")
    step = TrainStep(model, *batch(model))
    saved = SavedBytes(model)
    with saved:
        found = peak_bytes(step, step.batch)
    gradients = sum(p.nbytes for p in model.parameters())
    known = 3 * gradients + sum(b.nbytes for b in model.buffers())
    inputs = sum(t.nbytes for t in (step.batch[0], *step.batch[1].parts, step.batch[1].place))  # counted in both
    assert known + saved.bytes - inputs < found < known + saved.bytes + inputs + 2 * gradients
    assert found == peak_bytes(step, step.batch)


def test_the_peak_counts_what_lives_at_the_same_time():
    class Step:
        model = torch.nn.Linear(1000, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters())

        def __call__(self):
            for _ in range(3):
                torch.ones(5000).add_(1)  # gone before the next
            torch.ones(2000), torch.ones(3000)

    x = torch.zeros(100)
    assert peak_bytes(Step(), [x, x.view(10, 10)]) == pytest.approx(4 * (1000 + 100 + 5000), abs=100)


def test_the_largest_batch_fits_and_the_next_does_not():
    def peak(pairs):
        return 10_000_000 + 70_000 * pairs + measure.LOSS_BYTES * pairs**2

    for limit in (10**8, 10**9):
        pairs = largest_batch(limit, (8, peak(8)), (16, peak(16)))
        assert peak(pairs) <= limit < peak(pairs + 1)
    assert largest_batch(10**6, (8, peak(8)), (16, peak(16))) == 0
    # Peaks that the batch hardly shows in: the rise is what a pair saves.
    pairs = largest_batch(10**8, (8, peak(8)), (16, peak(8) + 1000), saved=70_000)
    assert 0 < pairs <= largest_batch(10**8, (8, peak(8)), (16, peak(16))) + 16


# ---------------------------------------------------------------------- times


def test_rounds_go_through_all_in_turn_and_back(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    order = []

    def work(name, seconds):
        order.append(name)
        clock[0] += seconds

    functions = {"a": partial(work, "a", 1.0), "b": partial(work, "b", 2.0)}
    in_turn = partial(measure.in_turn, functions, device=torch.device("cpu"))
    assert in_turn(rounds=2, warmup=1) == {"a": [1, 1], "b": [2, 2]}
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert in_turn(rounds=1, warmup=0, repeat=3) == {"a": [1], "b": [2]}
    assert len(in_turn(rounds=9, seconds=13)["a"]) == 3
    assert len(in_turn(rounds=9, seconds=0)["a"]) == 2
    assert measure.spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0, "count": 5}
    assert measure.spread([4.0]) == {"median": 4.0, "low": 4.0, "high": 4.0, "count": 1}


# ---------------------------------------------------------------------- the command


def test_counts_as_table_json_and_markdown(tmp_path, capsys):
    names = [f"{TINY}:method=none", TINY, f"{TINY}:scoring_depth=1"]
    paths = [tmp_path / "a" / "cost.json", tmp_path / "cost.md"]
    words = [*names, "--no-time", "--device", "cpu", "--batch-size", "16"]
    assert command.main([*words, "--json", str(paths[0]), "--markdown", str(paths[1])]) == 0
    told = capsys.readouterr().out
    plain, ours, shallow = json.loads(paths[0].read_text())["models"]
    assert plain["tokens_per_layer"] == [65] * 6
    assert ours["tokens_per_layer"] == open_clip.create_model(TINY).tower.token_counts()
    assert plain["rrt"] == 0 < ours["rrt"] == shallow["rrt"]
    assert plain["vision_parameters"] == ours["vision_parameters"]
    sizes = sum(p.numel() for p in Candidate.parse(TINY).build("meta").parameters())
    assert ours["vision_parameters"] + ours["text_parameters"] == sizes - 1  # the logit scale
    gflops = ours["gflops_per_pair"]
    assert gflops["forward"] + gflops["backward"] + gflops["scoring"] == pytest.approx(gflops["total"])
    assert shallow["gflops_per_pair"]["scoring"] < gflops["scoring"] / 100
    assert ours["text_tokens"] < plain["text_tokens"]
    assert not {"seconds", "peak", "hours_per_epoch"} & {*ours}
    assert ours["saved"] == shallow["saved"] < plain["saved"]
    assert f"({ours['saved'] / plain['saved']:.3f})" in told
    ratio = gflops["total"] / plain["gflops_per_pair"]["total"]
    assert ratio < 1 and f"({ratio:.3f})" in told and "step, s" not in told
    assert f"({ratio:.3f})" in paths[1].read_text() and f"| {TINY} |" in paths[1].read_text()


def test_steps_are_measured(tmp_path, capsys):
    words = [f"{TINY}:method=none", TINY, "--device", "cpu", "--batch-size", "8", "--rounds", "2", "--memory", "2"]
    words += ["--caption-lengths", "8", "--json", str(tmp_path / "cost.json")]
    assert command.main(words) == 0
    plain, ours = json.loads((tmp_path / "cost.json").read_text())["models"]
    for found in (plain, ours):
        assert found["seconds"]["count"] == 2
        assert found["samples_per_second"] == pytest.approx(8 / found["seconds"]["median"])
        assert found["hours_per_epoch"]["CC12M+"] == pytest.approx(10_108_501 / found["samples_per_second"] / 3600)
        parameters = 4 * (found["vision_parameters"] + found["text_parameters"])
        assert found["peak"] > 3 * parameters + found["saved"]
        assert (found["largest_batch"] - 8) * found["saved"] / 8 == pytest.approx(2e9 - found["peak"], rel=0.1)
    assert ours["saved"] < plain["saved"] and plain["time_ratio"]["median"] == 1
    told = capsys.readouterr().out
    assert "largest batch in 2 GB" in told and "CC3M+ epoch, h:min" in told


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    words = [f"{TINY}:method=none", TINY, "--no-time", "--device", "cpu", "--plot", str(tmp_path / "cost.png")]
    assert command.main(words) == 0
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_a_tower_that_looks_at_numbers_is_counted_in_a_real_step(monkeypatch, tmp_path):
    devices = []

    def build(one, device, precision="fp32"):
        devices.append(device)
        model = tiny("text first").to(device)
        model.visual.conv1.register_forward_pre_hook(lambda module, args: bool(args[0].sum() > 0) and None)
        return model

    monkeypatch.setattr(Candidate, "build", build)
    out = tmp_path / "cost.json"
    assert command.main([TINY, "--no-time", "--batch-size", "16", "--device", "cpu", "--json", str(out)]) == 0
    (found,) = json.loads(out.read_text())["models"]
    assert devices == ["meta", "cpu"]
    model = tiny("text first")
    text = cut_text(caption_ids(model, caption_lengths("14.5", 16, TEXT["context_length"])), model)
    assert found["flops"] == asdict(count_flops(model, torch.randn(16, 3, 32, 32), text))


def test_a_hugging_face_text_tower_from_a_folder(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    tower = transformers.BertConfig(vocab_size=64, **size, max_position_embeddings=100, pad_token_id=0)
    tower.save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path), "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}
    config = {"embed_dim": 20, "vision_cfg": VISION, "text_cfg": text, "token_reduction": REDUCTION}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    names = [f"local-dir:{tmp_path}", f"local-dir:{tmp_path}:method=none"]
    out = tmp_path / "cost.json"
    assert command.main([*names, "--no-time", "--batch-size", "2", "--device", "cpu", "--json", str(out)]) == 0
    ours, plain = json.loads(out.read_text())["models"]
    assert ours["text_tokens"] == plain["text_tokens"] == 77
    assert ours["flops"]["text_forward"] == plain["flops"]["text_forward"] > 0
    assert ours["flops"]["scoring"] > 0 == plain["flops"]["scoring"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["ViT-S-16-ELIPP"], "did you mean ViT-S-16-ELIP?"),
        (["ViT-S-16:lam=0.5"], "name a method too"),
        (["ViT-S-16-ELIP:lam=2"], "lam must be a number in"),
        (["ViT-S-16-ELIP:lamb=0.5"], "did you mean 'lam'"),
        (["ViT-S-16-ELIP:lam="], "not one more option=value"),
        (["ViT-S-16-ELIP:lam=0.5,lam=0.3"], "not one more option=value"),
        (["ViT-S-16:shortcuts=5"], "true or false"),
        (["RN50:method=elip"], "needs OpenCLIP's own ViT"),
        ([TINY, TINY], "given twice"),
        *(([TINY, f"--{name}", wrong], f"--{name} is {wrong}")
          for name, wrong in (("batch-size", "0"), ("repeat", "-1"), ("memory", "nan"), ("memory", "inf"))),
        ([TINY, "--image-size", "7"], "7 pixels are smaller than one patch"),
        ([TINY, "--image-size", "0"], "0 pixels are smaller than one patch"),
        ([TINY, "--device", "tpu"], "no device 'tpu'"),
        ([TINY, "--caption-lengths", "nowhere.txt"], "neither a mean number of tokens"),
        ([TINY, "--caption-lengths", "inf"], "neither a mean number of tokens"),
        (["hf-hub:"], "The model hf-hub: cannot be created"),
        ([TINY, "--no-time", "--memory", "8"], "--memory measures at two batch sizes"),
        ([TINY, "--no-time", "--plot", "x.png"], "--plot needs matplotlib"),
        ([TINY, "--no-time", "--json", "/dev/null/cost.json"], "cannot be made"),
    ],
)
def test_what_a_person_can_mend_is_told_in_one_sentence(words, sentence, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert command.main(words) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.startswith("error: ")
    assert len(told.splitlines()) == 1


def test_a_table_of_seven_models_fits_a_terminal(monkeypatch):
    labels = ["ViT-S-16", *(f"ViT-S-16-ELIP:lam=0.{n}" for n in range(5)), "ViT-S-16-ToMe"]
    layers = [[197] * 12, *[[197] * 2 + [178] * 2 + [129] * 6 + [80] * 2] * 5, [197 - 8 * n for n in range(12)]]
    parts = ("forward", "text_forward", "scoring", "teacher", "total", "text", "image")
    figures = [
        {"label": label, "batch_size": 256, "vision_parameters": 1e8, "text_parameters": 1e7, "rrt": 0.28,
         "tokens_per_layer": tokens, "text_tokens": 14.5, "gflops_per_pair": dict.fromkeys(parts, 123.456)}
        for label, tokens in zip(labels, layers, strict=True)
    ]  # fmt: skip
    rows = report.table(figures)
    text = report.text_table(rows, width=100)
    assert max(map(len, text.splitlines())) <= 100
    blocks = [block.splitlines() for block in text.split("\n\n")]
    assert all(len(block) == len(rows) for block in blocks) and 1 < len(blocks) < 7
    first = max(len(row[0]) for row in rows)
    for number, (name, *cells) in enumerate(rows):  # the blocks beside each other hold every cell, in order
        assert all(block[number][:first].rstrip() == name for block in blocks)
        said = [cell for block in blocks for cell in re.split("  +", block[number][first:].strip())]
        assert said == cells
    assert report.text_table(rows, width=1000).count("\n") == len(rows) - 1
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, report.text_table(rows).splitlines())) <= 80 < max(map(len, text.splitlines()))
