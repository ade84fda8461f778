"""A worker: one engine on one device, in a process of its own or in threads of this one.

Images are written to anonymous shared memory, where the process reads them. The kernel frees it with the last of the
two processes, however they end, and a container's small ``/dev/shm`` does not limit it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from prompttune.errors import PrompttuneError
from prompttune.export.folder import EngineFolder
from prompttune.export.runtimes import Array
from prompttune.serve.workers.base import BatchResult, Key, WorkerDiedError, WorkerSettings, WorkerStats
from prompttune.serve.workers.store import Store
from prompttune.serve.workers.waiting import or_leave, to_the_end

CLOSE_S = 5.0
"""Seconds that running calls may still take when the worker is closed."""
_SIZE = struct.Struct("!i")
"""What :class:`multiprocessing.connection.Connection`, at the other end, sends before a pickled message: its bytes."""
_LOADS = -1
"""The channel of loads; a batch has that of its slot."""
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


class Worker:
    """Call every method on the event loop. Every await of one caller leaves the loop free for the others.

    Args:
        settings: settings of the worker.
        process: whether the engine gets a process of its own: the server then survives a crash of the runtime. The
            process ignores SIGINT and SIGTERM, and ends with the server, however that ends.
    """

    on_death: Callable[[], None] | None = None
    """Called once on the event loop if the process ends without :meth:`close`."""

    def __init__(self, settings: WorkerSettings, process: bool = True) -> None:
        self.settings = settings
        self._in_process = not process
        self._store: Store | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._watching: asyncio.Task[None] | None = None
        self._channels: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._turns = [asyncio.Lock() for _ in range(settings.slots + 1)]
        """One for each channel: a call has its reply before the next one is sent."""
        self._threads = ThreadPoolExecutor(settings.slots + 1, "worker")
        """They run the calls of an engine in this process."""
        self._running: set[asyncio.Future[Any]] = set()
        self._slots: Array | None = None
        self._started = self._closed = False

    @property
    def process_id(self) -> int | None:
        """Id of the worker's own process, once it runs."""
        return None if self._process is None else self._process.pid

    async def start(self) -> str:
        """Open the engine and warm it up with an empty row at batch 1 and ``max_batch``; return its description.

        Raises:
            PrompttuneError: the engine cannot be opened; the message is one line.
        """
        folder = await asyncio.to_thread(EngineFolder, self.settings.engine, verify=False)
        size = folder.manifest.image_size
        memory = os.memfd_create("prompttune-images")
        try:
            os.truncate(memory, self.settings.slots_bytes(size))
            self._slots = self.settings.slots_in(memory, size)
            if self._in_process:
                opening = asyncio.get_running_loop().run_in_executor(None, Store, self.settings, self._slots)
                self._store = await to_the_end(opening)
                return self._store.description
            await self._spawn(memory)
            description: str = await self._ask(_LOADS, self.settings, size, os.getpid())
        except BaseException:
            self.abort()
            raise
        finally:
            os.close(memory)
        self._started = True
        return description

    async def _spawn(self, memory: int) -> None:
        with contextlib.ExitStack() as theirs:
            descriptors = [memory]
            for _ in self._turns:
                here, there = socket.socketpair()
                self._channels.append(await asyncio.open_unix_connection(sock=here))
                descriptors.append(theirs.enter_context(there).fileno())
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-c", _PROGRAM, *map(str, descriptors)),
                stdin=asyncio.subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
                pass_fds=descriptors,
                start_new_session=True,
            )
        self._watching = asyncio.create_task(self._watch(self._process))

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        await process.wait()
        if self._started and not self._closed and self.on_death is not None:
            self.on_death()

    async def _gone(self) -> None:
        """Wait until the process, if there is one, has ended. Cancelling a caller does not end the watch."""
        if self._watching is not None:
            await asyncio.wait([self._watching])

    def images(self, slot: int) -> Array:
        """float32 [max_batch, 3, S, S]; write a batch's images to its first rows before :meth:`run`."""
        assert self._slots is not None, "the worker has not started"
        images: Array = self._slots[slot]
        return images

    async def run(self, slot: int, keys: Sequence[Sequence[Key]]) -> BatchResult:
        """Answer the first images of a slot, each for its keys; the slot is free again after the return.

        Cancelling the caller does not stop its batch: the slot stays in use until the batch ends, and the caller waits
        for that.

        Raises:
            WorkerDiedError: the worker ended.
            PrompttuneError: a key does not hold a row, or the runtime failed.
        """
        result: BatchResult = await to_the_end(self._ask(slot, "run", (slot, keys)))
        return result

    async def load(self, key: Key, folder: Path) -> None:
        """Load a state into a row, from the host's memory or else from ``folder``, while batches continue.

        Raises:
            VersionGoneError: ``folder`` holds another version or does not exist.
            PrompttuneError: the state is damaged or does not fit the engine, or all rows are in use.
            WorkerDiedError: the worker ended.
        """
        await or_leave(self._ask(_LOADS, "load", (key, folder)))

    async def evict(self, key: Key, keep: bool = True) -> None:
        """Free a row; running batches keep what they read. With ``keep``, the state stays in the host's memory."""
        await or_leave(self._ask(_LOADS, "evict", (key, keep)))

    async def stats(self) -> WorkerStats:
        """Fetch the worker's contents."""
        stats: WorkerStats = await or_leave(self._ask(_LOADS, "stats", ()))
        return stats

    def _ask(self, channel: int, *message: Any) -> asyncio.Future[Any]:
        if self._closed:
            raise WorkerDiedError("the engine worker is closed")
        asked = asyncio.ensure_future(self._replied(channel, message))
        self._running.add(asked)
        asked.add_done_callback(self._running.discard)
        return asked

    async def _replied(self, channel: int, message: tuple[Any, ...]) -> Any:
        async with self._turns[channel]:
            if self._store is not None:
                name, arguments = message
                call = partial(getattr(self._store, name), *arguments)
                return await asyncio.get_running_loop().run_in_executor(self._threads, call)
            reader, writer = self._channels[channel]
            try:
                sent = pickle.dumps(message)
                writer.write(_SIZE.pack(len(sent)) + sent)
                (size,) = _SIZE.unpack(await reader.readexactly(_SIZE.size))
                reply = pickle.loads(await reader.readexactly(size))
            except (EOFError, OSError):
                self.abort()
                await self._gone()  # the death is known before a caller tries again
                raise WorkerDiedError(
                    "the engine worker ended before it answered: it crashed, was killed or ran out of memory"
                ) from None
        if isinstance(reply, PrompttuneError):
            raise reply
        return reply

    def abort(self) -> None:
        """End a hanging process at once; waiting calls get :class:`WorkerDiedError`."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def close(self) -> None:
        """End the worker after its running calls; those of a process get :class:`WorkerDiedError` after five seconds.

        Further calls have no effect.
        """
        self._closed = True
        if self._running:
            _, late = await asyncio.wait(self._running, timeout=None if self._watching is None else CLOSE_S)
            if late:
                _LOG.warning("the engine worker's batch takes longer than %d s: it is ended now", CLOSE_S)
        self.abort()
        await self._gone()
        await to_the_end(asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown))
        for _, writer in self._channels:
            writer.close()
