"""Training of several tasks from one file, over backbones that are loaded once and shared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompttune.errors import UsageError, choose, describe_failure
from prompttune.methods import METHODS
from prompttune.methods.registry import method_fields
from prompttune.training.config import FORMER, TrainConfig, check_belongs, known_names, read_yaml
from prompttune.training.loop import TrainResult, train

if TYPE_CHECKING:
    from prompttune.backbones import Backbone
    from prompttune.training.progress import OnProgress

DEFAULT_PARENT = "runs"
_TOP_LEVEL = ("defaults", "tasks")


@dataclass(frozen=True)
class TrainTask:
    """One entry of a tasks file."""

    name: str
    config: TrainConfig


@dataclass(frozen=True)
class TaskOutcome:
    """Outcome of a task: a result, or one line about the error."""

    task: TrainTask
    result: TrainResult | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "name": self.task.name,
            "method": self.task.config.method,
            "data": str(self.task.config.data),
            "output": self.task.config.output,
            "error": self.error,
            "metrics": None if self.result is None else self.result.metrics,
        }


def load_tasks(path: Path, overrides: Mapping[str, Any] | None = None) -> list[TrainTask]:
    """Read a tasks file: ``defaults``, a mapping of settings, and ``tasks``, a list of mappings with a ``name``.

    A task's own settings replace the defaults, and ``overrides`` replace both. A method's setting among the defaults or
    the overrides applies to the tasks whose method has it. A task without an ``output`` is written to the folder of its
    name in the ``output`` of the overrides or defaults.

    Raises:
        UsageError: the file or a task in it is wrong; the message names the task. No task has been trained.
    """
    document = read_yaml(path)
    for key in document:
        choose(f"part of {path}", key, _TOP_LEVEL)
    entries, defaults = document.get("tasks"), document.get("defaults") or {}
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError(f"{path} needs 'tasks', a list of mappings with a name and settings")
    if not isinstance(defaults, dict):
        raise UsageError(f"the defaults of {path} must be settings as 'name: value' lines")
    shared = {_key(name): value for name, value in defaults.items()}, dict(overrides or {})
    for name in (name for settings in shared for name in settings):
        choose("setting", name, known_names())
    tasks = [_read_task(path, entry, *shared) for entry in entries]
    _check_overrides(tasks, shared[1])
    for kind, values in (("name", [task.name for task in tasks]), ("output", [task.config.output for task in tasks])):
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise UsageError(f"two tasks of {path} have the {kind} {twice}")
    return tasks


def _key(name: Any) -> str:
    key = str(name).replace("-", "_")
    return FORMER.get(key, key)


def _read_task(
    path: Path, entry: Mapping[str, Any], defaults: Mapping[str, Any], overrides: Mapping[str, Any]
) -> TrainTask:
    own = {_key(key): value for key, value in entry.items()}
    name = own.pop("name", None)
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise UsageError(f"every task of {path} needs a name that can be a folder, not {name!r}")
    parent = overrides.get("output", defaults.get("output", DEFAULT_PARENT))
    output = own.pop("output", None) or str(Path(str(parent)) / name)
    wanted = overrides.get("method", own.get("method", defaults.get("method", TrainConfig.method)))
    try:
        method = choose("method", wanted, METHODS)
        settings = {**suiting(defaults, method), **own, **suiting(overrides, method), "output": output}
        return TrainTask(name, TrainConfig.from_flat(settings))
    except UsageError as problem:
        raise UsageError(f"task {name}: {problem}") from None


def suiting(settings: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The settings without those of other methods."""
    fields = method_fields()
    return {name: value for name, value in settings.items() if name not in fields or method in fields[name]}


def _check_overrides(tasks: list[TrainTask], overrides: Mapping[str, Any]) -> None:
    """Raise an error for a method's setting on the command line that does not apply to any task."""
    fields, methods = method_fields(), {task.config.method for task in tasks}
    for name in overrides:
        if name in fields and not methods & fields[name].keys():
            check_belongs(name, tasks[0].config.method)


def train_tasks(
    tasks: list[TrainTask],
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    on_task: Callable[[int, TrainTask], None] | None = None,
) -> list[TaskOutcome]:
    """Train tasks one after the other; a failed task does not stop the others.

    A backbone is loaded once per name, image size and weights, and dropped after the last task that needs it.

    Args:
        tasks: tasks to train.
        resume: whether to resume unfinished runs; finished ones are not changed.
        overwrite: whether to replace earlier runs.
        on_progress: see :func:`prompttune.training.train`.
        on_task: called with the index of a task, counted from 0, before it starts.
    """
    keys = [(task.config.backbone, task.config.image_size, task.config.weights) for task in tasks]
    backbones: dict[tuple[str, int | None, str], Backbone] = {}
    outcomes = []
    for index, (task, key) in enumerate(zip(tasks, keys, strict=True)):
        if on_task is not None:
            on_task(index, task)
        try:
            if key not in backbones:
                backbones[key] = _load(*key)
            result = train(task.config, backbones[key], resume=resume, overwrite=overwrite, on_progress=on_progress)
            outcomes.append(TaskOutcome(task, result))
        except Exception as problem:  # any error belongs to this task
            outcomes.append(TaskOutcome(task, error=describe_failure(problem)))
        if key not in keys[index + 1 :]:
            backbones.pop(key, None)
    return outcomes


def _load(name: str, image_size: int | None, weights: str) -> Backbone:
    from prompttune.backbones import load_backbone

    return load_backbone(name, image_size, weights)
