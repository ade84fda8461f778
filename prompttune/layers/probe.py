"""Intermediate results of the one forward, by name, for whoever looks for the place where two sides part."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor

_recorded: ContextVar[dict[str, Tensor] | None] = ContextVar("recorded", default=None)


def probe(name: str, tensor: Tensor) -> None:
    """Keep an intermediate result if someone is recording; otherwise do nothing."""
    recorded = _recorded.get()
    if recorded is not None:
        recorded[name] = tensor


@contextlib.contextmanager
def recording() -> Iterator[dict[str, Tensor]]:
    """Give a dict that fills with the forward's intermediate results, in the order of the computation."""
    recorded: dict[str, Tensor] = {}
    token = _recorded.set(recorded)
    try:
        yield recorded
    finally:
        _recorded.reset(token)
