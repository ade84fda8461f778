"""Random numbers that depend only on their purpose, not on what ran before."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A seed below 2⁶³ from numbers and words; different parts give independent seeds."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_generators(seed: int) -> None:
    """Seed the global generators of ``random``, NumPy and torch's CPU; those of other devices are unchanged."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would seed the GPUs too
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the global generators of ``random``, NumPy and torch's CPU when the block ends."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.default_generator.set_state(cpu)
