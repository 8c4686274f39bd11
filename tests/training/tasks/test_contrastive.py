"""What the contrastive task says before a run. Its numbers are tested with the trainer."""
import pytest
import torch

from training.distributed import Ranks
from training.errors import UserError
from training.evaluation.suite import Suite
from training.tasks.contrastive import ContrastiveTask

from ..tiny import run_options, tiny_clip


def task(world_size=1, val_data=None, **changes):
    options = run_options(train_data="x.tar", **changes)
    place = Ranks(torch.device("cpu"), world_size=world_size)
    suite = Suite(options, place, None, None, val_data, {})
    return ContrastiveTask(options, place, tiny_clip(), suite)


def test_settings_that_cannot_teach_are_refused_or_told(caplog):
    with pytest.raises(UserError, match="A step of one pair has no contrast, so it teaches nothing: raise"):
        task(batch_size=1)
    for enough in ({"accum_freq": 2}, {"world_size": 2}):
        task(batch_size=1, **enough)
    assert not caplog.messages
    task(batch_size=1, accum_freq=2, val_data=[])
    assert "clip_val_loss is that of batches of --batch-size 1" in caplog.text
    task(gather_with_grad=False)
    with pytest.raises(UserError, match="--no-gather-with-grad loses a part of the gradient: add --no-local-loss"):
        task(world_size=2, gather_with_grad=False)
    task(world_size=2, gather_with_grad=False, local_loss=False)
