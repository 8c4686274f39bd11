"""METER's pre-training without a run: which words and images are drawn, rates and decay, accumulation, shortcuts."""
from __future__ import annotations

import copy
import random

import pytest
import torch

from open_clip_elip.fusion.objectives import choose_words
from open_clip_elip.identity import Identity, create, describe
from open_clip_elip.profile.flops import count
from training.data.false_pairs import FalsePairs
from training.data.pixels import Images, to_device
from training.data.samples import Sample
from training.optim import create_optimizer, create_schedule
from training.tasks.base import Engine
from training.tasks.meter import FIELDS, MeterPretraining, deal

from ...open_clip_elip.fusion.oracle import NO_DROPOUT, after_first_epoch
from ..fusion_runs import METER, write_vocabulary
from ..tiny import run_options


def meter(reduction: dict | None = None, task: str | None = None, **text) -> torch.nn.Module:
    torch.manual_seed(0)
    cfg = METER["text_cfg"]
    parts = {name: cfg[name] | NO_DROPOUT for name in ("bert", "fusion")}
    config = METER | {"text_cfg": cfg | parts | text, "token_reduction": reduction}
    if task is not None:
        config |= {"task": task, "answers": ["yes", "no", *"abc"]}
    return create(Identity("meter", "x", config, {"size": (32, 32)})).train()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    from open_clip_elip.fusion.tokenizer import WordPieces

    vocabulary = write_vocabulary(tmp_path_factory.mktemp("v") / "v", ("a", "red", "thing", "##ing", "##s", "blue"))
    return WordPieces(str(vocabulary), 12, str, ends=True)


def batch(words, count: int = 4) -> dict:
    image = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    texts = ["a red thing", "blue things", "a red red red thing", "a", "a blue thing", "red"][:count]
    return {"text": words(texts), "image": Images(image), "key": [""] * count}


# ---------------------------------------------------------------------- draws


def test_whole_words_are_masked_while_they_fit_a_budget():
    text = torch.tensor([[2, 5, 6, 7, 8, 3, 0, 0, 0, 0] + [0] * 40]).repeat(4000, 1)  # 5 6+7 8
    continues = torch.zeros(10, dtype=torch.bool)
    continues[7] = True
    torch.manual_seed(0)
    chosen = choose_words(text, torch.rand(4000, 50), continues, torch.tensor([2, 3]))
    assert torch.equal(chosen[:, 2], chosen[:, 3]) and not chosen[:, [0, 5]].any()
    taken = chosen.sum(dim=1)  # padding too: 48 tokens in 47 words, of which 8 are taken, or 7 and one left over
    assert taken.max() == 8 and (taken == 8).float().mean() > 0.95
    assert chosen[:, 1].float().mean() == pytest.approx(8 / 48, abs=0.02)
    first = choose_words(torch.tensor([[7, 7, 5]]), torch.rand(1, 3), continues, torch.tensor([2]))
    assert first.sum() in (0, 1)  # a budget of one: two pieces without a beginning are one word, which does not fit


def test_half_of_the_texts_get_their_own_image(words):
    task = MeterPretraining(meter(), words)
    made = [task.prepare(batch(words, 5)) for _ in range(20)]
    assert {int(one["matches"].sum()) for one in made} == {2} and len({(*one["matches"].tolist(),) for one in made}) > 3
    for one in made:
        assert torch.equal(one["seen"] == torch.arange(5), one["matches"] == 1) and one["seen"].max() < 5
    image, false = (Images(torch.full((3, 1), value)) for value in (1.0, 2.0))
    found = deal(image, false, torch.tensor([0, 1, 0]))
    assert found["seen"].tolist() == [3, 1, 4] and found["image"].pixels.flatten().tolist() == [1, 1, 1, 2, 2]


def test_a_drawn_image_is_of_the_same_file_and_maybe_another():
    rows = [Sample(f"{n // 2}.png", (f"{n // 2}.png",), {"caption": "a"}, "x" if n < 6 else "y", n) for n in range(9)]
    encoding = FalsePairs(None, rows=rows, same_file=True)
    drawn = [encoding.drawn(rows[0], random) for _ in range(60)]
    assert {one.key for one in drawn} == {"0.png", "1.png", "2.png"}
    encoding.own = False
    assert {encoding.drawn(rows[0], random).key for _ in range(40)} == {"1.png", "2.png"}


def test_a_batch_without_a_masked_word_learns_matching_alone(words):
    task = MeterPretraining(meter(), words)
    made = task.prepare(batch(words))
    made |= {"chosen": made["chosen"][:0], "labels": made["labels"][:0], "image": made["image"].pixels}
    losses = task.losses(task.model, made, after_first_epoch())
    assert losses["mlm"] == 0 and losses["loss"] == losses["itm"]
    losses["loss"].backward()
    grads = [p.grad for p in task.model.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("reduction", [None, {"method": "elip"}, {"method": "evit"}, {"method": "tome"}])
def test_shortcuts_change_no_number(reduction, words):
    found, short = [], meter(reduction).double()
    for shortcuts in (True, False):
        model = copy.deepcopy(short)
        model.tower.shortcuts = shortcuts
        task = MeterPretraining(model, words)
        torch.manual_seed(3)
        made = task.prepare(batch(words))
        assert (made["text"].shape[1] < 12) == (made["tokens"].places is not None) == shortcuts
        made["image"] = made["image"].pixels.double()
        losses = task.losses(model, made, after_first_epoch())
        losses["loss"].backward()
        found.append((losses, {name: p.grad for name, p in model.named_parameters()}))
    (a, grads), (b, others) = found
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, others, rtol=1e-9, atol=1e-12)
    assert all(grad is not None for grad in grads.values())  # nothing in the model is without use


def test_accumulation_is_the_mean_of_its_batches(words):
    task = MeterPretraining(meter({"method": "elip"}), words)
    window = [task.prepare(batch(words)) for _ in range(2)]
    window = [one | {"image": one["image"].pixels} for one in window]
    engine = Engine(task.model, "fp32", torch.device("cpu"))
    task.gradients(window, engine, after_first_epoch())
    found = {name: p.grad.clone() for name, p in task.model.named_parameters()}
    task.model.zero_grad()
    sum(task.losses(task.model, one, after_first_epoch())["loss"] / 2 for one in window).backward()
    torch.testing.assert_close(found, {name: p.grad for name, p in task.model.named_parameters()})
    assert set(FIELDS) <= window[0].keys()


# ---------------------------------------------------------------------- optimizer

RATES = {"pretraining": 5, "vqa": 50, "nlvr2": 10, "entailment": 10, "retrieval": 1}


@pytest.mark.parametrize("task", RATES)
def test_rates_and_decay_are_those_of_the_release(task):
    from training.tasks.momentum import DistilledTask

    model = meter(task=None if task == "pretraining" else task)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = DistilledTask(model, alpha=0).parameters(model, run_options(wd=0.01))
    found = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    fixed = {"itm_head.weight", "itm_head.bias"} if task == "retrieval" else set()
    assert found.keys() == set(names.values()) - fixed
    for name, (rate, decay) in found.items():
        head = name.startswith(("mlm_head", "itm_head", "head", "rank_output"))
        assert rate == (RATES[task] if head else 5 if name.startswith("cross_modal") else 1), name
        assert decay == (0 if "bias" in name or "LayerNorm.weight" in name else 0.01), name
    decayed = {"visual.ln_pre.weight", "visual.class_embedding", "token_type_embeddings.weight"}
    assert all(found[name] == (1, 0.01) for name in decayed)
    spared = DistilledTask(model, alpha=0).parameters(model, run_options(wd=0.01, decay_norms=False))
    one_dimensional = {names[id(p)] for group in spared for p in group["params"] if not group["weight_decay"]}
    wanted = {n for n, p in model.named_parameters() if p.ndim < 2 and p.requires_grad} - {"visual.class_embedding"}
    assert one_dimensional == wanted


def test_the_rate_rises_from_0_and_falls_to_0():
    options = run_options(lr=2.0, lr_scheduler="linear", skip_scheduler=False)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "weight_decay": 0.0, "lr_scale": 5}]
    optimizer = create_optimizer(groups, options)
    schedule = create_schedule(optimizer, options, total_steps=20, warmup_steps=2)
    assert [schedule(step) / 2 for step in (0, 1, 2, 3, 11, 20, 22)] == pytest.approx([0, 0.5, 1, 17 / 18, 0.5, 0, 0])
    schedule(1)
    assert optimizer.param_groups[0]["lr"] == 5


# ---------------------------------------------------------------------- costs


@pytest.mark.parametrize(
    ("name", "shortcuts", "error"),
    [("METER-Nano-8-64", True, 1e-9), ("METER-Nano-8-64", False, 1e-9), ("METER-Nano-8-64-ELIP", True, 0.01)],
)
def test_the_log_tells_what_a_batch_costs(words, name, shortcuts, error):
    model = create(describe(name), pretrained_text=False).train()
    model.tower.shortcuts = shortcuts
    task = MeterPretraining(model, words)
    for lengths, drawn in (((9, 2, 14, 1, 7), True), ((19, 25, 4, 6), False)):
        text, count_of = torch.where(torch.arange(25) < torch.tensor(lengths)[:, None], 7, 0), len(lengths)
        images = Images(torch.randn(count_of, 3, 64, 64))
        made = task.prepare({"text": text, "image": images} | ({"false_images": images} if drawn else {}))
        made = to_device(made, torch.device("cpu"))
        cost, counted = task.cost(made), count(model, lambda made=made: task.losses(model, made, None)["loss"])
        assert cost.operations * count_of == pytest.approx(counted.total, rel=error)
        tokens = sum(lengths) if shortcuts else 25 * count_of
        assert cost.tokens * count_of == pytest.approx(64 * len(made["image"]) + tokens)
        assert len(made["image"]) == count_of + (count_of + 1) // 2 * drawn
