"""What every test starts from: the same random numbers and one thread. And what tests of several parts need."""
import sys
from dataclasses import dataclass

import pytest
import torch

from open_clip_elip.adapters import KINDS
from open_clip_elip.reduction import METHODS, Layer, ReductionConfig, TokenReduction, register
from open_clip_elip.reduction.base import run_plainly


def pytest_collection_finish():
    if processes := sys.modules.get("tests.processes"):
        processes.prepare()


@pytest.fixture(autouse=True)
def _repeatable():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny: more threads only get in each other's way
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    """Of adapters."""
    if request.param == "lora":
        pytest.importorskip("peft")
    return request.param


@pytest.fixture
def half():
    """A method of token reduction: one class and one registration."""

    @register("half")
    class Half(TokenReduction):
        """Keeps the first patches, by a share."""

        @dataclass(frozen=True)
        class Config(ReductionConfig):
            share: float = 0.5

        suffix = "-Half"

        def forward(self, blocks, x, guidance=None, *, run=run_plainly, only_cls=False):
            x = x[:, : self.layers(x.shape[1] - 1)[0].attention]
            for block in blocks:
                x = run(block, x)
            return x

        def layers(self, num_patches):
            tokens = 1 + int(self.config.share * num_patches)
            return [Layer(tokens, tokens)] * self.num_layers

    yield Half
    del METHODS["half"]
