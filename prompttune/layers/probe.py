"""Named intermediate results of the forward, for finding the place where two computations start to differ."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from torch import Tensor

_recorded: ContextVar[dict[str, Tensor] | None] = ContextVar("recorded", default=None)

AttentionWatcher = Callable[[Tensor, Tensor, Tensor | None], None]
"""Function of the queries, keys and mask of one attention, as in :func:`prompttune.layers.attention.attend`."""
_watcher: ContextVar[AttentionWatcher | None] = ContextVar("watcher", default=None)


def probe(name: str, tensor: Tensor) -> None:
    """Keep an intermediate result while a recording runs; otherwise do nothing."""
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


def probe_attention(q: Tensor, k: Tensor, mask: Tensor | None) -> None:
    """Pass queries, keys and mask of an attention to the watcher, if there is one."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(q, k, mask)


@contextlib.contextmanager
def watching_attention(watcher: AttentionWatcher) -> Iterator[None]:
    """Call ``watcher`` at every attention in the block, in the order of the computation."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)
