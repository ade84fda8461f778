"""The worker process: opens an engine and serves one server through two channels until the server ends.

The main thread runs batches, with more threads where the runtime takes several calls at once. Another one loads and
evicts. Batches and loads have a channel each, so neither waits for the other.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import os
import select
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from prompttune.errors import PrompttuneError
from prompttune.export.runtimes import Array
from prompttune.serve.workers.base import Key, WorkerSettings
from prompttune.serve.workers.messages import Message, failure, pack, receive, slots_of, unpack_settings
from prompttune.serve.workers.store import Store, open_store

_LOG = logging.getLogger(__name__)
_LOOK_MS = 1000
"""Milliseconds between checks that the server is alive, in case another process holds its end of the channels."""


def main() -> NoReturn:
    """Serve. The arguments are descriptors: the channel of batches, the channel of loads, the shared memory."""
    batches, loads = (socket.socket(fileno=int(one)) for one in sys.argv[1:3])
    opening = receive(batches)
    if opening is None:
        _leave(1)
    store: Future[Store] = Future()
    threading.Thread(target=_serve_loads, args=(loads, store, opening["server"]), daemon=True).start()
    try:
        settings = unpack_settings(opening["settings"])
        images = slots_of(mmap.mmap(int(sys.argv[3]), 0), settings, opening["image_size"])
        store.set_result(_open(settings))
    except Exception as problem:
        batches.sendall(_refusal(problem))
        _leave(1)
    batches.sendall(pack({"description": store.result().description}))
    _serve_batches(batches, store.result(), images)
    _leave(0)


def _open(settings: WorkerSettings) -> Store:
    store = open_store(settings)
    store.warm_up()
    return store


def _serve_batches(channel: socket.socket, store: Store, slots: Array) -> None:
    """Answer in the order of the calls until the server closes the channel; batches sent before are still answered."""
    receiving, sending = threading.Lock(), threading.Condition()
    received, sent = itertools.count(), 0

    def serve() -> None:
        nonlocal sent
        while True:
            with receiving:
                message, number = receive(channel), next(received)
            if message is None:
                return
            reply = _run(store, slots, message)
            with sending:
                while sent != number:
                    sending.wait()
                channel.sendall(reply)
                sent += 1
                sending.notify_all()

    others = [threading.Thread(target=serve, daemon=True) for _ in range(store.calls_at_once - 1)]
    for thread in others:
        thread.start()
    serve()
    for thread in others:
        thread.join()


def _run(store: Store, slots: Array, call: Message) -> bytes:
    """The reply to a batch."""
    keys = [Key(task, version) for task, version in call["keys"]]
    try:
        answer = store.run(slots[call["slot"], : len(keys)], keys)
    except Exception as problem:
        return _refusal(problem)
    about = {"shape": answer.logits.shape, "seconds": answer.seconds}
    return pack(about, answer.logits.astype("float32", copy=False).tobytes())


def _load(store: Store, call: Message) -> Message:
    store.load(Key(call["task"], call["version"]), Path(call["folder"]))
    return {}


def _evict(store: Store, call: Message) -> Message:
    store.evict(Key(call["task"], call["version"]), call["keep"])
    return {}


def _stats(store: Store, call: Message) -> Message:  # noqa: ARG001
    return asdict(store.stats())


_CALLS: dict[str, Callable[[Store, Message], Message]] = {"load": _load, "evict": _evict, "stats": _stats}


def _serve_loads(channel: socket.socket, store: Future[Store], server: int) -> NoReturn:
    """Answer from the start until the server is gone; then end at once, whatever is running."""
    try:
        while (message := _receive_from(channel, server)) is not None:
            try:
                reply = pack(_CALLS[message["call"]](store.result(), message))
            except Exception as problem:
                reply = _refusal(problem)
            channel.sendall(reply)
    finally:
        _leave(1)


def _receive_from(channel: socket.socket, server: int) -> Message | None:
    """The next message of the server; None if the server's process is gone."""
    readable = select.poll()
    readable.register(channel, select.POLLIN)
    while not readable.poll(_LOOK_MS):
        if os.getppid() != server:
            return None
    return receive(channel)


def _refusal(problem: Exception) -> bytes:
    if not isinstance(problem, PrompttuneError):
        _LOG.error("the engine worker failed", exc_info=problem)
    return pack(failure(problem))


def _leave(status: int) -> NoReturn:
    """Exit without destroying a runtime that another thread may be using."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
