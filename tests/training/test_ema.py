"""The weight average against torch's own, in checkpoints, in evaluation and over two processes."""
from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training.ema import Ema

from ..processes import spawn
from .runs import assert_equal_weights


def build(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).to(dtype)


def train_one_step(model: nn.Module, seed: int) -> None:
    """Changes all parameters and buffers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value += torch.randn(value.shape, generator=generator).to(value.dtype)
            else:
                value += 1


def copies(model: nn.Module) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch(dtype):
    model = build(dtype)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    ours = Ema(model, 0.9)
    for seed in range(5):
        train_one_step(model, seed)
        theirs.update_parameters(model)
        ours.update(model)
    weights, expected = ours.state_dict(), theirs.module.state_dict()
    counter = "1.num_batches_tracked"  # torch averages it; ours is the model's
    assert weights.pop(counter) == model[1].num_batches_tracked == 5
    expected.pop(counter)
    assert_equal_weights(weights, expected)


def test_half_precision_is_averaged_in_float32():
    model = build(torch.bfloat16)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    ema = Ema(model, 0.999)
    ema.update(model)
    with torch.no_grad():
        model[0].weight.fill_(2.0)
    ema.update(model)  # 1.001 is 1 in bfloat16
    assert ema.state_dict()["0.weight"].dtype == torch.float32
    torch.testing.assert_close(ema.state_dict()["0.weight"], torch.full((6, 4), 1.001), rtol=1e-6, atol=0)
    with ema.applied(model):
        assert model[0].weight.dtype == torch.bfloat16
        assert torch.equal(model[0].weight, torch.ones(6, 4, dtype=torch.bfloat16))


def test_applied_swaps_and_restores_bit_for_bit():
    model = build()
    ema = Ema(model, 0.9)
    for seed in range(3):
        train_one_step(model, seed)
        ema.update(model)
    own, pointers = copies(model), [p.data_ptr() for p in model.parameters()]
    average = {name: value.clone() for name, value in ema.state_dict().items()}
    assert not torch.equal(own["0.weight"], average["0.weight"])
    with ema.applied(model) as same:
        assert same is model
        assert_equal_weights(copies(model), average)
        train_one_step(model, 9)  # whatever happens inside is gone afterwards
    assert_equal_weights(copies(model), own)
    assert_equal_weights(ema.state_dict(), average)
    assert [p.data_ptr() for p in model.parameters()] == pointers

    with pytest.raises(KeyError), ema.applied(model):
        raise KeyError
    assert_equal_weights(copies(model), own)


def test_sharded_model_has_the_same_average():
    spawn(sharded)


def sharded(rank: int) -> None:
    whole, model = (nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)) for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():
        for p, q in zip(whole.parameters(), model.parameters(), strict=True):
            p.copy_(torch.randn(p.shape))
            q.copy_(p)
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    emas = [Ema(m, 0.9) for m in (whole, model)]
    for step in range(3):
        with torch.no_grad():
            for m in (whole, model):
                for p in m.parameters():
                    p.mul_(step + 2)
        for ema, m in zip(emas, (whole, model), strict=True):
            ema.update(m)
    average = emas[0].state_dict()
    assert_equal_weights(emas[1].state_dict(), average)
    assert emas[1].weights["0.weight"].to_local().shape == (3, 4)  # kept in parts

    x = torch.ones(2, 4)
    own = model(x).detach()
    with emas[0].applied(whole), emas[1].applied(model):
        torch.testing.assert_close(model(x), whole(x))
    assert torch.equal(model(x), own)

    again = Ema(model, 0.9)
    again.load_state_dict(average, 3)
    assert_equal_weights(again.state_dict(), average)
