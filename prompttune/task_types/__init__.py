"""Types of tasks by name: classification, segmentation, and those of other packages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from prompttune.errors import UsageError, describe_failure
from prompttune.registry import Registry
from prompttune.task_types.base import Head, Measures, Result, Scores, TaskType
from prompttune.task_types.classification import ClassificationConfig
from prompttune.task_types.segmentation import SegmentationConfig

Kind = TypeVar("Kind", bound=type[TaskType])

__all__ = [
    "TASK_TYPES",
    "ClassificationConfig",
    "Head",
    "Measures",
    "Result",
    "Scores",
    "SegmentationConfig",
    "TaskType",
    "entry_keys",
    "read_task_type",
    "register",
]


def _check(name: str, kind: Any) -> None:
    if kind.name != name:
        raise UsageError(f"{kind!r} is the task type {kind.name!r}, not {name!r}: register it under its own name")


TASK_TYPES: Registry[type[TaskType]] = Registry("task type", "prompttune.task_types", _check, TaskType)


def register(kind: Kind) -> Kind:
    """Add a type of task; also a class decorator. An entry point of the group ``prompttune.task_types`` does the same.

    Raises:
        UsageError: the name is taken, or the class is not a type of task.
    """
    TASK_TYPES.add(getattr(kind, "name", ""), kind)
    return kind


register(ClassificationConfig)
register(SegmentationConfig)


def entry_keys() -> tuple[str, ...]:
    """Keys under which a config may name its type."""
    return ("task_type", *(kind.entry for kind in TASK_TYPES.registered().values() if kind.entry))


def read_task_type(config: Mapping[str, Any]) -> TaskType:
    """The type that a checkpoint's config or an engine's manifest names; a classification if it names none.

    Raises:
        UsageError: a type or settings that this version does not know.
    """
    former = next((kind for kind in TASK_TYPES.registered().values() if kind.entry in config), None)
    entry = config.get("task_type")
    if former is None and entry is None:
        return ClassificationConfig()
    try:
        return (former or TASK_TYPES[entry["name"]]).from_config(config)  # type: ignore[index]
    except (TypeError, KeyError, AttributeError) as problem:
        name = former.entry if former else "task_type"
        reason = f"the entry {name!r} is damaged or of another version of prompttune: {describe_failure(problem)}"
        raise UsageError(f"{reason}; use the version that wrote it") from None
