"""A worker in its own process: the server survives a crash of the runtime and anything else that ends the process.

Images are written to anonymous shared memory, where the process reads them. The kernel frees it with the last of the
two processes, however they end, and a container's small ``/dev/shm`` does not limit it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from prompttune.export.folder import EngineFolder
from prompttune.export.runtimes import Array
from prompttune.serve.workers.base import Answer, Key, Worker, WorkerDiedError, WorkerSettings, WorkerStats
from prompttune.serve.workers.messages import Message, failed, pack, pack_settings, slots_of, slots_size, unpack
from prompttune.serve.workers.waiting import to_the_end

CLOSE_S = 5.0
"""Seconds that running batches may still take when the worker is closed."""
_POLL_S = 0.005
_DIED = "the engine worker ended before it answered: it crashed, was killed or ran out of memory"
_LOG = logging.getLogger(__name__)

# On a drain, a terminal or a supervisor signals the whole group, but the server still needs the worker. Signals are
# therefore ignored before the imports, which take seconds.
_PROGRAM = f"""
import signal
for one in ({signal.SIGINT:d}, {signal.SIGTERM:d}):
    signal.signal(one, signal.SIG_IGN)
from prompttune.serve.workers.main import main
main()
"""

Reply = tuple[Message, bytearray]


class Channel(asyncio.Protocol):
    """Calls to the process; the replies arrive in the order of the calls.

    Args:
        on_lost: called when the other side is gone and every waiting call has got :class:`WorkerDiedError`.
    """

    def __init__(self, on_lost: Callable[[], None]) -> None:
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._pending: deque[asyncio.Future[Reply]] = deque()
        self._refusal = "the engine worker has not started"
        self.open = False
        """Whether calls are accepted."""

    async def connect(self) -> socket.socket:
        """Open the channel; return the other end."""
        here, there = socket.socketpair()
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=here)
        return there

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See :meth:`asyncio.Protocol.connection_made`."""
        self._transport, self.open = cast(asyncio.Transport, transport), True

    def data_received(self, data: bytes) -> None:
        """See :meth:`asyncio.Protocol.data_received`."""
        self._received += data
        while (reply := unpack(self._received)) is not None:
            call = self._pending.popleft()
            if not call.done():  # a caller that left has cancelled its call
                call.set_result(reply)

    def connection_lost(self, problem: Exception | None) -> None:  # noqa: ARG002
        """See :meth:`asyncio.Protocol.connection_lost`."""
        self.refuse(_DIED)
        for call in self._pending:
            if not call.done():
                call.set_exception(WorkerDiedError(self._refusal))
        self._pending.clear()
        self._transport = None
        self._on_lost()

    def call(self, message: Message) -> asyncio.Future[Reply]:
        """Send a message; the future holds its reply.

        Raises:
            WorkerDiedError: the process has ended or was asked to end.
        """
        if not self.open or self._transport is None:
            raise WorkerDiedError(self._refusal)
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._pending.append(reply)
        self._transport.write(pack(message))
        return reply

    def refuse(self, why: str) -> None:
        """Refuse new calls; earlier ones are still answered."""
        if self.open:
            self._refusal, self.open = why, False

    def finish(self) -> None:
        """Tell the process that no more calls will come."""
        if self._transport is not None:
            with contextlib.suppress(OSError):  # the process may just have ended
                self._transport.write_eof()

    def abort(self) -> None:
        """Close without waiting for replies."""
        if self._transport is not None:
            self._transport.abort()

    @property
    def lost(self) -> bool:
        """Whether the other side is gone."""
        return self._transport is None


class ProcessWorker(Worker):
    """See :class:`Worker`. The process ignores SIGINT and SIGTERM, and ends with the server, however that ends."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self._batches = Channel(self._on_lost)
        self._loads = Channel(self._on_lost)
        self._process: subprocess.Popen[bytes] | None = None
        self._collecting: asyncio.Task[None] | None = None
        self._slots: Array | None = None
        self._description = ""
        self._started = self._closed = False

    async def start(self) -> str:
        """See :meth:`Worker.start`."""
        folder = await asyncio.to_thread(EngineFolder, self.settings.engine, verify=False)
        size = folder.manifest.image_size
        try:
            await self._spawn(size)
            opening = {"settings": pack_settings(self.settings), "image_size": size, "server": os.getpid()}
            self._description = (await _answer(self._batches, opening))[0]["description"]
        except BaseException:
            self._end()
            raise
        self._started = True
        return self._description

    async def _spawn(self, image_size: int) -> None:
        with contextlib.ExitStack() as theirs:
            memory = os.memfd_create("prompttune-images")
            theirs.callback(os.close, memory)
            os.truncate(memory, slots_size(self.settings, image_size))
            self._slots = slots_of(mmap.mmap(memory, 0), self.settings, image_size)
            ends = [theirs.enter_context(await channel.connect()) for channel in (self._batches, self._loads)]
            descriptors = [*(end.fileno() for end in ends), memory]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, *map(str, descriptors)],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
                pass_fds=descriptors,
                start_new_session=True,
            )

    def images(self, slot: int) -> Array:
        """See :meth:`Worker.images`."""
        assert self._slots is not None, "the worker has not started"
        images: Array = self._slots[slot]
        return images

    async def run(self, slot: int, keys: Sequence[Key]) -> Answer:
        """See :meth:`Worker.run`."""
        about, logits = await to_the_end(self._batches.call({"slot": slot, "keys": keys}))
        if (problem := failed(about)) is not None:
            raise problem
        return Answer(np.frombuffer(logits, np.float32).reshape(about["shape"]), about["seconds"])

    async def load(self, key: Key, folder: Path) -> None:
        """See :meth:`Worker.load`."""
        await _answer(self._loads, {"call": "load", **key._asdict(), "folder": str(folder)})

    async def evict(self, key: Key, keep: bool = True) -> None:
        """See :meth:`Worker.evict`."""
        await _answer(self._loads, {"call": "evict", **key._asdict(), "keep": keep})

    async def stats(self) -> WorkerStats:
        """See :meth:`Worker.stats`."""
        return WorkerStats(**(await _answer(self._loads, {"call": "stats"}))[0])

    def _on_lost(self) -> None:
        """A channel has ended: end the process, and the other channel once its remaining replies are read."""
        if self._process is not None:
            self._process.kill()
        if not self._lost:
            return
        self._collecting = asyncio.get_running_loop().create_task(self._gone())
        if self._started and not self._closed and self.on_death is not None:
            self.on_death()

    @property
    def _lost(self) -> bool:
        return self._batches.lost and self._loads.lost

    def _end(self) -> None:
        """End the process at once, whatever is running."""
        if self._process is not None:
            self._process.kill()
        for channel in (self._batches, self._loads):
            channel.abort()

    def abort(self) -> None:
        """See :meth:`Worker.abort`."""
        if self._process is not None:
            self._process.kill()  # the channels then end and report it

    async def close(self) -> None:
        """See :meth:`Worker.close`; batches that take more than five seconds get :class:`WorkerDiedError`."""
        self._closed = True
        for channel in (self._batches, self._loads):
            channel.refuse("the engine worker is closed")
        try:
            if self._started:
                self._batches.finish()
                async with asyncio.timeout(CLOSE_S):
                    await self._gone()
        except TimeoutError:
            _LOG.warning("the engine worker's batch takes longer than %d s: it is ended now", CLOSE_S)
        finally:
            self._end()
        await self._gone()

    async def _gone(self) -> None:
        """Wait until the process's last replies are read and the process is reaped."""
        while not self._lost or (self._process is not None and self._process.poll() is None):
            await asyncio.sleep(_POLL_S)

    @property
    def details(self) -> Mapping[str, Any]:
        """See :meth:`Worker.details`."""
        return {
            "device": self.settings.runtime.device,
            "process": None if self._process is None else self._process.pid,
            "runtime": self._description,
        }


async def _answer(channel: Channel, message: Message) -> Reply:
    """Send a call and wait for the reply; raise the error that it holds."""
    reply = await channel.call(message)
    if (problem := failed(reply[0])) is not None:
        raise problem
    return reply
