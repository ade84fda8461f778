"""The job as the driver runs it: chunks go out ahead of the answers, which arrive in order."""

from __future__ import annotations

import logging
import math
import pickle
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, read_datasource
from ray.exceptions import RayError

from prompttune.errors import DataError, EngineError, UsageError, first_line
from prompttune.serve.infer.cluster.connection import alive_nodes, connected, quiet
from prompttune.serve.infer.cluster.feed import FeedHandle, start_feed, this_node
from prompttune.serve.infer.cluster.settings import Booking, RaySettings
from prompttune.serve.infer.cluster.stages import Answering, Failure, Numbers, decode_parcels, unwrapped
from prompttune.serve.infer.cluster.watch import Watch
from prompttune.serve.infer.items import Item
from prompttune.serve.infer.rows import InputAnswer
from prompttune.serve.infer.work import Work

log = logging.getLogger(__name__)

PARCELS_OF_ENGINE = 4
"""Parcels in progress per engine: one is being answered, one waits at the engine, two are being decoded."""
MOST_PARCELS = 512
BLOCK_BYTES = 1
"""Size in bytes above which a block of a Dataset is passed on: here each row, which is a parcel, at once."""


def run(chunks: Iterable[Sequence[Item]], work: Work, settings: RaySettings) -> Iterator[list[InputAnswer]]:
    """See :func:`~prompttune.serve.infer.cluster.run_on_ray`."""
    booking = Booking.of(settings, on_gpu=work.options.cuda_index is not None)
    with connected(settings.address), quiet():
        yield from _Job(iter(chunks), on_workers(work, settings), settings, booking).answers()


def on_workers(work: Work, settings: RaySettings) -> Work:
    """The work as the nodes of a cluster do it."""
    # Ray shows an engine only the GPUs that it has booked, and books CPUs, but a runtime would take all that it sees.
    options = replace(work.options, device="cpu" if work.options.cuda_index is None else "cuda")
    options = options.or_threads(max(1, math.floor(settings.cpus)))
    return replace(work, engine=work.engine.absolute(), options=options)


class _Job:
    """One job on the cluster.

    A Dataset never moves the work of a lost engine to another engine: it waits until the lost one is running again. If
    that cannot happen, the execution is ended and a new one starts at the first unanswered chunk.
    """

    def __init__(self, chunks: Iterator[Sequence[Item]], work: Work, settings: RaySettings, booking: Booking) -> None:
        self._chunks = chunks
        self._work = work
        self._settings = settings
        self._booking = booking
        self._feed: FeedHandle = start_feed()
        self._listed = self._answered = 0  # parcels
        self._execution = 0
        self._exhausted = False
        self._problem: Exception | None = None

    def answers(self) -> Generator[list[InputAnswer], None, None]:
        """The answers of every chunk."""
        try:
            while not self._finished():
                dataset = self._prepare()
                watch = Watch(self._feed, self._execution, self._booking, lambda: self._answered)
                try:
                    yield from self._execute(dataset)
                except RayError as problem:
                    if not watch.broken_off:
                        raise DataError(f"the job on Ray has failed: {_cause(problem)}") from problem
                    log.warning("a node was lost and its work cannot be placed elsewhere: its inputs are retried")
                finally:
                    watch.end()
                self._execution += 1
        finally:
            ray.kill(self._feed)
        if self._problem is not None:
            raise self._problem

    def _finished(self) -> bool:
        return self._exhausted and self._answered == self._listed

    def _execute(self, dataset: Dataset) -> Generator[list[InputAnswer], None, None]:
        if self._finished():
            return
        # A prefetched block is held back until the next one arrives, which never happens at the end of the inputs.
        batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        with closing(iter(batches)) as tables:
            for table in tables:
                for number, content in unwrapped(table):
                    if isinstance(content, Failure):
                        raise EngineError(content.message)
                    if number != self._answered:
                        raise DataError(f"Ray returned parcel {number} in place of parcel {self._answered}")
                    self._answered += 1
                    self._feed.answered.remote(number)
                    self._list()
                    yield from content
                if self._finished():
                    return

    def _list(self) -> None:
        """Take the next parcel from the source; an error is raised after the answers of the parcels before it."""
        parcel: list[list[Item]] = []
        try:
            for chunk in islice(self._chunks, max(1, self._settings.parcel // self._work.chunk_inputs)):
                parcel.append(list(chunk))  # chunks before an error count
        except Exception as problem:
            self._problem = problem
            self._chunks = iter(())
        if parcel:
            self._feed.put.remote(self._listed, pickle.dumps(parcel, pickle.HIGHEST_PROTOCOL))
            self._listed += 1
        else:
            self._exhausted = True

    def _prepare(self) -> Dataset:
        """List enough parcels to keep the cluster busy and plan a new execution."""
        nodes = alive_nodes().values()
        least, most = self._engines(self._booking.room(nodes))
        cpus = math.floor(sum(node.get("CPU", 0.0) for node in nodes))
        window = self._settings.window or min(MOST_PARCELS, PARCELS_OF_ENGINE * most + cpus)
        while self._listed - self._answered < window and not self._exhausted:
            self._list()
        context = DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        context.target_max_block_size = BLOCK_BYTES
        context.enable_progress_bars = False
        with DataContext.current(context):
            return self._plan(ActorPoolStrategy(min_size=least, max_size=most))

    def _engines(self, room: int) -> tuple[int, int]:
        """Smallest and largest number of engines."""
        booking, (least, most) = self._booking, self._settings.actors
        if not room:
            gpus = f" and {booking.gpus:g} GPUs" if booking.gpus else ""
            raise UsageError(
                f"the Ray cluster has no room for an engine ({booking.cpus:g} CPUs{gpus} on a node) and a decoder "
                f"({booking.decoder_cpus:g} CPUs): let them book less, or add nodes"
            )
        if self._execution:  # the cluster may be smaller than when the job began
            least = min(least, room)
        if least > room:
            # Additional engines would take the CPUs of the decoders and wait for them for ever.
            raise UsageError(f"the Ray cluster has room for {room} engines with their decoders, not for {least}")
        return least, room if most is None else min(most, room)

    def _plan(self, engines: ActorPoolStrategy) -> Dataset:
        numbers = read_datasource(
            Numbers(self._feed, self._answered, self._execution),
            override_num_blocks=1,
            num_cpus=0,
            label_selector=this_node(),
        )
        decoded = numbers.map_batches(
            decode_parcels,
            batch_format="pyarrow",
            fn_kwargs={"feed": self._feed, "work": self._work, "folder": Path.cwd()},
            num_cpus=self._booking.decoder_cpus,
            max_calls=0,  # unlimited; different options keep Ray from fusing this stage with the next
        )
        return decoded.map_batches(
            Answering,
            batch_format="pyarrow",
            fn_constructor_args=(self._feed, self._execution, self._work),
            compute=engines,
            num_cpus=self._booking.cpus,
            num_gpus=self._booking.gpus or None,
        )


def _cause(problem: BaseException) -> str:
    """The error in a worker that Ray's errors wrap, in one line."""
    inner = getattr(problem, "cause", None) or problem.__cause__
    return _cause(inner) if isinstance(inner, BaseException) else f"{type(problem).__name__}: {first_line(problem)}"
