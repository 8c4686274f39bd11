"""Seeds that depend on nothing but what they are made from."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed, the same in every process (`hash` is salted for strings) and on every Python."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_globals(seed: int) -> None:
    """Seed the generators that image transforms draw from: `random`, numpy and torch on the CPU."""
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch CUDA as well


@contextmanager
def private_randomness() -> Iterator[None]:
    """Leave the global generators as they were found: without workers they are the trainer's own."""
    saved = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(saved[0])
        numpy.random.set_state(saved[1])
        torch.set_rng_state(saved[2])
