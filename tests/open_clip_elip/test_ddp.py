"""DistributedDataParallel: no parameter goes unused, and the ranks agree."""

import torch
from torch.nn.parallel import DistributedDataParallel

from open_clip_elip import with_token_reduction

from ..processes import spawn
from .tiny import contrastive_loss, gradients, pairs, plain_model

STEPS = 3
CASES = [(False, False), (False, True), (True, False), (True, True)]  # (CustomTextCLIP, checkpointing)


def worker(rank: int, result: str) -> None:
    """One of two processes. Rank 0 writes, a model at a time, the gradients as averaged and as they should be."""
    outcome = [gradients_of_last_step(rank, *case) for case in CASES]
    if rank == 0:
        torch.save(outcome, result)


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
    spawn(worker, str(tmp_path / "gradients.pt"))
    outcome = torch.load(tmp_path / "gradients.pt")
    assert len(outcome) == len(CASES)
    for averaged, expected in outcome:
        torch.testing.assert_close(averaged, expected, rtol=1e-9, atol=1e-11)
