"""Settings of a job as plain values, which are sent to the processes and machines that run it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prompttune.errors import UsageError
from prompttune.export.folder import EngineFolder, read_record
from prompttune.export.runtimes import RuntimeOptions
from prompttune.images.preprocess import Preprocess
from prompttune.serve.infer.settings import BATCH_SIZE
from prompttune.serve.limits import TOP_K
from prompttune.task_types import ClassificationConfig, TaskType

LOG = logging.getLogger("prompttune.infer")

NO_TASK = ""
"""Task name in the row of an input that names no task although it must."""


@dataclass(frozen=True)
class TaskFacts:
    """Facts about a task that decoding and writing need."""

    version: str
    labels: tuple[str, ...]
    preprocess: Preprocess


@dataclass(frozen=True)
class Work:
    """Settings of a job that affect its rows."""

    engine: Path
    """The engine folder."""
    tasks: tuple[str, ...]
    """Tasks of every input without a task of its own; empty if each input must name its task."""
    known: Mapping[str, TaskFacts]
    """Facts of every task that may be requested."""
    image_size: int
    """Side of the engine's square input, in pixels."""
    options: RuntimeOptions = field(default_factory=RuntimeOptions)
    batch_size: int = BATCH_SIZE
    """Largest number of rows in one engine call, a row being an image with one task."""
    top_k: int = TOP_K
    labelled: bool = False
    """Whether inputs have true labels."""
    label_is_index: bool = False
    """Whether a true label that is not a class name may be a class index, as in WebDataset's ``cls`` members."""
    task_type: TaskType = field(default_factory=ClassificationConfig)
    """Type of the engine's tasks."""
    only_reads: bool = False
    """Whether a call's size is in images, because their tasks only read what the backbone computed; else in rows."""
    picture_side: int | None = None
    """Longest side of the pictures in answers, in pixels; 0 for whole images, None for no pictures."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"the batch size must be at least 1, not {self.batch_size}")
        if self.top_k < 1:
            raise UsageError(f"top_k must be at least 1, not {self.top_k}")

    @property
    def chunk_inputs(self) -> int:
        """Number of inputs that are answered, committed, sharded and sent together: enough to fill an engine call."""
        return self.batch_size if self.only_reads else max(1, self.batch_size // max(1, len(self.tasks)))

    def tasks_of(self, task: str | None) -> tuple[str, ...]:
        """Tasks of an input whose own task is ``task`` or None: at least one, so that each input has a row."""
        return (self.tasks or (NO_TASK,)) if task is None else (task,)


def facts_of(folder: EngineFolder, names: Sequence[str] | None = None) -> dict[str, TaskFacts]:
    """Facts of the tasks in an engine folder: those of ``names``, or all.

    Raises:
        UsageError: a task does not exist.
        EngineError: a task of ``names`` is damaged. Without ``names``, damaged tasks are left out with a warning.
    """
    if names is None:
        scan = folder.scan()
        for name, problem in scan.problems.items():
            LOG.warning("the task %s is left out: %s", name, problem)
        records = scan.records
    else:
        records = {name: read_record(folder.task_folder(name)) for name in names}
    return {name: TaskFacts(one.version, one.labels, one.preprocess) for name, one in records.items()}
