"""Detection of lost nodes, and of work that cannot be placed on other nodes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from prompttune.serve.infer.cluster.connection import alive_nodes
from prompttune.serve.infer.cluster.feed import FeedHandle
from prompttune.serve.infer.cluster.settings import Booking

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Seconds between two checks of the nodes."""
STALLED_S = 30.0
"""Seconds without an answer after a node was lost; work that takes longer counts as stuck."""


class Watch:
    """Ends an execution that is stuck because of a lost node, if other nodes have room for a new one.

    Args:
        feed: the execution's feed.
        execution: number of the execution.
        booking: resources of an engine.
        answered: returns the number of answered chunks.
    """

    def __init__(self, feed: FeedHandle, execution: int, booking: Booking, answered: Callable[[], int]) -> None:
        self._feed = feed
        self._execution = execution
        self._booking = booking
        self._answered = answered
        self._nodes = alive_nodes()
        self._ended = threading.Event()
        self.broken_off = False
        """Whether the execution was ended."""
        self._thread = threading.Thread(target=self._look, name="infer-ray-nodes", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        seen, since, told = self._answered(), time.monotonic(), False
        while not self._ended.wait(LOOK_S):
            nodes = alive_nodes()
            if self._nodes.keys() <= nodes.keys() or self._answered() != seen:
                seen, since = self._answered(), time.monotonic()
            elif time.monotonic() - since > STALLED_S:
                if self._booking.room(nodes.values()):
                    self.broken_off = True
                    self._feed.begin.remote(self._execution + 1)
                    return
                if not told:
                    log.warning("a node was lost, and no other node has room for an engine: waiting for a node")
                    told = True
