"""How processes of a group agree on what is wrong, and how they end."""
import atexit
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from training.data.sets.captioned import NoSuchSplit
from training.data.sets.registry import NotThere
from training.distributed import Ranks
from training.errors import UserError
from training.evaluation.passes import NotFinite

from ..processes import spawn

kept = []


def test_a_thread_of_gloo_that_is_still_busy_does_not_abort_the_process(tmp_path):
    spawn(leave_a_busy_thread, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def leave_a_busy_thread(rank: int, folder: str) -> None:
    """It takes Python's lock again and again, as to let go of a tensor, until after the end of `leave`."""
    kept.append(dist.group.WORLD)  # as DDP and FSDP do, so that nobody waits for the thread
    atexit.register(Path(folder, str(rank)).touch)
    time.sleep(rank)  # the callback is there before the work is done
    work = dist.all_reduce(torch.ones(1), async_op=True)
    work.get_future().then(lambda _: [time.sleep(0.001) for _ in range(3_000)])
    time.sleep(1.5 - rank)


ERRORS = [UserError("a"), NotFinite("b"), NotThere("c"), NoSuchSplit("d", ["test"])]


def test_what_one_process_finds_wrong_all_raise_as_it_is():
    agree_on_errors(0, 1)
    spawn(agree_on_errors, 2)


def agree_on_errors(rank: int, world_size: int) -> None:
    ranks = Ranks(torch.device("cpu"), rank, rank, world_size)
    for expected in ERRORS:
        with pytest.raises(UserError) as found, ranks.agree():
            if rank == world_size - 1:
                raise expected
        assert type(found.value) is type(expected) and str(found.value) == str(expected)
        assert vars(found.value) == vars(expected)


def test_gathered_rows_send_their_gradients_back():
    spawn(gather_with_gradient)


def gather_with_gradient(rank):
    ranks = Ranks(torch.device("cpu"), rank=rank, world_size=2)
    rows = torch.arange(6.0).view(2, 3) + 10 * rank
    rows.requires_grad_()
    gathered = ranks.gather_with_gradient(rows)
    assert gathered[:, 0].tolist() == [0, 3, 10, 13]
    (gathered * torch.arange(1.0, 5)[:, None] * (rank + 1)).sum().backward()
    assert rows.grad[:, 0].tolist() == [3 * (2 * rank + 1), 3 * (2 * rank + 2)]
