"""The worker process: opens an engine and serves one server until the server ends.

There is a channel for each batch slot and one for loads, each with a thread, so that neither waits for another.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from prompttune.errors import EngineError, PrompttuneError, UsageError, first_line
from prompttune.serve.bank import BankFullError
from prompttune.serve.workers.base import VersionGoneError
from prompttune.serve.workers.store import Store

_LOG = logging.getLogger(__name__)
_LOOK_S = 1.0
"""Seconds between checks that the server is alive, in case another process holds its end of the channels."""


def main() -> NoReturn:
    """Serve. The arguments are descriptors: the shared memory, a channel for each slot, the channel of loads."""
    memory, *channels = map(int, sys.argv[1:])
    *batches, loads = [Connection(one) for one in channels]
    settings, image_size, server = loads.recv()
    _in_thread(_leave_with, server)
    try:
        store = Store(settings, settings.slots_in(memory, image_size))
    except Exception as problem:
        loads.send(portable(problem))
        os._exit(1)
    loads.send(store.description)
    for channel in batches:
        _in_thread(_serve, channel, store)
    _serve(loads, store)


def _in_thread(target: Any, *arguments: Any) -> None:
    threading.Thread(target=target, args=arguments, daemon=True).start()


def _leave_with(server: int) -> NoReturn:
    while os.getppid() == server:
        time.sleep(_LOOK_S)
    os._exit(1)


def _serve(channel: Connection, store: Store) -> NoReturn:
    """Answer until the server is gone; then end at once, whatever is running: another thread may use the runtime."""
    try:
        while True:
            call, arguments = channel.recv()
            try:
                reply = getattr(store, call)(*arguments)
            except Exception as problem:
                reply = portable(problem)
            channel.send(reply)
    except (EOFError, OSError):
        os._exit(1)


def portable(problem: Exception) -> PrompttuneError:
    """An error that survives the way to the server; an unexpected one keeps its type in the text."""
    if not isinstance(problem, PrompttuneError):
        _LOG.error("the engine worker failed", exc_info=problem)
        return EngineError(f"the engine worker failed: {type(problem).__name__}: {first_line(problem)}")
    plain = (BankFullError, VersionGoneError, UsageError, EngineError, PrompttuneError)
    return next(one for one in plain if isinstance(problem, one))(str(problem))
