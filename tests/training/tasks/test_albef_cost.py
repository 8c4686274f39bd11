"""ALBEF's step: as released or with all savings it has the same numbers; what it costs is what is counted."""
from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch

from open_clip_elip import tower
from open_clip_elip.fusion.bert import Tokens
from open_clip_elip.fusion.objectives import mask_tokens
from open_clip_elip.identity import Identity, create
from open_clip_elip.profile import command
from open_clip_elip.profile.flops import count
from training.tasks.albef import AlbefPretraining
from training.tasks.alignment import AlignmentTask

from ..fusion_runs import ALBEF, write_albef

LENGTHS = (9, 2, 5, 1, 7, 12)
REDUCTIONS = {
    "none": None, "elip": {"method": "elip"}, "elip, one layer": {"method": "elip", "scoring_depth": 1},
    "tome": {"method": "tome"},
}  # fmt: skip


def albef(reduction: str = "none", dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    bert = ALBEF["text_cfg"]["bert"] | {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = ALBEF | {"text_cfg": ALBEF["text_cfg"] | {"bert": bert}, "token_reduction": REDUCTIONS[reduction]}
    return create(Identity("albef", "x", config, {"size": (32, 32)})).train()


def batch(task: AlignmentTask, lengths=LENGTHS, seed: int = 0) -> dict:
    """As the task prepares it, but for the tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(5, 60, (len(lengths), 12), generator=generator)
    text[:, 0] = 2
    text[torch.arange(12) >= torch.tensor(lengths)[:, None]] = 0
    made = AlignmentTask.prepare(task, {"text": text, "image": torch.randn(len(lengths), 3, 32, 32)})
    masked, chosen, labels = mask_tokens(made["text"], 4, 64, torch.tensor([0, 2]))
    return made | {"masked": masked, "chosen": chosen, "labels": labels, "numbers": torch.tensor([3, 1, 4, 1, 5, 9])}


def losses(task: AlignmentTask, made: dict, model=None, **more) -> dict:
    fields = {name: made[name] for name in task.FIELDS}
    return (model or task.model)(made["image"], made["text"], task.step, alpha=0.4, **fields, **more)


@pytest.mark.parametrize("kind", [AlbefPretraining, AlignmentTask])
@pytest.mark.parametrize("reduction", ["none", "elip", "tome"])
def test_shortcuts_change_no_number(kind, reduction):
    short = albef(reduction).double()
    found = []
    for shortcuts in (True, False):
        model = copy.deepcopy(short)
        model.tower.shortcuts = shortcuts
        task = kind(model, queue_size=24)
        task.queues.double()
        made = batch(task)
        assert (made["tokens"].places is not None) == shortcuts
        made["image"] = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
        negatives = [torch.tensor([1, 0, 0, 2, 2, -1]), torch.tensor([5, 2, 5, 1, 0, 3])]
        torch.manual_seed(2)
        made["masked"], made["chosen"], made["labels"] = mask_tokens(made["text"], 4, 64, torch.tensor([0, 2]))
        one = losses(task, made, negatives=negatives)
        one["loss"].backward()
        found.append((one, {name: p.grad for name, p in model.named_parameters()}, task.pending[0]))
    (a, grads, pending), (b, others, remembered) = found
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, others, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(pending, remembered, rtol=1e-12, atol=1e-12)


def test_the_mask_of_a_text_stays_when_a_word_becomes_padding_by_chance():
    model = albef()
    model.eval()
    task = AlbefPretraining(model, queue_size=24)
    made = batch(task)
    place = made["chosen"][:1]
    padded = made["masked"].flatten().index_fill(0, place, 0).view_as(made["masked"])
    memory = model.read(model.image_states(made["image"]))
    ways = made["tokens"], Tokens(made["text"] != 0)
    words = [model.words(padded, made["chosen"], memory, tokens) for tokens in ways]
    torch.testing.assert_close(*words)


def test_the_tower_is_compiled_once_for_captions_of_all_lengths(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(tower, "_compiled", lambda: torch.compile(tower.ImageTower._layers, backend=backend))
    model = albef("elip")
    eager = AlbefPretraining(copy.deepcopy(model), queue_size=24)
    model.tower.compiles = True
    task = AlbefPretraining(model, queue_size=24)
    for lengths in (LENGTHS, (3, 6, 4, 4, 2, 5), (4, 9, 4, 4, 2, 5)):
        made, each = batch(task, lengths), [torch.arange(6).roll(1)] * 2
        found, expected = (losses(one, made, negatives=each) for one in (task, eager))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        found["loss"].backward()
    assert len(graphs) == 2  # the model's tower, and the twin's


# ---------------------------------------------------------------------- operations


def multiply_adds(task: AlbefPretraining, lengths, columns: int, chosen: int, shortcuts: bool) -> tuple[int, int, int]:
    """Of a step, by hand: the student's forward pass, its backward pass, the twin's. Width 32, 6 + 2 + 2 layers."""
    D, V, E, Q, B = 32, 64, 16, task.queues["text"].size, len(lengths)
    n = sum(lengths) if shortcuts else B * columns
    visual = task.model.tower.token_counts()
    image = sum(12 * D * D * t + 2 * t * t * D for t in visual)
    full = sum(12 * D * D * 17 + 2 * 17 * 17 * D for _ in visual)
    pixels, keys = 16 * 3 * 64 * D, 2 * D * D

    def attended(texts: int, rows: int, seen: int) -> int:
        return texts * rows * seen * 2 * D

    ffn, own = 4 * D * D, 4 * D * D  # a token's: 64 wide; queries, keys, values, output
    text = 2 * (n * (own + ffn) + attended(B, columns, columns))
    N, M = visual[-1], 17

    def fused(images: int, tokens: int, looked: bool = False) -> int:
        """MLM: all tokens through both layers, or of the last those chosen; by keys and values, or without them."""
        last = chosen if shortcuts else tokens
        of_layers = tokens * (own + 2 * D * D + ffn) + tokens * keys + last * (2 * D * D + 2 * D * D + ffn)
        head = (chosen if shortcuts else tokens) * (D * D + D * V)
        cross = 2 * B * images * keys + 2 * attended(B, columns, images)
        if looked:
            cross = 2 * B * columns * keys + 2 * 2 * attended(B, columns, images)  # of 2 heads, each as wide as all
        return of_layers + head + cross + 2 * attended(B, columns, columns)

    if shortcuts:
        itm = n * (own + D * D) + 3 * n * (D * D + ffn) + 3 * n * keys + 3 * B * (4 * D * D + ffn)
        itm += attended(B, columns, columns) + attended(3 * B, 1, columns)
        itm += attended(3 * B, columns, N) + attended(3 * B, 1, N)
    else:
        itm = 2 * 3 * (n * (own + 2 * D * D + ffn) + B * N * keys)
        itm += 2 * attended(3 * B, columns, columns) + 2 * attended(3 * B, columns, N)
    heads = 2 * B * D * E + 3 * B * D * 2
    similar = 2 * B * (B + Q) * E
    forward = B * (pixels + image) + 2 * text + itm + fused(N, n) + heads + similar
    # Twice that, but pixels have no gradient, nor have the features that similarities are taken with.
    backward = 2 * forward - B * pixels - similar
    spared = (n - B) * (2 * D * D + ffn) + attended(B, columns - 1, columns) if shortcuts else 0
    twin = B * (pixels + full) + 2 * text - spared + fused(M, n, shortcuts) + 2 * B * D * E + similar
    return forward, backward, twin


@pytest.mark.parametrize("reduction", ["none", "elip, one layer"])
@pytest.mark.parametrize("shortcuts", [True, False])
def test_operations_are_those_of_the_products(reduction, shortcuts):
    model = albef(reduction)
    model.tower.shortcuts = shortcuts
    task = AlbefPretraining(model, queue_size=24)
    made = batch(task)
    each = [torch.arange(6).roll(1)] * 2
    scoring = count(model, partial(model.image_states, made["image"], torch.zeros(6, 32), reduce=True)).scoring
    found = count(model, lambda: losses(task, made, negatives=each)["loss"])
    expected = multiply_adds(task, LENGTHS, 12, len(made["chosen"]), shortcuts)
    assert (found.forward, found.backward, found.scoring - scoring) == tuple(2 * one for one in expected)


@pytest.mark.parametrize(
    ("reduction", "kind", "shortcuts"),
    [("elip", AlbefPretraining, True), ("none", AlbefPretraining, False), ("tome", AlignmentTask, True)],
)
def test_the_log_tells_what_a_batch_costs(reduction, kind, shortcuts):
    model = albef(reduction, dropout=0.1)
    model.tower.shortcuts = shortcuts
    task = kind(model, queue_size=24)
    for lengths in (LENGTHS, (3, 6, 4, 4, 2, 5)):
        made = batch(task, lengths)
        each = [torch.arange(6).roll(1)] * 2
        counted = count(model, lambda made=made, each=each: losses(task, made, negatives=each)["loss"]).total
        cost, within = task.cost(made), 6 * 2 * 16 * 6 * (6 - 2)  # similarities with the batch: two pairs were counted
        assert cost.operations * 6 == pytest.approx(counted - within, rel=1e-9)
        tokens = sum(lengths) / 6 if shortcuts else max(lengths)
        assert cost.tokens == 16 + tokens
    assert all(p.device.type == "cpu" for p in task.twin.parameters()) and len(task.pending) == 2


def profile(folder, *words) -> list[dict]:
    out = folder / "cost.json"
    assert command.main([*words, "--device", "cpu", "--batch-size", "4", "--json", str(out)]) == 0
    return json.loads(out.read_text())["models"]


def test_profile_counts_the_whole_step(tmp_path, capsys):
    plain, ours = "ALBEF-Nano-8-64", "ALBEF-Nano-8-64-ELIP"
    names = [plain, f"{plain}:shortcuts=true", ours, f"{ours}:scoring_depth=1"]
    released, saved, exact, shallow = profile(tmp_path, *names, "--no-time", "--caption-lengths", "9")
    assert released["text_tokens"] == released["caption_tokens"]["max"] > exact["text_tokens"]
    flops = [one["flops"] for one in (released, saved, exact, shallow)]
    totals = [one["forward"] + one["backward"] for one in flops]
    assert totals[0] > totals[1] > totals[2] == totals[3]
    scoring = [one["scoring"] for one in flops]
    assert scoring[:2] == [0, 0] and 0 < scoring[3] < scoring[2] / 10
    teachers = [one["teacher"] for one in flops]
    assert teachers[0] > teachers[1] == teachers[2] == teachers[3]
    assert "momentum twin, on top" in capsys.readouterr().out


def test_profile_takes_a_real_step(tmp_path):
    name = write_albef(tmp_path / "model")
    words = [f"{name}:method=none", name, "--rounds", "1", "--caption-lengths", "9"]
    released, ours = profile(tmp_path, *words)
    assert ours["saved"] < released["saved"]
    parameters = 4 * (ours["vision_parameters"] + ours["text_parameters"])
    assert ours["peak"] > 4 * parameters + ours["saved"]  # weights, twin, two averages
    assert ours["seconds"]["count"] == 1
