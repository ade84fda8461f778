"""Stages that run on the workers: numbers of parcels, their images, their answers."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.exceptions import RayError

from prompttune.errors import EngineError, PrompttuneError, first_line
from prompttune.export.folder import EngineFolder
from prompttune.serve.decode_threads import hold_to_one_thread
from prompttune.serve.engine import Engine
from prompttune.serve.infer.answering import Buffers, answers_of, assemble, score
from prompttune.serve.infer.cluster.feed import ATTEMPTS, FeedHandle
from prompttune.serve.infer.decoding import Decoded, decode
from prompttune.serve.infer.items import Item
from prompttune.serve.infer.rows import InputAnswer
from prompttune.serve.infer.work import Work, facts_of

NUMBER, CONTENT = "number", "content"
"""Columns of a block: number of a parcel, and its pickled content so far."""

Parcel = Sequence[Sequence[Item]]
"""Several chunks that are sent together: Ray Data needs a tenth of a second from one task to the next."""


@dataclass(frozen=True)
class Failure:
    """The error of a stage, so that the driver can report it without Ray's traceback."""

    message: str


def wrapped(number: int, content: object) -> pa.Table:
    """A row of a Dataset."""
    data = pickle.dumps(content, pickle.HIGHEST_PROTOCOL)
    return pa.table({NUMBER: [number], CONTENT: pa.array([data], pa.large_binary())})


def unwrapped(table: pa.Table) -> Iterator[tuple[int, Any]]:
    """The inverse of :func:`wrapped`, for any number of rows."""
    for number, content in zip(table[NUMBER], table[CONTENT], strict=True):
        yield number.as_py(), pickle.loads(content.as_buffer())


class Numbers(Datasource):  # type: ignore[misc]
    """The numbers of a feed's parcels as they arrive, one per block, without an end."""

    def __init__(self, feed: FeedHandle, first: int, execution: int) -> None:
        super().__init__()
        self._read = partial(_numbers, feed, first, execution)

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown."""
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        """One read task, which waits most of the time."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(self._read, unknown)]


def _numbers(feed: FeedHandle, first: int, execution: int) -> Iterator[pa.Table]:
    for number in itertools.count(first):
        ray.get(feed.expect.remote(number, execution))
        yield pa.table({NUMBER: [number]})


def decode_parcels(table: pa.Table, feed: FeedHandle, work: Work, folder: Path) -> pa.Table:
    """Decode the images of parcels.

    Args:
        table: numbers of the parcels.
        feed: the feed that holds them.
        work: settings of the job.
        folder: the driver's working folder, which relative paths start from.
    """
    with contextlib.suppress(OSError):  # without the folder, rows report relative paths as missing
        os.chdir(folder)
    hold_to_one_thread()  # the same as in a local run's decoding threads
    return pa.concat_tables([_decoded(number, feed, work) for number in table[NUMBER].to_pylist()])


def _decoded(number: int, feed: FeedHandle, work: Work) -> pa.Table:
    parcel: Parcel = pickle.loads(ray.get(feed.take.remote(number)) or pickle.dumps([]))
    if not ray.get(feed.attempt.remote("decoding", number)):
        return wrapped(number, _hopeless(parcel[0][0].source, "decode"))
    return wrapped(number, [[decode(item, work) for item in chunk] for chunk in parcel])


def _hopeless(source: str, what: str) -> Failure:
    return Failure(f"{ATTEMPTS} processes or nodes were lost trying to {what} {source} and the inputs after it")


class Answering:
    """An engine in its own process.

    Args:
        feed: counts the attempts.
        execution: number of the execution that the engine belongs to.
        work: settings of the job.

    Raises:
        BrokenOffError: the execution is over. Ray would restart a lost engine, which would keep its place.
    """

    def __init__(self, feed: FeedHandle, execution: int, work: Work) -> None:
        ray.get(feed.join.remote(execution))
        threading.Thread(target=_leave_with, args=(feed, execution), daemon=True).start()
        self._feed = feed
        self._work = work
        self._buffers = Buffers(work)
        self._engine: Engine | Failure
        try:
            self._engine = _open_engine(work)
        except PrompttuneError as problem:
            self._engine = Failure(f"node {socket.gethostname()}: {first_line(problem)}")

    def __call__(self, table: pa.Table) -> pa.Table:
        """Answer decoded parcels."""
        return pa.concat_tables(
            [wrapped(number, self._answers(number, content)) for number, content in unwrapped(table)]
        )

    def _answers(
        self, number: int, decoded: Sequence[Sequence[Decoded]] | Failure
    ) -> list[list[InputAnswer]] | Failure:
        engine = self._engine
        if isinstance(decoded, Failure):
            return decoded
        if isinstance(engine, Failure):
            return engine
        if not ray.get(self._feed.attempt.remote("answering", number)):
            return _hopeless(decoded[0][0].item.source, "answer")
        try:
            return [self._answer(engine, chunk) for chunk in decoded]
        except PrompttuneError as problem:
            return Failure(first_line(problem))

    def _answer(self, engine: Engine, chunk: Sequence[Decoded]) -> list[InputAnswer]:
        return answers_of(score(engine, assemble(chunk, self._work, self._buffers), self._buffers), self._work)


def _leave_with(feed: FeedHandle, execution: int) -> None:
    """End this process when its execution is replaced, whatever Ray has left for it to do."""
    with contextlib.suppress(RayError):  # the job is over: Ray Data ends its actors
        ray.get(feed.leave.remote(execution))
        os._exit(1)


def _open_engine(work: Work) -> Engine:
    if not work.engine.is_dir():
        raise EngineError(f"no engine at {work.engine}: its folder must be on storage that every node sees")
    found = {name: facts.version for name, facts in facts_of(EngineFolder(work.engine), list(work.known)).items()}
    if found != {name: facts.version for name, facts in work.known.items()}:
        raise EngineError(f"the engine at {work.engine} differs from the one on the machine that started the job")
    return Engine(work.engine, **asdict(work.options), tasks=list(work.known))
