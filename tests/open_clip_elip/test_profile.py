"""The cost report: counts against torch and against analysis, memory against what is known, the command."""
from __future__ import annotations

import json
import sys

import open_clip
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from open_clip_elip import TextParts, cut_text, with_shortcuts, with_token_reduction
from open_clip_elip.cost import batch_cost
from open_clip_elip.profile import captions, command, memory, timing
from open_clip_elip.profile.errors import ProfileError
from open_clip_elip.profile.flops import count_flops
from open_clip_elip.profile.models import ModelSpec
from open_clip_elip.profile.step import TrainStep
from open_clip_elip.profile.timing import Spread
from open_clip_elip.text import end_of_text, text_tower

from .tiny import REDUCTION, TEXT, plain_model

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
    ids = captions.caption_ids(model, LENGTHS)
    image = torch.randn(len(LENGTHS), 3, *model.visual.image_size)
    return image, cut_text(ids, model)


def columns(text: torch.Tensor | TextParts) -> list[int]:
    parts = text.parts if isinstance(text, TextParts) else (text,)
    return [part.shape[1] for part in parts for _ in part]


# ---------------------------------------------------------------------- captions


def test_captions_have_the_mean_and_the_lengths_that_are_asked_for():
    for pairs in (16, 1000):
        lengths = captions.typical_lengths(pairs, 15.0)
        assert sum(lengths) / pairs == pytest.approx(15, rel=0.02)
        assert lengths == captions.typical_lengths(pairs, 15.0)
        assert lengths != sorted(lengths)
    assert max(captions.typical_lengths(1000, 15.0, context_length=20)) == 20


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("text", [{}, {"pool_type": "eos", "eos_id": 7}])
def test_caption_ids_end_where_they_should(custom_text, text):
    model = plain_model(custom_text, text=text)
    ids = captions.caption_ids(model, LENGTHS)
    assert ids.shape == (len(LENGTHS), TEXT["context_length"])
    assert (end_of_text(text_tower(model), ids) + 1).tolist() == LENGTHS
    assert ids.max() < TEXT["vocab_size"]


def test_caption_lengths_from_a_file(tmp_path):
    numbers, words = tmp_path / "numbers.txt", tmp_path / "captions.txt"
    numbers.write_text("5\n12\n\n900\n")
    assert captions.read_lengths(numbers, None, 77) == [5, 12, 77]
    words.write_text("a cat\na photo of a cat\n")
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    assert captions.read_lengths(words, tokenizer, 77) == [4, 7]  # start and end included
    assert sorted(captions.draw_lengths([3, 5, 9], 6)) == [3, 3, 5, 5, 9, 9]
    with pytest.raises(ProfileError, match="no tokenizer"):
        captions.read_lengths(words, None, 77)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ProfileError, match="is empty"):
        captions.read_lengths(tmp_path / "empty.txt", None, 77)


# ---------------------------------------------------------------------- models


def test_a_name_with_options():
    spec = ModelSpec.parse("ViT-S-16-ELIP:keep_ratio=1,.9,0.5,.4,lam=0.5,merge=false,scoring_depth=1,text_scale=none")
    assert spec.name == "ViT-S-16-ELIP"
    assert spec.reduction == {
        "keep_ratio": [1, 0.9, 0.5, 0.4], "lam": 0.5, "merge": False, "scoring_depth": 1, "text_scale": "none",
    }  # fmt: skip
    model = spec.build(device="meta")
    assert model.reduction.config.keep_ratio == (1, 0.9, 0.5, 0.4)
    assert model.reduction.config.lam == 0.5
    assert ModelSpec.parse("ViT-B-16:method=elip,depths=12,keep_ratio=.5").build(device="meta").tower.rrt() > 0.4
    assert type(ModelSpec.parse(f"{TINY}:method=none").build(device="meta")) is open_clip.CLIP
    assert ModelSpec.parse("ViT-S-16:shortcuts=true").build(device="meta").tower.shortcuts
    assert not ModelSpec.parse(f"{TINY}:shortcuts=false").build(device="meta").tower.shortcuts


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("ViT-S-16-ELIPP", "did you mean ViT-S-16-ELIP?"),
        ("ViT-S-16:lam=0.5", "add method=elip"),
        ("ViT-S-16-ELIP:lam=2", "lam must be a number in"),
        ("ViT-S-16-ELIP:lamb=0.5", "did you mean 'lam'"),
        ("ViT-S-16-ELIP:lam=", "not option=value"),
        ("ViT-S-16:shortcuts=5", "true or false"),
        ("RN50:method=elip", "needs OpenCLIP's own ViT"),
    ],
)
def test_a_wrong_name_is_told_in_one_sentence(name, sentence):
    with pytest.raises(ProfileError, match=sentence.replace("?", r"\?")):
        ModelSpec.parse(name).build(device="meta")


# ---------------------------------------------------------------------- operations


@pytest.mark.parametrize(
    "kind", ["plain", "plain custom text", "shortcuts", "text first", "text first custom text", "text first one layer"]
)
def test_operations_of_a_real_step_equal_those_counted_without_numbers_and_by_analysis(kind):
    model = tiny(kind)
    image, text = batch(model)
    real = count_flops(model, image, text)
    assert real == count_flops(model.to("meta"), image.to("meta"), text.to("meta"))
    assert all(p.grad is None for p in model.parameters())
    analytic = batch_cost(model, columns(text))
    assert (real.total, real.scoring) == (analytic.total, analytic.scoring)
    assert (real.forward, real.backward) == (analytic.forward, analytic.backward)
    assert (real.text_forward, real.text_backward) == (analytic.text_forward, analytic.text_backward)
    assert (real.scoring > 0) == ("text first" in kind)


@pytest.mark.parametrize("name", ["ViT-S-16-ELIP", "ViT-B-16-ELIP:scoring_depth=1", "ViT-B-16"])
def test_operations_of_real_shapes_equal_the_analysis(name):
    model = ModelSpec.parse(name).build(device="meta")
    lengths = captions.typical_lengths(16)
    ids = captions.caption_ids(model, lengths)
    text = cut_text(ids, model) if "ELIP" in name else ids
    found = count_flops(model, torch.empty(16, 3, 224, 224, device="meta"), text.to("meta"))
    analytic = batch_cost(model, columns(text))
    assert (found.total, found.scoring, found.text) == (
        analytic.total, analytic.scoring, analytic.text_forward + analytic.text_backward,
    )  # fmt: skip


# ---------------------------------------------------------------------- memory


def test_saved_bytes_are_those_of_the_storages_that_the_graph_keeps():
    weight = torch.nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    with memory.SavedBytes(weight) as saved:
        y = weight(x)  # keeps x, and the weight, which is not counted
        z = y.exp()  # keeps z
        (z.view(8, 4) * z.view(8, 4)).sum().backward()  # keeps z again
    assert saved.bytes == 2 * 4 * 8 * 4


def test_saved_bytes_leave_out_autocast_copies_of_weights():
    weight = torch.nn.Linear(8, 16)
    x = torch.randn(4, 8, requires_grad=True)
    with memory.SavedBytes(weight) as saved, torch.autocast("cpu", torch.bfloat16):
        weight(x).sum().backward()
    assert saved.bytes == 4 * 8 * 2  # x in half precision


def test_live_bytes_follow_tensors_from_birth_to_death():
    known = torch.zeros(100)
    with memory.LiveBytes([known]) as live:
        assert live.live == 400
        a = torch.ones(1000)
        b = a[10:].view(-1, 9)
        del a
        assert live.live == 400 + 4000
        c = b + 1
        del b
        assert (live.live, live.peak) == (400 + 3960, 400 + 4000 + 3960)
        c.mul_(2)
        w = torch.ones(1000, requires_grad=True)
        y = w.exp().exp().sum()
        assert live.live == 400 + 3960 + 4000 + 2 * 4000 + 4
        y.backward()
        del y, c
        assert live.live == 400 + 2 * 4000  # w and its gradient
    # In the backward pass w, one exponential and two gradients, or two and one; the sum and its gradient.
    assert live.peak == 400 + 3960 + 4 * 4000 + 2 * 4


def test_the_peak_of_a_step_is_the_allocators():
    torch.manual_seed(0)
    model = tiny("text first")
    step = TrainStep(model, *batch(model))
    memory.prepare_optimizer(step.optimizer)
    assert all(p.grad is None for p in model.parameters())
    known = 3 * sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    known += sum(t.nbytes for t in step.inputs())
    step()
    found = memory.peak_bytes(step, model, step.optimizer, step.inputs(), torch.device("cpu"))
    step.optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    events = [(e.start_ns(), e.nbytes()) for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = known
    for _, size in sorted(events, key=lambda event: event[0]):
        live += size
        peak = max(peak, live)
    assert found == pytest.approx(peak, rel=0.05)
    assert found > known


def test_the_largest_batch_fits_and_the_next_does_not():
    def peak(pairs):
        return 10_000_000 + 70_000 * pairs + memory.loss_bytes(pairs)

    for limit in (10**8, 10**9):
        batch, fixed, slope = memory.largest_batch(limit, (8, peak(8)), (16, peak(16)))
        assert peak(batch) <= limit < peak(batch + 1)
        assert (fixed, slope) == (10_000_000, 70_000)
    assert memory.largest_batch(10**6, (8, peak(8)), (16, peak(16)))[0] == 0
    # Peaks that the batch hardly shows in: the rise is what a pair saves.
    batch, fixed, slope = memory.largest_batch(10**8, (8, peak(8)), (16, peak(8) + 1000), saved=70_000)
    assert slope == 70_000
    assert batch <= memory.largest_batch(10**8, (8, peak(8)), (16, peak(16)))[0] + 16


# ---------------------------------------------------------------------- times


def test_rounds_go_through_all_in_turn_and_back(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    order = []

    def work(name, seconds):
        def function():
            order.append(name)
            clock[0] += seconds

        return function

    functions = {"a": work("a", 1.0), "b": work("b", 2.0)}
    cpu = torch.device("cpu")
    assert timing.in_turn(functions, device=cpu, rounds=2, warmup=1) == {"a": [1, 1], "b": [2, 2]}
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert timing.in_turn(functions, device=cpu, rounds=1, warmup=0, repeat=3) == {"a": [1], "b": [2]}
    assert len(timing.in_turn(functions, device=cpu, rounds=9, warmup=1, seconds=13)["a"]) == 3
    assert len(timing.in_turn(functions, device=cpu, rounds=9, warmup=1, seconds=0)["a"]) == 2


def test_spread_and_ratios():
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([4.0]) == Spread(4.0, 4.0, 4.0, 1)
    assert timing.ratios([1.0, 3.0], [2.0, 2.0]) == [0.5, 1.5]
    assert timing.count_rounds([{"count": 5}, {"count": 3}]) == "3 to 5 rounds"


# ---------------------------------------------------------------------- the command


def test_counts_as_table_json_and_markdown(tmp_path, capsys):
    names = [f"{TINY}:method=none", TINY, f"{TINY}:scoring_depth=1"]
    paths = [tmp_path / "a" / "cost.json", tmp_path / "cost.md"]
    words = [*names, "--no-time", "--device", "cpu", "--batch-size", "16"]
    assert command.main([*words, "--json", str(paths[0]), "--markdown", str(paths[1])]) == 0
    told = capsys.readouterr().out
    found = json.loads(paths[0].read_text())
    plain, ours, shallow = found["models"]
    assert plain["tokens_per_layer"] == [65] * 6
    assert ours["tokens_per_layer"] == open_clip.create_model(TINY).tower.token_counts()
    assert plain["rrt"] == 0 < ours["rrt"] == shallow["rrt"]
    assert plain["vision_parameters"] == ours["vision_parameters"]
    sizes = sum(p.numel() for p in ModelSpec.parse(TINY).build(device="meta").parameters())
    assert ours["vision_parameters"] + ours["text_parameters"] == sizes - 1  # the logit scale
    share = {key: ours["gflops_per_pair"][key] for key in ("forward", "backward", "scoring")}
    assert sum(share.values()) == pytest.approx(ours["gflops_per_pair"]["total"])
    assert ours["gflops_per_pair"]["total"] < plain["gflops_per_pair"]["total"]
    assert shallow["gflops_per_pair"]["scoring"] < ours["gflops_per_pair"]["scoring"] / 100
    assert ours["text_tokens"] < plain["text_tokens"]
    assert ours["seconds"] is ours["peak"] is ours["saved"] is None
    assert "hours_per_epoch" not in ours
    ratio = f"({ours['gflops_per_pair']['total'] / plain['gflops_per_pair']['total']:.3f})"
    assert ratio in told
    assert ratio in paths[1].read_text()
    assert f"| {TINY} |" in paths[1].read_text()
    assert "step, s" not in told


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
        line = found["fixed"] + found["per_pair"] * found["largest_batch"]
        assert line == pytest.approx(2e9, rel=0.02)
    assert ours["saved"] < plain["saved"]
    assert plain["time_ratio"]["median"] == 1
    told = capsys.readouterr().out
    assert "largest batch in 2 GB" in told
    assert "CC3M+ epoch, h:min" in told


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    words = [f"{TINY}:method=none", TINY, "--no-time", "--device", "cpu", "--plot", str(tmp_path / "cost.png")]
    assert command.main(words) == 0
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_a_tower_that_looks_at_numbers_is_counted_in_a_real_step(monkeypatch):
    devices = []

    def build(spec, *, device, **options):
        devices.append(device)
        model = tiny("text first").to(device)
        model.visual.conv1.register_forward_pre_hook(lambda module, args: bool(args[0].sum() > 0) and None)
        return model

    monkeypatch.setattr(ModelSpec, "build", build)
    args = command._parser().parse_args([TINY, "--no-time", "--batch-size", "16", "--device", "cpu"])
    command._check(args)
    found = command.profile_counts([ModelSpec.parse(TINY)], args)[0]
    assert devices == ["meta", "cpu"]
    text = command.batch_text(tiny("text first"), ModelSpec.parse(TINY), args, 16)
    assert found.flops.total == batch_cost(tiny("text first"), columns(text)).total


def test_a_hugging_face_text_tower_from_a_folder(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    tower = transformers.BertConfig(vocab_size=64, **size, max_position_embeddings=100, pad_token_id=0)
    tower.save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path), "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}
    vision = {"image_size": 32, "patch_size": 8, "layers": 4, "width": 32, "head_width": 16}
    config = {"embed_dim": 20, "vision_cfg": vision, "text_cfg": text, "token_reduction": REDUCTION}
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
        (["ViT-Q-16"], "There is no model named 'ViT-Q-16'"),
        ([TINY, TINY], "given twice"),
        ([TINY, "--batch-size", "0"], "--batch-size is 0"),
        ([TINY, "--device", "tpu"], "no device 'tpu'"),
        ([TINY, "--caption-lengths", "nowhere.txt"], "neither a mean number of tokens"),
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
