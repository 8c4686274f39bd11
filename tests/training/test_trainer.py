"""One step is one step: whatever the number of processes or micro-batches it is spread over."""
import json
import math

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from open_clip_elip import with_token_reduction
from open_clip_elip.profile.flops import count
from open_clip_elip.text import count_columns
from training import checkpoint
from training.control import EXIT_NONFINITE
from training.distributed import Ranks
from training.errors import Stopped, UserError
from training.log import RunLog
from training.optim import create_optimizer
from training.tasks.base import Task
from training.tasks.contrastive import ContrastiveTask
from training.trainer import Trainer

from ..processes import spawn
from .tiny import VOCABULARY, MemoryData, gradients, micro_batches, pairs, run_options, tiny_clip

CPU = torch.device("cpu")


def make_trainer(args, model, batches, ranks=None, teacher=None, folder=None):
    ranks = ranks or Ranks(CPU)
    if folder:
        (folder / "checkpoints").mkdir()
    runnable = model if ranks.world_size == 1 else DistributedDataParallel(model, gradient_as_bucket_view=True)
    task = ContrastiveTask(args, ranks, model, teacher=teacher)
    return Trainer(args, ranks, model, runnable, task, MemoryData(batches), create_optimizer(model, args), folder)


def one_step(model, batch, teacher=None, **changes):
    """Its losses."""
    trainer = make_trainer(run_options(**changes), model, [batch], teacher=teacher)
    model.train()
    return trainer.step([batch])[0]


def one_process(siglip: bool, batch: dict) -> tuple[float, dict]:
    """Loss and gradients of the whole batch in one piece."""
    model = tiny_clip(siglip)
    losses = one_step(model, batch, siglip=siglip, batch_size=len(batch["text"]))
    return losses["loss"].item(), gradients(model)


def assert_same_gradients(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert expected[name].abs().sum() > 0 or "token_embedding" in name, name
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize("accum_freq", [2, 4])
def test_accumulation_equals_one_large_batch(siglip, accum_freq):
    batch = pairs(16)
    loss, expected = one_process(siglip, batch)
    model = tiny_clip(siglip)
    args = run_options(siglip=siglip, accum_freq=accum_freq, batch_size=16 // accum_freq)
    window = micro_batches(batch, accum_freq)
    trainer = make_trainer(args, model, window)
    model.train()
    losses, _ = trainer.step(window)
    assert losses["loss"].item() == pytest.approx(loss, rel=1e-12)
    assert_same_gradients(gradients(model), expected)


def test_accumulation_repeats_the_same_patch_dropout():
    model = tiny_clip(patch_dropout=0.5)
    args = run_options(accum_freq=2, batch_size=4)
    window = micro_batches(pairs(8), 2)
    trainer = make_trainer(args, model, window)
    model.train()
    seen = []
    original = trainer.task.features

    def spy(*arguments):
        features = original(*arguments)
        seen.append(features["image_features"].detach())
        return features

    trainer.task.features = spy
    trainer.step(window)
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


TWO_PROCESS_CASES = [  # siglip, accum_freq, local_loss
    (False, 1, True),
    (False, 1, False),
    (False, 2, True),
    (True, 1, True),
    (True, 2, True),
]


def _two_processes(rank, folder, batch):
    ranks = Ranks(CPU, rank, rank, 2)
    for i, (siglip, accum_freq, local_loss) in enumerate(TWO_PROCESS_CASES):
        model = tiny_clip(siglip)
        args = run_options(siglip=siglip, accum_freq=accum_freq, batch_size=8 // accum_freq, local_loss=local_loss)
        # In a window, micro-batch j of all ranks together is the j-th slice of the global batch.
        window = [micro_batches(part, 2)[rank] for part in micro_batches(batch, accum_freq)]
        trainer = make_trainer(args, model, window, ranks)
        trainer.engine.model.train()
        losses, _ = trainer.step(window)
        torch.save((ranks.mean(losses)["loss"], gradients(model)), f"{folder}/{i}-{rank}.pt")


def test_two_processes_equal_one(tmp_path):
    batch = pairs(16)
    spawn(_two_processes, str(tmp_path), batch)
    for i, (siglip, _, _) in enumerate(TWO_PROCESS_CASES):
        loss, expected = one_process(siglip, batch)
        for rank in range(2):
            found_loss, found = torch.load(tmp_path / f"{i}-{rank}.pt")
            assert found_loss == pytest.approx(loss, rel=1e-6)  # the mean over ranks is taken in float32
            assert_same_gradients(found, expected)


class Squares(Task):
    """A loss of each process's own, finished: nothing in it is per sample."""

    def losses(self, model, batch, progress):
        return {"loss": model(batch["image"]).square().mean()}


def squares_trainer(ranks: Ranks, window: list[dict], **changes) -> Trainer:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    runnable = model if ranks.world_size == 1 else DistributedDataParallel(model)
    args = run_options(accum_freq=len(window), **changes)
    trainer = Trainer(args, ranks, model, runnable, Squares(), MemoryData(window), create_optimizer(model, args))
    trainer.engine.model.train()
    return trainer


def _one_rank_is_not_finite(rank, folder):
    found, pictures = {}, torch.arange(12.0).view(4, 3) / 12
    for precision in ("fp32", "amp", "amp_bf16"):
        batch = {"image": pictures * (torch.inf if rank else 1), "key": ["a", "b", "c", "d"]}
        trainer = squares_trainer(Ranks(CPU, rank, rank, 2), [batch], precision=precision, ema_decay=0.5)
        weights = trainer.model.weight.detach().clone()
        trainer.step([batch])
        averages = trainer.ema.state_dict()["weight"].clone()
        trainer.step([{**batch, "image": pictures}])
        found[precision] = (weights, averages, trainer.ema.updates, trainer.ema.state_dict(), trainer.nonfinite)
    torch.save(found, f"{folder}/{rank}.pt")


def test_averages_agree_after_a_step_that_one_rank_found_not_finite(tmp_path):
    """Also under `amp`: whether a step counts is decided for all ranks together, not by each rank's own loss."""
    spawn(_one_rank_is_not_finite, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for precision in first:
        for weights, averages, updates, _, _ in (first[precision], second[precision]):
            assert torch.equal(averages, weights) and updates == 1, precision  # of the second step alone
        for name, value in first[precision][3].items():
            assert torch.equal(value, second[precision][3][name]) and value.isfinite().all(), (precision, name)


def test_a_finished_loss_is_averaged_over_micro_batches():
    """Its gradient is that of the mean, and it is not taken for features of a sample."""
    batch = {"image": torch.arange(12.0).view(4, 3) / 12, "key": list("abcd")}
    found = []
    for window in ([batch], micro_batches(batch, 2)):
        trainer = squares_trainer(Ranks(CPU), window, batch_size=4 // len(window))
        losses, _ = trainer.step(window)
        found.append((losses["loss"], trainer.model.weight.grad))
    assert losses["loss"].shape == ()
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("locked", [False, True])
def test_a_step_costs_what_its_batch_is_counted_at(locked):
    """Captions of several lengths, counted by themselves, add up to the operations of the whole batch."""
    model, batch = tiny_clip(dtype=torch.float32), pairs(32, dtype=torch.float32)
    for length, rows in ((2, slice(0, 9)), (5, slice(9, 20))):
        batch["text"][rows, length:] = 0
        batch["text"][rows, length - 1] = VOCABULARY - 1
    if locked:
        model.lock_text_tower(freeze_layer_norm=True)
    trainer = make_trainer(run_options(batch_size=32), model, [batch])
    batch = trainer.task.prepare(batch)
    assert len({part.shape[1] for part in batch["text"].parts}) > 1
    image, text, shapes = batch["image"].to("meta"), batch["text"].to("meta"), trainer.task.shapes
    cost, counted = trainer.task.cost(batch), count(shapes, lambda: shapes(image, text))
    assert cost.operations * 32 == counted.total and counted.scoring > 0
    assert cost.tokens == 16 + count_columns(batch["text"]) / 32


def test_distillation_follows_the_teacher():
    teacher = tiny_clip(seed=1).eval().requires_grad_(False)
    losses = one_step(tiny_clip(), pairs(8), teacher)
    assert {"contrastive_loss", "distill_loss", "loss"} <= losses.keys()
    assert losses["loss"].item() == pytest.approx(losses["contrastive_loss"].item() + losses["distill_loss"].item())
    assert all(p.grad is None for p in teacher.parameters())


def test_training_lowers_the_loss():
    batch = pairs(16, dtype=torch.float32)
    trainer = make_trainer(run_options(lr=1e-3, batch_size=16), tiny_clip(dtype=torch.float32), [batch])
    values = [trainer.step([batch])[0]["loss"].item() for _ in range(50)]
    assert values[-1] < 0.3 < math.log(16) / 2 < values[0]


def test_the_logit_scale_is_clamped_to_100():
    model = tiny_clip()
    with torch.no_grad():
        model.logit_scale.fill_(10.0)
    one_step(model, pairs(8))
    assert model.logit_scale.item() == pytest.approx(math.log(100))


def test_under_autocast_scored_layers_are_trained_too():
    """Autocast keeps the half-precision copy of a weight; one made in the scoring pass, without gradient, must not be
    used in the main path (torch up to 2.8 did so). Stages of two layers: in one-layer stages no block is run to score.
    """
    model = tiny_clip(dtype=torch.float32)
    reduced = with_token_reduction(model, depths=(2, 2, 2), keep_ratio=(1.0, 0.6, 0.3))
    one_step(reduced, pairs(8, dtype=torch.float32), precision="amp_bf16")
    for name, p in reduced.visual.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


# ---------------------------------------------------------------------- what is not finite, what cannot be written


def poisoned(batch):
    image = batch["image"].clone()
    image[2] = float("nan")
    return batch | {"image": image}


def nonfinite_run(tmp_path, **changes):
    """Three batches, the second one with a NaN."""
    batches = [pairs(8, seed=0), poisoned(pairs(8, seed=1)), pairs(8, seed=2)]
    model = tiny_clip()
    trainer = make_trainer(run_options(**changes), model, batches, folder=tmp_path)
    return trainer, model, batches


@pytest.mark.parametrize("ahead", [False, True])
def test_a_non_finite_step_is_skipped_and_its_samples_recorded(ahead, tmp_path):
    trainer, model, batches = nonfinite_run(tmp_path, nonfinite="skip")
    trainer.runs_ahead = ahead
    trainer.fit(RunLog(None))
    expected = tiny_clip()
    reference = make_trainer(run_options(), expected, batches)
    expected.train()
    for batch in (batches[0], batches[2]):
        reference.step([batch])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    (record,) = map(json.loads, (tmp_path / "nonfinite.jsonl").read_text().splitlines())
    assert record["step"] == 1 and record["keys"] == batches[1]["key"] and math.isnan(record["loss"])
    assert (trainer.steps, trainer.nonfinite_steps) == (3, 1)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_non_finite_step_stops_the_run_at_good_weights(ahead, tmp_path):
    """On a GPU, which runs ahead, one step later."""
    trainer, model, batches = nonfinite_run(tmp_path, nonfinite="stop")
    trainer.runs_ahead = ahead
    with pytest.raises(Stopped, match="step 1 was not finite") as stopped:
        trainer.fit(RunLog(None))
    assert stopped.value.code == EXIT_NONFINITE
    state = torch.load(checkpoint.newest(tmp_path / "checkpoints"), weights_only=True)
    steps = 2 + ahead
    assert (state["step"], state["epoch_steps"], state["nonfinite_steps"]) == (steps, steps, 1)
    expected = tiny_clip()
    reference = make_trainer(run_options(), expected, batches)
    expected.train()
    for batch in batches[:steps:2]:
        reference.step([batch])
    assert all(torch.equal(v, state["state_dict"][k]) for k, v in expected.state_dict().items())


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_weights_that_are_not_finite_end_a_run(nonfinite, tmp_path):
    trainer, model, _ = nonfinite_run(tmp_path, nonfinite=nonfinite)
    with torch.no_grad():
        model.logit_scale.fill_(float("nan"))
    with pytest.raises(Stopped, match="weights are not finite any more.*lower --lr") as stopped:
        trainer.fit(RunLog(None))
    assert stopped.value.code == EXIT_NONFINITE and not list((tmp_path / "checkpoints").iterdir())


def test_a_full_disk_does_not_end_the_training(tmp_path, monkeypatch, caplog):
    original, attempts = checkpoint.save, []

    def failing(state, path):
        attempts.append(path.name)
        if len(attempts) in (2, 3):
            raise OSError(28, "No space left on device")
        original(state, path)

    monkeypatch.setattr(checkpoint, "save", failing)
    monkeypatch.setattr("training.trainer.time.sleep", lambda seconds: None)
    trainer = make_trainer(run_options(epochs=2), tiny_clip(), [pairs(8)], folder=tmp_path)
    trainer.fit(RunLog(None))
    assert attempts == ["epoch_1.pt", "epoch_2.pt", "epoch_2.pt", "epoch_2.pt"]
    assert "No space left" in caplog.text
    assert checkpoint.newest(tmp_path / "checkpoints").name == "epoch_2.pt"


def test_a_failed_save_is_tried_again_soon(tmp_path, monkeypatch):
    saver = checkpoint.Saver(tmp_path, every_minutes=None)
    state = {"epoch": 1, "state_dict": {}}
    monkeypatch.setattr(checkpoint, "save", lambda state, path: (_ for _ in ()).throw(OSError(30, "Read-only")))
    assert not saver.due() and not saver.save(state, "epoch_1.pt") and saver.failed and not saver.due()
    saver.saved_at -= saver.RETRY_SECONDS
    assert saver.due()
    monkeypatch.undo()
    assert saver.save(state, "epoch_1.pt") and not saver.failed and not saver.due()


# ---------------------------------------------------------------------- durations, averages


def test_a_run_may_end_in_the_middle_of_an_epoch(tmp_path):
    batches = [pairs(8, seed=i) for i in range(3)]
    trainer = make_trainer(run_options(duration="4steps", warmup="50%"), tiny_clip(), batches, folder=tmp_path)
    assert (trainer.plan.epochs, trainer.plan.warmup_steps) == (2, 2)
    trainer.fit(RunLog(None))
    assert (trainer.steps, trainer.samples, trainer.epoch) == (4, 32, 2)
    assert make_trainer(run_options(duration="48samples"), tiny_clip(), batches).plan.total_steps == 6
    with pytest.raises(UserError, match="not a duration"):
        make_trainer(run_options(duration="soon"), tiny_clip(), batches)
