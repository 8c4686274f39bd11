"""What every test starts from: the same random numbers and one thread."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny: more threads only get in each other's way
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
