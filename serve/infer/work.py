"""What is to be done with every input: plain values that travel to the processes and machines that do it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prompttune.errors import UsageError
from prompttune.export.folder import EngineFolder, read_record
from prompttune.export.runtimes import RuntimeOptions
from prompttune.preprocess import Preprocess
from prompttune.serve.infer.settings import BATCH_SIZE
from prompttune.serve.limits import TOP_K

LOG = logging.getLogger("prompttune.infer")

NO_TASK = ""
"""Stands in the row of an input that should have named its task and did not."""


@dataclass(frozen=True)
class TaskFacts:
    """What decoding and writing need to know of a task."""

    version: str
    labels: tuple[str, ...]
    preprocess: Preprocess


@dataclass(frozen=True)
class Work:
    """Settings of a job that shape its rows."""

    engine: Path
    """The engine folder."""
    tasks: tuple[str, ...]
    """For every input that names no task of its own; empty where each input must."""
    known: Mapping[str, TaskFacts]
    """Every task that may be asked for."""
    image_size: int
    """Side of the engine's square input, in pixels."""
    options: RuntimeOptions = field(default_factory=RuntimeOptions)
    batch_size: int = BATCH_SIZE
    """Rows of one call of the engine at most."""
    top_k: int = TOP_K
    labelled: bool = False
    """Inputs come with true labels."""
    label_is_index: bool = False
    """A true label that is no class name may be a class index, as in WebDataset's ``cls`` members."""
    segments: bool = False
    """The tasks are segmentations."""
    picture_side: int | None = None
    """Longest side of the pictures that answers carry; 0 for whole images, None for none."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"the batch size must be at least 1, not {self.batch_size}")
        if self.top_k < 1:
            raise UsageError(f"top_k must be at least 1, not {self.top_k}")

    @property
    def chunk_inputs(self) -> int:
        """Inputs that are answered, committed, sharded and sent to a machine together: what fills a call."""
        return max(1, self.batch_size // max(1, len(self.tasks)))

    def tasks_of(self, task: str | None) -> tuple[str, ...]:
        """The tasks of an input whose own task is ``task``, or None: at least one, so that each input has a row."""
        return (self.tasks or (NO_TASK,)) if task is None else (task,)


def facts_of(folder: EngineFolder, names: Sequence[str] | None = None) -> dict[str, TaskFacts]:
    """The tasks of an engine folder; those of ``names``, or all.

    Raises:
        UsageError: there is no such task.
        EngineError: a task of ``names`` is damaged; others are left out, with a warning.
    """
    if names is None:
        scan = folder.scan()
        for name, problem in scan.problems.items():
            LOG.warning("the task %s is left out: %s", name, problem)
        records = scan.records
    else:
        records = {name: read_record(folder.task_folder(name)) for name in names}
    return {name: TaskFacts(one.version, one.labels, one.preprocess) for name, one in records.items()}
