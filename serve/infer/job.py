"""A job: inputs go in, rows come out, and committed rows survive whatever happens next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from prompttune.errors import DataError, PrompttuneError
from prompttune.evaluation import RowScores, TaskEvaluation
from prompttune.serve.infer.items import Item
from prompttune.serve.infer.latency import LiveLatency
from prompttune.serve.infer.plan import ChunkPlan
from prompttune.serve.infer.prefetch import Prefetch
from prompttune.serve.infer.row_log import RowLog, RunProgress
from prompttune.serve.infer.rows import InputAnswer
from prompttune.serve.infer.sinks.base import Sink
from prompttune.serve.infer.sources.base import Source

Answering = Callable[[Iterator[Sequence[Item]]], Prefetch[list[InputAnswer]]]
"""Begins to answer chunks, here or on a cluster, and gives the answers of one chunk after the other."""
COMMIT_S = 2.0
"""Longest time in seconds that answers wait for a commit."""
LIVE_COMMIT_S = 0.5


@dataclass(frozen=True)
class InferSummary:
    """Result of a job."""

    inputs: int
    """Answered inputs, including those of earlier runs of the same job."""
    rows: int
    errors: int
    """Inputs with an error in one of their rows."""
    seconds: float
    """Duration of this run, in seconds."""
    images_per_s: float
    """Speed of this run, in inputs per second."""
    finished: bool
    """Whether every input was answered."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Counts of a stream's inputs, see :meth:`Source.counts`."""
    latency: Mapping[str, float] | None = None
    """``p50_ms``, ``p99_ms`` and ``max_ms`` of live frames, from arrival to the written row."""
    evaluation: Mapping[str, TaskEvaluation] = field(default_factory=dict)
    """Accuracy and calibration of each task, if true labels are known."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        evaluation = {task: one.to_dict() for task, one in self.evaluation.items()}
        return {
            "inputs": self.inputs,
            "rows": self.rows,
            "errors": self.errors,
            "seconds": self.seconds,
            "images_per_s": self.images_per_s,
            "finished": self.finished,
            "counts": dict(self.counts),
            "latency": None if self.latency is None else dict(self.latency),
            **({"evaluation": evaluation} if evaluation else {}),
        }


class InferJob:
    """One pass over the inputs.

    Args:
        source: source of the inputs.
        plan: chunks of ``source``.
        answering: begins to answer the chunks.
        sinks: destinations of the rows; each gets every row.
        log: row log, from which a later run resumes; None keeps no log.
        resumable: whether an error may advise to resume.
        scores: metrics of rows with true labels, already including those of earlier runs.
        max_errors: number of inputs with errors to tolerate; None for any number.
        on_progress: called after every chunk.
    """

    def __init__(
        self,
        source: Source,
        plan: ChunkPlan,
        answering: Answering,
        sinks: Sequence[Sink],
        *,
        log: RowLog | None = None,
        resumable: bool = True,
        scores: RowScores | None = None,
        max_errors: int | None = None,
        on_progress: Callable[[RunProgress], None] = lambda _: None,
    ) -> None:
        self._source = source
        self._plan = plan
        self._answering = answering
        self._sinks = sinks
        self._log = log
        self._resumable = resumable
        self._before = self._progress = RunProgress() if log is None else log.progress
        self._scores = scores
        self._max_errors = max_errors
        self._on_progress = on_progress
        self._latency = LiveLatency()
        self._stopped = False
        self._uncommitted = False

    def stop(self) -> None:
        """Take no more inputs; running ones are still answered and written. May be called from a signal handler."""
        self._stopped = True
        self._plan.stop()

    def run(self) -> InferSummary:
        """Answer every input.

        Raises:
            PrompttuneError: the inputs cannot be read any further, the engine fails, a sink cannot be written, or there
                are too many errors. Committed rows are kept.
            BrokenPipeError: the reader of standard output has closed it.
        """
        started = time.perf_counter()
        results = self._answering(self._plan.chunks())
        try:
            self._answer_all(results)
            return self._end(started)
        except BrokenPipeError:
            raise
        except (OSError, PrompttuneError) as problem:
            with suppress(OSError):
                self._commit_log()
            if isinstance(problem, OSError):
                raise DataError(f"the rows cannot be written: {problem.strerror or problem}{self._hint()}") from problem
            problem.args = (f"{problem}{self._hint()}",)
            raise
        finally:
            self._source.close()  # first: a thread of the results may be waiting for the source
            results.close()
            for sink in self._sinks:
                with suppress(OSError):
                    sink.close()

    def _answer_all(self, results: Prefetch[list[InputAnswer]]) -> None:
        interval = 0.0 if self._log is None else COMMIT_S if self._source.bounded else LIVE_COMMIT_S
        committed = time.monotonic()
        while True:
            if results.wait(interval or COMMIT_S):
                answers = next(results, None)
                if answers is None:
                    return
                self._write(answers)
                self._on_progress(self._progress)
            if time.monotonic() - committed >= interval:
                self._commit()
                committed = time.monotonic()
            self._check_errors()

    def _write(self, answers: Sequence[InputAnswer]) -> None:
        for sink in self._sinks:  # one after the other: standard output, the last, has what the files have
            for answer in answers:
                sink.write(answer)
        # Only now: a resumed run repeats what a sink has refused.
        if self._log is not None:
            self._log.append(answers)
        before = self._progress
        self._progress = replace(
            before,
            inputs=before.inputs + len(answers),
            rows=before.rows + sum(len(answer.rows) for answer in answers),
            errors=before.errors + sum(any(row.error for row in answer.rows) for answer in answers),
            smoothing=answers[-1].smoothing if answers else before.smoothing,
            finished=False,
        )
        self._uncommitted = True
        if self._scores is not None:
            for answer in answers:
                for row in answer.rows:
                    self._scores.add(row)
        self._latency.written(answers)

    def _check_errors(self) -> None:
        if self._max_errors is not None and self._progress.errors > self._max_errors:
            raise DataError(
                f"{self._progress.errors} of {self._progress.inputs} inputs have errors, "
                f"more than the {self._max_errors} that --max-errors allows"
            )

    def _commit(self) -> None:
        if self._uncommitted:
            for sink in self._sinks:
                sink.flush()
            self._commit_log()
            self._uncommitted = False

    def _commit_log(self) -> None:
        if self._log is not None:
            self._progress = replace(self._progress, counts=dict(self._source.counts()))
            self._log.commit(self._progress)

    def _end(self, started: float) -> InferSummary:
        finished = not (self._stopped and self._source.bounded)
        self._commit()
        for sink in self._sinks:
            sink.finish()
        self._progress = replace(self._progress, finished=finished)
        self._commit_log()
        seconds = time.perf_counter() - started
        return InferSummary(
            inputs=self._progress.inputs,
            rows=self._progress.rows,
            errors=self._progress.errors,
            seconds=seconds,
            images_per_s=(self._progress.inputs - self._before.inputs) / seconds,
            finished=finished,
            counts=dict(self._source.counts()),
            latency=self._latency.figures(),
            evaluation={} if self._scores is None else self._scores.results(),
        )

    def _hint(self) -> str:
        if self._log is None or not self._resumable:
            return ""
        return f"; the rows of {self._log.progress.inputs} inputs are safe: run again with --resume"
