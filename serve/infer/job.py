"""A job: inputs go in, rows come out, and committed rows survive whatever happens next."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from prompttune.errors import DataError, PrompttuneError
from prompttune.evaluation import RowScores, TaskEvaluation
from prompttune.serve.infer.executors import Executor
from prompttune.serve.infer.items import Source
from prompttune.serve.infer.journal import Journal, Progress
from prompttune.serve.infer.latency import Latency
from prompttune.serve.infer.ledger import output_line
from prompttune.serve.infer.plan import Plan
from prompttune.serve.infer.rows import Answer
from prompttune.serve.infer.sinks.appended import PARTS
from prompttune.serve.infer.sinks.base import Sink

COMMIT_S = 2.0
"""Longest time in seconds that answers wait for a commit."""
LIVE_COMMIT_S = 0.5


@dataclass(frozen=True)
class Summary:
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


class Job:
    """One pass over the inputs.

    Args:
        source: source of the inputs.
        plan: chunks of ``source``.
        executor: answers the chunks.
        sinks: destinations of the rows; each gets every row.
        journal: record of this run's progress, from which a later run resumes; None keeps no record.
        before: progress committed by earlier runs of the job.
        scores: metrics of rows with true labels, already including those of earlier runs.
        max_errors: number of inputs with errors to tolerate; None for any number.
        on_progress: called after every chunk.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        executor: Executor,
        sinks: Sequence[Sink],
        *,
        journal: Journal | None = None,
        before: Progress | None = None,
        scores: RowScores | None = None,
        max_errors: int | None = None,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self._source = source
        self._plan = plan
        self._executor = executor
        self._sinks = sinks
        self._journal = journal
        self._before = self._progress = before or Progress()
        self._scores = scores
        self._max_errors = max_errors
        self._on_progress = on_progress
        self._latency = Latency()
        self._stopped = False
        self._writing = self._uncommitted = False

    def stop(self) -> None:
        """Take no more inputs; running ones are still answered and written. May be called from a signal handler."""
        self._stopped = True
        self._plan.stop()

    def run(self) -> Summary:
        """Answer every input.

        Raises:
            PrompttuneError: the inputs cannot be read any further, the engine fails, a sink cannot be written, or there
                are too many errors. Committed rows are kept.
            BrokenPipeError: the reader of standard output has closed it.
        """
        started = time.perf_counter()
        self._executor.start(self._plan.chunks())
        try:
            self._answer_all()
            return self._end(started)
        except BrokenPipeError:
            raise
        except OSError as problem:
            # The sinks' content is unknown after a failed write: only the last commit counts.
            raise DataError(f"the rows cannot be written: {problem.strerror or problem}{self._hint()}") from problem
        except PrompttuneError as problem:
            if not self._writing:
                with suppress(OSError, PrompttuneError):
                    self._commit(ended=True)
            problem.args = (f"{problem}{self._hint()}",)
            raise
        finally:
            self._source.close()  # first: a thread of the executor may be waiting for the source
            self._executor.close()
            for sink in self._sinks:
                with suppress(OSError):
                    sink.close()

    def _answer_all(self) -> None:
        interval = 0.0 if self._journal is None else COMMIT_S if self._source.bounded else LIVE_COMMIT_S
        committed = time.monotonic()
        while True:
            if self._executor.wait(interval or COMMIT_S):
                answers = self._executor.take()
                if answers is None:
                    return
                self._write(answers)
                self._on_progress(self._progress)
            if time.monotonic() - committed >= interval:
                self._commit()
                committed = time.monotonic()
            self._check_errors()

    def _write(self, answers: Sequence[Answer]) -> None:
        """Write a whole chunk; if a sink fails, the next run cuts off the written part."""
        self._writing = True  # no commit until all sinks hold the same rows
        for answer in answers:
            for sink in self._sinks:
                sink.write(answer)
            if self._scores is not None:
                for row in answer.rows:
                    self._scores.add(row)
            if self._journal is not None and answer.arrived is None:  # a live frame cannot be requested again
                self._journal.note(answer.trace)
        self._latency.written(answers)
        mark, before = self._plan.answered(), self._progress
        self._progress = replace(
            before,
            inputs=mark.inputs,
            chunks=mark.chunks,
            rows=before.rows + sum(len(answer.rows) for answer in answers),
            errors=before.errors + sum(any(row.error for row in answer.rows) for answer in answers),
            smoothing=self._executor.state(),
        )
        self._writing = False
        self._uncommitted = True

    def _check_errors(self) -> None:
        if self._max_errors is not None and self._progress.errors > self._max_errors:
            raise DataError(
                f"{self._progress.errors} of {self._progress.inputs} inputs have errors, "
                f"more than the {self._max_errors} that --max-errors allows"
            )

    def _commit(self, ended: bool = False) -> None:
        """Commit the sinks first and the journal last: what the journal does not list is cut off later."""
        if not self._uncommitted and not ended:
            return
        self._commit_sinks()
        if self._journal is not None and ended:
            self._journal.end(replace(self._progress, ended=self._progress.ledger))
        elif self._journal is not None:
            self._journal.write(self._progress)
        self._uncommitted = False

    def _commit_sinks(self) -> None:
        states = [dict(sink.commit()) for sink in self._sinks]
        parts = [part for state in states for part in state.pop(PARTS, ())]
        self._progress = replace(self._progress, sinks=tuple(states), counts=dict(self._source.counts()))
        if self._journal is not None:
            for part in parts:
                self._journal.note(output_line(part))
            self._progress = replace(self._progress, ledger=self._journal.sync())

    def _end(self, started: float) -> Summary:
        finished = not (self._stopped and self._source.bounded)
        self._commit_sinks()
        before = self._progress  # new inputs continue from the unfinished outputs
        for sink, state in zip(self._sinks, before.sinks, strict=True):
            if finished or not state:  # a sink that cannot be resumed is completed now
                sink.finish()
        self._commit_sinks()
        self._progress = replace(before, ended=self._progress.ledger)
        seconds = time.perf_counter() - started
        summary = Summary(
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
        if self._journal is not None:
            self._journal.end(self._progress, finished, summary.to_dict() if finished else None)
        return summary

    def _hint(self) -> str:
        if self._journal is None:
            return ""
        return f"; the rows of {self._progress.inputs} inputs are safe: run again with --resume"
