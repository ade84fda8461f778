"""A job on one machine: decoding, batching, the engine and writing overlap."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

from prompttune.errors import DataError
from prompttune.serve.decode_threads import hold_to_one_thread, single_threaded_pool
from prompttune.serve.engine import Engine
from prompttune.serve.infer.answering import Answers, Buffers, Call, answers_of, assemble, score
from prompttune.serve.infer.decoding import Decoded, decode
from prompttune.serve.infer.items import Item
from prompttune.serve.infer.prefetch import Prefetch
from prompttune.serve.infer.rows import InputAnswer
from prompttune.serve.infer.settings import Decoding
from prompttune.serve.infer.smoothing import Smoother
from prompttune.serve.infer.work import Work

PER_PROCESS = 4
"""Number of images sent to a decoding process at once."""
CHUNKS_AHEAD = 2

Chunks = Iterable[Sequence[Item]]
Futures = list[Future[list[Decoded]]]


def run_locally(
    chunks: Chunks, engine: Engine, work: Work, decoding: Decoding, calls: int = 1, smoother: Smoother | None = None
) -> Prefetch[list[InputAnswer]]:
    """Answer the chunks in order.

    Steps overlap: a pool decodes images, a thread fills batches, threads run the engine, a thread makes rows. Each step
    runs at most a few chunks ahead of the next, so memory use does not depend on the number of inputs. Iterating
    raises the errors of ``chunks`` and of the engine.

    Args:
        chunks: inputs that belong together, iterated over in a thread.
        engine: an open engine.
        work: settings of the job.
        decoding: settings of the decoders.
        calls: number of concurrent engine calls. On a CPU, two single-threaded calls waste less time than one call with
            two threads, which wait for each other after every operator, all the more if decoders occupy a core.
        smoother: smooths frames over time; None for no smoothing.
    """
    buffers = Buffers(work)
    depth = max(CHUNKS_AHEAD, -(-2 * decoding.count // work.chunk_inputs))
    submitted = Prefetch(_submit(chunks, work, decoding), depth, "infer-source")
    assembled = Prefetch(_assemble(submitted, work, buffers), 1, "infer-batches", submitted)
    called = Prefetch(_call(assembled, engine, buffers, calls), max(1, calls - 1), "infer-engine", assembled)
    answered = (answers_of(inputs, logits.result(), work, smoother) for inputs, logits in called)
    return Prefetch(answered, 1, "infer-answers", called)


def _submit(chunks: Chunks, work: Work, decoding: Decoding) -> Generator[Futures, None, None]:
    pool, at_once = _pool(decoding, work)
    decoded = _decode_in_process if decoding.kind == "processes" else partial(_decode, work=work)
    try:
        for chunk in chunks:
            parts = [chunk[start : start + at_once] for start in range(0, len(chunk), at_once)]
            yield [pool.submit(decoded, part) for part in parts]
    except GeneratorExit:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        pool.shutdown(wait=False)  # submitted images are still decoded


def _assemble(
    submitted: Iterable[Futures], work: Work, buffers: Buffers
) -> Generator[tuple[list[Decoded], list[Call]], None, None]:
    try:
        for futures in submitted:
            inputs = [one for future in futures for one in future.result()]
            yield inputs, assemble(inputs, work, buffers)
    except BrokenProcessPool:
        raise DataError("a decoding process was killed; was the memory full? Try fewer of them (--workers)") from None


def _call(
    assembled: Iterable[tuple[list[Decoded], list[Call]]], engine: Engine, buffers: Buffers, at_once: int
) -> Generator[tuple[list[Decoded], Future[Answers]], None, None]:
    pool = ThreadPoolExecutor(at_once, thread_name_prefix="infer-call")
    try:
        for inputs, calls in assembled:
            yield inputs, pool.submit(score, engine, calls, buffers)
    finally:
        pool.shutdown(wait=False)


def _pool(decoding: Decoding, work: Work) -> tuple[Executor, int]:
    """A pool, and the number of images to send to it at once."""
    if decoding.kind == "threads":
        return single_threaded_pool(decoding.count), 1
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the runtime's threads
    return ProcessPoolExecutor(decoding.count, context, _begin_process, (work,)), PER_PROCESS


def _decode(items: Sequence[Item], work: Work) -> list[Decoded]:
    return [decode(item, work) for item in items]


_in_this_process: list[Work] = []
"""Set when a decoding process starts, so that the tasks' settings are not sent with every image."""


def _begin_process(work: Work) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the process
    hold_to_one_thread()
    _in_this_process.append(work)


def _decode_in_process(items: Sequence[Item]) -> list[Decoded]:
    return _decode(items, _in_this_process[0])
