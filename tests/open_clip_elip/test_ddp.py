"""DistributedDataParallel: no parameter goes unused, and the ranks agree."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from open_clip_elip import with_token_reduction

from .tiny import contrastive_loss, gradients, pairs, plain_model

STEPS = 3
CASES = [(False, False), (False, True), (True, False), (True, True)]  # (CustomTextCLIP, checkpointing)


def worker(rank: int, rendezvous: str, result: str) -> None:
    """One of two processes. Rank 0 writes, a model at a time, the gradients as averaged and as they should be."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    outcome = [gradients_of_last_step(rank, *case) for case in CASES]
    if rank == 0:
        torch.save(outcome, result)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def gradients_of_last_step(rank, custom_text, checkpointing):
    torch.manual_seed(0)
    model = with_token_reduction(plain_model(custom_text), depths=(1, 1, 1, 1), keep_ratio=(1.0, 0.8, 0.5, 0.3))
    model.set_grad_checkpointing(checkpointing)
    ddp = DistributedDataParallel(model)
    torch.manual_seed(1)
    batches = [pairs(2) for _ in range(2 * STEPS)]
    for step in range(STEPS):  # an unused parameter would raise at the start of the second step
        ddp.zero_grad()
        contrastive_loss(ddp(*batches[2 * step + rank])).backward()
    averaged = gradients(model)
    model.zero_grad()
    for image, text in batches[-2:]:
        (contrastive_loss(model(image, text)) / 2).backward()
    return averaged, gradients(model)


def test_two_processes_without_unused_parameters(tmp_path):
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    files = [str(tmp_path / "rendezvous"), str(tmp_path / "gradients.pt")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(rank), *files], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    outcome = torch.load(tmp_path / "gradients.pt")
    assert len(outcome) == len(CASES)
    for averaged, expected in outcome:
        torch.testing.assert_close(averaged, expected, rtol=1e-9, atol=1e-11)


if __name__ == "__main__":
    worker(int(sys.argv[1]), *sys.argv[2:])
