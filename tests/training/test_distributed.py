"""How processes of a group end."""
import atexit
import time
from pathlib import Path

import torch
import torch.distributed as dist

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
