"""A sharded model trains, evaluates and is saved as if it were whole. Two processes do all of the training below."""
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from open_clip_elip import without_token_reduction
from training import checkpoint, sharding
from training.distributed import Ranks
from training.ema import Ema
from training.errors import UserError
from training.evaluation.passes import evaluation_mode
from training.optim import create_optimizer
from training.tasks.contrastive import ContrastiveTask
from training.trainer import Trainer

from ..processes import spawn
from .runs import assert_equal_weights as assert_equal
from .tiny import MemoryData, micro_batches, pairs, run_options, tiny_clip

CPU = torch.device("cpu")
BATCHES = [pairs(16, seed=i) for i in range(3)]
CLIP_NORM = 0.5  # below the norm of every gradient here
CASES = {  # name: (text first, gradient checkpointing, part of the image tower locked), micro-batches
    "plain": ((False,), 1),
    "text first": ((True,), 1),
    "text first, checkpointing": ((True, True), 1),
    "text first, accumulation": ((True,), 2),
    "plain, checkpointing, accumulation": ((False, True), 2),
    "text first, locked": ((True, False, True), 1),
}


def build(text_first=True, checkpointing=False, locked=False, seed=0, dtype=torch.float64) -> nn.Module:
    model = tiny_clip(seed=seed, dtype=dtype)
    model = model if text_first else without_token_reduction(model)
    model.set_grad_checkpointing(checkpointing)
    if locked:
        model.lock_image_tower(unlocked_groups=3)
    return model.train()


def make_trainer(model, micro_batches=1, ranks=None, runnable=None, precision="fp32", norm=CLIP_NORM) -> Trainer:
    ranks = ranks or Ranks(CPU)
    args = run_options(
        accum_freq=micro_batches, batch_size=16 // micro_batches // ranks.world_size, grad_clip_norm=norm,
        precision=precision,
    )
    task = ContrastiveTask(args, ranks, build())  # of a model not sharded, as in a run
    data = MemoryData([{"text": ()}] * micro_batches)  # the tests call `step` with batches of their own
    optimizer = create_optimizer(model, args)
    return Trainer(args, ranks, model, runnable or model, task, data, optimizer)


def window(batch: dict, count: int, ranks: Ranks) -> list[dict]:
    """This rank's part of `batch`, in micro-batches: the j-th of all ranks is the j-th slice of the batch."""
    parts = micro_batches(batch, count)
    return parts if ranks.world_size == 1 else [micro_batches(part, ranks.world_size)[ranks.rank] for part in parts]


def train(trainer: Trainer, batches: list[dict]) -> list[float]:
    """Loss of each step, over all processes."""
    losses = []
    dtype = trainer.parameters[-1].dtype
    for batch in batches:
        batch = {**batch, "image": batch["image"].to(dtype)}
        found, _ = trainer.step(window(batch, trainer.options.accum_freq, trainer.ranks))
        losses.append(sum(trainer.ranks.gather(found["loss"].item())) / trainer.ranks.world_size)
    return losses


def gradients(model: nn.Module) -> dict:
    """Whole, on every process."""
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for name, g in found.items()}


def state(trainer: Trainer) -> dict:
    model_state, optimizer_state = sharding.full_state_dict(trainer.model, trainer.optimizer)
    return {"state_dict": model_state, "optimizer": optimizer_state}


def load(trainer: Trainer, saved: dict) -> None:
    sharding.load_full_state_dict(trainer.model, trainer.optimizer, saved["state_dict"], saved["optimizer"])


# ---------------------------------------------------------------- what the two processes do


def _two_processes(rank: int, folder: str) -> None:
    ranks = Ranks(CPU, rank, rank, 2)
    found = {}
    for name, (kind, count) in CASES.items():
        trainer = make_trainer(sharding.shard(build(*kind), ranks, "fp32"), count, ranks)
        losses = train(trainer, BATCHES[:2])
        found[name] = {"losses": losses, "gradients": gradients(trainer.model), **state(trainer)}
    jobs = [_resume, _keep_ddps_numbers, _start_from_rank_0, _add_up, _evaluate, _overflow]
    for job in [*jobs, _check_optimizers]:
        found[job.__name__] = job(ranks, folder)
    torch.save(found, f"{folder}/{rank}.pt")


def _resume(ranks, folder):
    """Trains on from a checkpoint of one process, writes one, and trains on from that."""
    one_process = checkpoint.load(f"{folder}/one_process.pt")
    trainer = make_trainer(sharding.shard(build(seed=5), ranks, "fp32"), ranks=ranks)
    load(trainer, one_process)
    loaded = state(trainer)
    train(trainer, BATCHES[2:])
    after_one_process = state(trainer)

    trainer = make_trainer(sharding.shard(build(), ranks, "fp32"), ranks=ranks)
    train(trainer, BATCHES[:2])
    saved = state(trainer)
    if ranks.is_main:
        torch.save(saved, f"{folder}/sharded.pt")
    ranks.barrier()
    train(trainer, BATCHES[2:])
    straight = state(trainer)
    trainer = make_trainer(sharding.shard(build(seed=5), ranks, "fp32"), ranks=ranks)
    load(trainer, checkpoint.load(f"{folder}/sharded.pt"))
    train(trainer, BATCHES[2:])

    weights_only = sharding.shard(build(seed=5), ranks, "fp32")
    sharding.load_full_state_dict(weights_only, None, one_process["state_dict"], None)
    return {
        "loaded": loaded, "after one process": after_one_process, "straight": straight, "resumed": state(trainer),
        "weights only": state(make_trainer(weights_only, ranks=ranks))["state_dict"],
    }


def _keep_ddps_numbers(ranks, folder):
    """Loss and gradients, sharded and under DDP, by precision."""
    found = {}
    for precision, dtype in {"fp32": torch.float32, "amp_bf16": torch.float32, "pure_bf16": torch.bfloat16}.items():
        found[precision] = []
        for sharded in (True, False):
            model = build(dtype=dtype)
            model.tower.shortcuts = False  # those inside of a block are not taken of a sharded one
            runnable = sharding.shard(model, ranks, precision) if sharded else DistributedDataParallel(model)
            trainer = make_trainer(model, ranks=ranks, runnable=runnable, precision=precision, norm=None)
            found[precision].append((train(trainer, BATCHES[:1]), gradients(model)))
    return found


def _start_from_rank_0(ranks, folder):
    model = sharding.shard(build(seed=ranks.rank), ranks, "fp32")
    return state(make_trainer(model, ranks=ranks))["state_dict"]


def _add_up(ranks, folder):
    """Gradients of two backward passes, the first without synchronisation, and with it."""
    found = []
    for context in (sharding.no_sync, lambda model: sharding.no_sync(build())):
        model = sharding.shard(build(), ranks, "fp32")
        first, second = (window(batch, 1, ranks)[0] for batch in BATCHES[:2])
        with context(model):
            _sum_of_squares(model, first).backward()
            whole_here = model.visual.proj.grad is None
        _sum_of_squares(model, second).backward()
        found.append((whole_here, gradients(model)))
    return found


def _sum_of_squares(model, batch):
    out = model(batch["image"], batch["text"])
    return (out["image_features"][:, :4] * out["text_features"][:, 4:8] * out["logit_scale"]).square().sum()


def _evaluate(ranks, folder):
    """Evaluates weights and averaged weights before and between steps, on rank 0 only."""
    trainer = make_trainer(sharding.shard(build(), ranks, "fp32"), ranks=ranks)
    return {"features": _train_and_encode(trainer, encode=ranks.is_main), **state(trainer)}


def _train_and_encode(trainer, encode):
    ema = Ema(trainer.model, decay=0.5)
    features = []
    for batch in BATCHES[:2]:
        for weights in (nullcontext(), ema.applied(trainer.model)):
            with weights, sharding.gathered(trainer.model) as model, evaluation_mode(model) as encoder:
                if encode:
                    found = encoder.encode_image(batch["image"]), encoder.encode_text(batch["text"])
                    features.append([f.clone() for f in found])
        train(trainer, [batch])
        ema.update(trainer.model)
    return features


def _overflow(ranks, folder):
    """Weights and loss scale before and after a step in which one gradient of rank 1's part is infinite."""
    model = sharding.shard(build(), ranks, "amp")
    trainer, scaler = make_trainer(model, ranks=ranks), torch.amp.GradScaler("cpu")
    before, scale = state(trainer)["state_dict"], scaler.get_scale()
    scaler.scale(_sum_of_squares(model, window(BATCHES[0], 1, ranks)[0])).backward()
    unscaled = {name: g / scale for name, g in gradients(model).items()}
    sharding.unscale(scaler, trainer.optimizer)
    found = gradients(model)
    if ranks.rank == 1:
        model.visual.proj.grad.to_local()[0, 0] = math.inf
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))  # sets it up
    sharding.unscale(scaler, trainer.optimizer)
    scaler.step(trainer.optimizer)
    scaler.update()
    return {
        "gradients": (found, unscaled), "scales": (scale, scaler.get_scale()),
        "weights": (before, state(trainer)["state_dict"]),
    }


class Mixing(torch.optim.SGD):
    """Adds a whole tensor to each parameter, which a part of a parameter does not allow."""

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            p += torch.zeros(p.shape, dtype=p.dtype)


class ByRow(torch.optim.SGD):
    """Keeps one number for each row of a parameter."""

    def step(self):
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p]["rows"] = torch.zeros(p.shape[:1])


def _check_optimizers(ranks, folder):
    """What is said of three optimizers, and whether the model of the first is as it was."""
    said = []
    model = sharding.shard(build(), ranks, "fp32")
    trainer = make_trainer(model, ranks=ranks)
    before = state(trainer)
    for optimizer in (trainer.optimizer, Mixing(model.parameters(), lr=1), ByRow(model.parameters(), lr=1)):
        try:
            said.append(sharding.check_optimizer(optimizer, "x"))
        except UserError as error:
            said.append(str(error))
    return {"said": said, "before": before, "after": state(trainer)}


# ---------------------------------------------------------------- and how it compares


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    trainer = make_trainer(build())
    train(trainer, BATCHES[:2])
    torch.save(state(trainer), folder / "one_process.pt")
    spawn(_two_processes, str(folder))
    return folder


@pytest.fixture(scope="module")
def both(folder):
    """What the two processes found."""
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def found(both):
    return both[0]


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_training_equals_one_process(both, case):
    kind, count = CASES[case]
    trainer = make_trainer(build(*kind), count)
    losses = train(trainer, BATCHES[:2])
    for result in both:
        assert result[case]["losses"] == pytest.approx(losses, rel=1e-10)
        assert_close(result[case]["gradients"], gradients(trainer.model))
    assert_close(both[0][case]["state_dict"], trainer.model.state_dict())
    assert_close(both[0][case]["optimizer"], trainer.optimizer.state_dict())
    assert both[1][case]["state_dict"] == both[1][case]["optimizer"] == {}  # only rank 0 gets them


def test_a_sharded_run_goes_on_sharded_bit_for_bit_and_in_one_process(found, folder):
    assert_equal(found["_start_from_rank_0"], dict(build(seed=0).state_dict()))
    assert_equal(found["_resume"]["resumed"], found["_resume"]["straight"])
    saved = checkpoint.load(folder / "sharded.pt")
    trainer = make_trainer(build(seed=5))
    assert list(saved["state_dict"]) == list(trainer.model.state_dict())
    trainer.model.load_state_dict(saved["state_dict"], strict=True)
    trainer.optimizer.load_state_dict(saved["optimizer"])
    assert_equal(state(trainer), saved)
    train(trainer, BATCHES[2:])
    assert_close(state(trainer), found["_resume"]["straight"])


def test_a_run_of_one_process_goes_on_sharded(found, folder):
    saved = checkpoint.load(folder / "one_process.pt")
    assert_equal(found["_resume"]["loaded"], saved)
    assert_equal(found["_resume"]["weights only"], saved["state_dict"])
    trainer = make_trainer(build(seed=5))
    load(trainer, saved)
    assert_equal(state(trainer), saved)
    train(trainer, BATCHES[2:])
    assert_close(found["_resume"]["after one process"], state(trainer))


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "pure_bf16"])
def test_numbers_are_those_of_ddp(found, precision):
    (losses, found_gradients), (expected_losses, expected_gradients) = found["_keep_ddps_numbers"][precision]
    assert losses == expected_losses
    assert_equal(found_gradients, expected_gradients)


def test_gradients_add_up_without_synchronisation(both):
    model = build()
    for batch in BATCHES[:2]:
        _sum_of_squares(model, batch).backward()
    expected = {name: g / 2 for name, g in gradients(model).items()}  # the mean of two processes' sums
    for result in both:
        (waits, without_sync), (does_not, with_sync) = result["_add_up"]
        assert waits and not does_not
        assert_close(without_sync, expected)
        assert_close(with_sync, expected)


def test_evaluation_on_one_process_alone_changes_nothing(found):
    trainer = make_trainer(build())
    assert_close(found["_evaluate"]["features"], _train_and_encode(trainer, encode=True))
    assert_close(found["_evaluate"]["state_dict"], dict(trainer.model.state_dict()))


def test_clipping_of_a_whole_model():
    model = build()
    _sum_of_squares(model, BATCHES[0]).backward()
    before = gradients(model)
    norm = sharding.clip_grad_norm(model.parameters(), 1e-3)
    assert_close(norm, torch.stack([g.norm() for g in before.values()]).norm())
    assert_close(gradients(model), {name: g * 1e-3 / (norm + 1e-6) for name, g in before.items()})


def test_an_overflow_on_one_process_skips_the_step_on_all(both):
    for result in both:
        assert_equal(*result["_overflow"]["gradients"])
        before, after = result["_overflow"]["scales"]
        assert after == before / 2
    assert_equal(*both[0]["_overflow"]["weights"])


def test_optimizers_that_do_not_work_on_parts_are_refused(both):
    for result in both:
        refused = "--opt x does not work on split weights; use adamw, or leave out --fsdp."
        assert result["_check_optimizers"]["said"] == [None, refused, refused]
    assert_equal(both[0]["_check_optimizers"]["after"], both[0]["_check_optimizers"]["before"])


def test_one_process_shards_nothing():
    model = build()
    assert sharding.shard(model, Ranks(CPU), "fp32") is model
    with sharding.gathered(model) as same, sharding.no_sync(model):
        assert same is model
    sharding.check_optimizer(ByRow(model.parameters(), lr=1), "x")


def test_models_that_do_not_go_with_sharding_are_refused():
    with_batch_norm, mixed = build(), build()
    with_batch_norm.visual.ln_post = nn.BatchNorm1d(32)
    mixed.visual.transformer.resblocks[0].mlp.bfloat16()
    for model, said in ((with_batch_norm, "add --use-bn-sync"), (mixed, "--precision bf16; use --precision amp_bf16")):
        with pytest.raises(UserError, match=said):
            sharding.shard(model, Ranks(CPU, 0, 0, 2), "bf16")
