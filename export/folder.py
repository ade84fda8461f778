"""The engine folder: a manifest, a model whose tasks are inputs, and one folder for each task.

::

    engine/
      engine.json                    manifest, sealed with a digest
      model.onnx, model.onnx.data    written once, never touched by adding or removing a task
      tasks/<name>/task.json         labels, preprocessing, settings, source, digest of the state
      tasks/<name>/state.safetensors the task's folded state
      versions/<name>.json           how many versions of a task there have been
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from prompttune.errors import EngineError, PrompttuneError, UsageError, choose
from prompttune.export.banks import BankForm
from prompttune.export.layout import CLASS_ROWS, TASK_INDEX, Layout, Sizes, TensorSpec
from prompttune.export.versions import count_version
from prompttune.files import locked, read_json, replacing_folder, sha256_file, sync_file, visible, write_json
from prompttune.images.preprocess import Preprocess

if TYPE_CHECKING:
    from prompttune.task_types import TaskType

FORMAT_VERSION = 1
LATEST_VERSION = 3
"""Version of manifests whose model answers several tasks for an image, which earlier releases must refuse."""
MANIFEST, TASKS = "engine.json", "tasks"
ONNX_FILE, ONNX_WEIGHTS_FILE = "model.onnx", "model.onnx.data"
IMAGE_PART, TASK_PART = "image", "answer"
"""Folders of the two graphs of a split engine."""
TASK_RECORD, STATE_FILE = "task.json", "state.safetensors"
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_VERSION_DIGITS = 12


def check_task_name(name: str) -> str:
    """Return ``name`` if it is a valid task name, which cannot leave the folder; else raise :class:`UsageError`."""
    if not _TASK_NAME.fullmatch(name):
        raise UsageError(
            f"bad task name {name!r}: use at most 200 letters, digits, '.', '_' and '-', first a letter or a digit"
        )
    return name


def _digest(values: Mapping[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _sealed(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` with their own digest, so that an edited file is detected."""
    return {**values, "digest": _digest(values)}


def _read_sealed(path: Path, what: str) -> dict[str, Any]:
    values = read_json(path, EngineError, what)
    version = values.get("format_version")
    if not isinstance(version, int):
        raise EngineError(f"the {what} {path} does not have a format version")
    if version > LATEST_VERSION:
        raise EngineError(
            f"the {what} {path} has format version {version}, this prompttune reads up to {LATEST_VERSION}: "
            "upgrade prompttune"
        )
    found = values.pop("digest", None)
    if found != _digest(values):
        raise EngineError(f"the {what} {path} was edited or damaged: its digest does not match")
    return values


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and hex sha256 of a file in an engine folder."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Measure the file at ``path``."""
        return cls(path.stat().st_size, sha256_file(path))

    def check_size(self, path: Path, remedy: str) -> None:
        """Raise :class:`EngineError` that ends with ``remedy`` unless ``path`` exists and has the recorded size."""
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise EngineError(f"{path} is missing: {remedy}") from None
        if not stat.S_ISREG(found.st_mode) or found.st_size != self.size:
            raise EngineError(f"{path} is damaged: {found.st_size} bytes instead of {self.size}: {remedy}")

    def check(self, path: Path, remedy: str, content: bytes | None = None) -> None:
        """Raise :class:`EngineError` that ends with ``remedy`` unless ``path`` is the recorded file."""
        self.check_size(path, remedy)
        if (sha256_file(path) if content is None else hashlib.sha256(content).hexdigest()) != self.sha256:
            raise EngineError(f"{path} is damaged: its sha256 does not match the recorded one: {remedy}")


@dataclass(frozen=True)
class EngineTask:
    """A task folded for an engine, with its origin."""

    labels: tuple[str, ...]
    preprocess: Preprocess
    state: Mapping[str, NDArray[np.float32]] = field(repr=False)
    """State tensors [1, ...] by key, not padded."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The task's settings of the method."""
    source: dict[str, Any] = field(default_factory=dict)
    """Name, digest and metrics of the checkpoint."""
    parity: dict[str, Any] | None = None
    """Report of the comparison with PyTorch that admitted the task."""

    @property
    def packed(self) -> bytes:
        """The state as the bytes of a safetensors file; equal states give equal bytes."""
        return bytes(safetensors.numpy.save({key: np.ascontiguousarray(v) for key, v in self.state.items()}))

    @property
    def version(self) -> str:
        """Digest of everything that affects an answer: state, labels and preprocessing."""
        return self._version(hashlib.sha256(self.packed).hexdigest())

    def _version(self, state_sha256: str) -> str:
        parts = {"state": state_sha256, "labels": self.labels, "preprocess": self.preprocess.to_dict()}
        return _digest(parts)[:_VERSION_DIGITS]

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.labels)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each state tensor, including the leading dimension 1."""
        return {key: value.shape for key, value in self.state.items()}

    def to_dict(self) -> dict[str, Any]:
        """The task's record without its state, ready for JSON."""
        packed = self.packed
        sha256 = hashlib.sha256(packed).hexdigest()
        return {
            "format_version": FORMAT_VERSION,
            "version": self._version(sha256),
            "labels": list(self.labels),
            "settings": self.settings,
            "preprocess": self.preprocess.to_dict(),
            "source": self.source,
            "state": {"file": STATE_FILE, "size": len(packed), "sha256": sha256},
            "parity": self.parity,
        }


def save_task(task: EngineTask, folder: Path) -> None:
    """Write a task's record and state into an existing folder."""
    (folder / STATE_FILE).write_bytes(task.packed)
    sync_file(folder / STATE_FILE)
    write_json(folder / TASK_RECORD, _sealed(task.to_dict()))


@dataclass(frozen=True)
class TaskRecord:
    """A task's record, known without reading its state: some kilobytes instead of some megabytes."""

    name: str
    folder: Path
    values: Mapping[str, Any] = field(repr=False)
    """Content of ``task.json`` without its own digest."""
    version: str
    labels: tuple[str, ...]
    preprocess: Preprocess
    state: FileRecord
    """Size and digest of the state file."""

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each state tensor, including the leading dimension 1, from the header of the state file.

        Raises:
            EngineError: the state file is damaged.
        """
        try:
            with safetensors.safe_open(self.folder / STATE_FILE, "numpy") as state:
                return {key: tuple(state.get_slice(key).get_shape()) for key in state.keys()}  # noqa: SIM118  # no mapping
        except (OSError, safetensors.SafetensorError) as problem:
            raise _damaged(self.folder, problem) from None


def _damaged(folder: Path, problem: Exception) -> EngineError:
    return EngineError(f"the task in {folder} is damaged: {problem}; add it again")


def _remedy(folder: Path) -> str:
    return f"add the task {folder.name!r} again"


def read_record(folder: Path) -> TaskRecord:
    """Read a task's record. Its state must exist with the recorded size, and is read later by :func:`load_version`.

    Raises:
        EngineError: record or state is missing, damaged or of a newer format.
    """
    values = _read_sealed(folder / TASK_RECORD, "task record")
    try:
        state = FileRecord(int(values["state"]["size"]), str(values["state"]["sha256"]))
        state.check_size(folder / STATE_FILE, _remedy(folder))
        labels, preprocess = tuple(values["labels"]), Preprocess.from_dict(values["preprocess"])
        return TaskRecord(folder.name, folder, values, str(values["version"]), labels, preprocess, state)
    except (KeyError, TypeError, ValueError, OSError) as problem:
        raise _damaged(folder, problem) from None


def load_version(folder: Path) -> tuple[EngineTask, str]:
    """Read a folded task, checked against its digests, and its version, computed from what was read.

    Raises:
        EngineError: the record or the state is missing, damaged or of a newer format.
    """
    record = read_record(folder)
    try:
        packed = (folder / STATE_FILE).read_bytes()
        record.state.check(folder / STATE_FILE, _remedy(folder), packed)
        state = safetensors.numpy.load(packed)
        given = {name: record.values[name] for name in ("settings", "source", "parity")}
    except (KeyError, OSError, safetensors.SafetensorError) as problem:
        raise _damaged(folder, problem) from None
    task = EngineTask(record.labels, record.preprocess, state, **given)
    return task, task._version(record.state.sha256)


def task_names(parent: Path) -> list[str]:
    """Sorted names of folders that hold a task or are about to; hidden folders are temporary and are skipped."""
    return sorted(one.name for one in visible(parent) if one.is_dir())


@dataclass(frozen=True)
class Scan:
    """Result of one scan of some tasks."""

    records: Mapping[str, TaskRecord]
    problems: Mapping[str, str] = field(default_factory=dict)
    """Reason in one line why a folder cannot be used, by task."""


def digest_of(engine: Path, name: str) -> str:
    """The version of a task in an engine folder; empty if it cannot be read."""
    try:
        return read_record(engine / TASKS / name).version
    except EngineError:
        return ""


_PLAIN = ("format", "precision", "bank_precision", "attention", "quantization", "opset", "details", "backbone",
          "method", "tools", "parity")  # fmt: skip
"""Fields of :class:`Manifest` that its file holds unchanged."""


@dataclass(frozen=True)
class Manifest:
    """Content of ``engine.json``: enough to refuse what does not fit, and to rebuild the PyTorch reference."""

    backbone: dict[str, Any]
    """Keys: name, image_size, weights, weights_source, fingerprint, mean, std, interpolation."""
    method: dict[str, Any]
    """Keys: name, settings (those of the traced model), graph_settings (those that every task must share)."""
    layout: Layout
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: dict[str, FileRecord]
    format: str
    precision: str
    tools: dict[str, str]
    bank_precision: str = "fp32"
    """Precision of the bank's tensors, see :data:`prompttune.export.layout.DTYPES`."""
    attention: str = "explicit"
    quantization: str | None = None
    baked: tuple[str, ...] | None = None
    """Tasks that are constants of the model, in the order of their rows; None if the bank is an input."""
    opset: int | None = None
    details: dict[str, Any] = field(default_factory=dict)
    """Details for the format's runtime."""
    parity: dict[str, Any] | None = None
    type_config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Holds the entry of the type of the tasks, see :meth:`prompttune.task_types.TaskType.to_config`."""

    @functools.cached_property
    def task_type(self) -> TaskType:
        """Type of the tasks, with the settings of the head of the traced model; read late, because it imports PyTorch.

        Raises:
            EngineError: this version does not know the type or one of its settings.
        """
        from prompttune.task_types import read_task_type

        try:
            return read_task_type(self.type_config)
        except (UsageError, KeyError, TypeError) as problem:
            raise EngineError(f"the engine's task type does not fit this prompttune: {problem}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "format_version": LATEST_VERSION if self.asks_many else self.task_type.format_version,
            **self.task_type.to_config(),
            "kind": "prompttune-engine",
            **{name: getattr(self, name) for name in _PLAIN},
            "baked": None if self.baked is None else list(self.baked),
            "inputs": [spec.to_dict() for spec in self.inputs],
            "outputs": [spec.to_dict() for spec in self.outputs],
            "state_layout": {key: list(shape) for key, shape in self.layout.items()},
            "files": {name: asdict(file) for name, file in self.files.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """The inverse of :meth:`to_dict`."""
        return cls(
            **{name: values[name] for name in _PLAIN},
            baked=None if values["baked"] is None else tuple(values["baked"]),
            layout={key: tuple(shape) for key, shape in values["state_layout"].items()},
            inputs=tuple(TensorSpec.from_dict(one) for one in values["inputs"]),
            outputs=tuple(TensorSpec.from_dict(one) for one in values["outputs"]),
            files={name: FileRecord(one["size"], one["sha256"]) for name, one in values["files"].items()},
            type_config=values,
        )

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        return int(self.backbone["image_size"])

    @property
    def sizes(self) -> Sizes:
        """What sizes the model takes."""
        return Sizes(self.details.get("profile", {}))

    def axes_of(self, shapes: Mapping[str, tuple[int, ...]], what: str) -> dict[str, int]:
        """Sizes of the named axes that a bank needs for a task's state of these shapes.

        Raises:
            EngineError: the state does not fit the layout, or is larger than the model takes; ``what`` names the task.
        """
        return self.form.checked(shapes, self.sizes, what)

    @property
    def form(self) -> BankForm:
        """How the states of its tasks lie in a bank."""
        return BankForm(self.layout, any(spec.name == CLASS_ROWS for spec in self.inputs))

    @property
    def only_reads(self) -> bool:
        """Whether the tasks of an image only read what the backbone computed for it, so that more cost little."""
        return bool(self.method.get("only_reads", False))

    @property
    def asks_many(self) -> bool:
        """Whether the model answers several tasks for an image, ``task_index`` [B, K]; models of format version 2 and
        earlier answer one."""
        return any(spec.name == TASK_INDEX and len(spec.shape) == 2 for spec in self.inputs)


class EngineFolder:
    """An engine on disk. Opening it checks the manifest and, with ``verify``, the model's digests.

    Raises:
        EngineError: the engine does not exist, is damaged, or is of a newer format.
    """

    def __init__(self, path: str | Path, verify: bool = True) -> None:
        self.path = Path(path)
        values = _read_sealed(self.path / MANIFEST, "engine manifest")
        try:
            self.manifest = Manifest.from_dict(values)
        except (KeyError, TypeError, AttributeError) as problem:
            raise EngineError(f"the engine manifest {self.path / MANIFEST} lacks a part: {problem}") from None
        if self.manifest.format == "onnx-adapter":
            raise EngineError(f"{self.path} has the removed format onnx-adapter: export it again with --format onnx")
        if verify:
            self.check()

    def check(self) -> None:
        """Raise :class:`EngineError` unless the model's files have their recorded digests."""
        for name, file in self.manifest.files.items():
            file.check(self.path / name, "export the engine again")

    def tasks(self, most: int | None = None) -> list[str]:
        """Sorted names of the tasks in the folder, including damaged ones; with ``most``, any that many of them."""
        found = visible(self.path / TASKS)
        names = (one.name for one in found if _TASK_NAME.fullmatch(one.name) and one.is_dir())
        return sorted(itertools.islice(names, most))

    def task_folder(self, name: str) -> Path:
        """Folder of a task, also one with an invalid name, so that it can be removed.

        Raises:
            UsageError: the engine does not have this task.
        """
        folder = self.path / TASKS / str(name)
        if str(name).startswith(".") or folder.name != name or not folder.is_dir():
            choose("task", name, task_names(self.path / TASKS))
        return folder

    def load_task(self, name: str) -> tuple[EngineTask, str]:
        """Read a task and its version, checked against its digests and the engine's layout.

        Raises:
            UsageError: the engine does not have this task.
            EngineError: the task is damaged or does not fit.
        """
        task, version = load_version(self.task_folder(name))
        self.manifest.axes_of(task.shapes(), f"task {name!r}")
        return task, version

    def read_task(self, name: str) -> EngineTask:
        """Read one task; see :meth:`load_task`."""
        return self.load_task(name)[0]

    def read_some(self, count: int, besides: str) -> dict[str, EngineTask]:
        """The first ``count`` readable tasks, without ``besides``."""
        some: dict[str, EngineTask] = {}
        for name in self.tasks():
            if len(some) == count:
                break
            if name != besides:
                with contextlib.suppress(PrompttuneError):
                    some[name] = self.read_task(name)
        return some

    def scan(
        self, verify: bool = False, on_task: Callable[[], None] = lambda: None, only: Collection[str] | None = None
    ) -> Scan:
        """Check every task; a task that cannot be used is reported and does not hide the others.

        Args:
            only: names to check; None for all.
            verify: whether to read the states too, and check them against their digests and the engine's layout.
            on_task: called after each task.
        """
        records, problems, parent = {}, {}, self.path / TASKS
        for name in task_names(self.path / TASKS):
            if only is not None and name not in only:
                continue
            try:
                records[check_task_name(name)] = read_record(parent / name)
                if verify:
                    self.load_task(name)
            except PrompttuneError as problem:
                records.pop(name, None)
                problems[name] = str(problem)
            on_task()
        return Scan(records, problems)

    def write_task(self, name: str, task: EngineTask, replace: bool = False) -> None:
        """Put a task into the folder; a reader sees either the old or the new one, never a part.

        Raises:
            UsageError: the name is invalid, or is taken and ``replace`` is not set.
            EngineError: the state does not fit the engine's layout.
        """
        with self.locked():
            self.check_free(name, replace)
            self.manifest.axes_of(task.shapes(), f"task {name!r}")
            with replacing_folder(self.path / TASKS / name) as temporary:
                save_task(task, temporary)
                count_version(self.path, name, task.version, digest_of(self.path, name))

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Keep other writers away from the folder until the block ends: see :func:`prompttune.files.locked`."""
        return locked(self.path, again=True)

    def check_free(self, name: str, replace: bool) -> None:
        """Raise :class:`UsageError` unless a task may be written under ``name``."""
        self.check_open()
        if (self.path / TASKS / check_task_name(name)).exists() and not replace:
            raise UsageError(f"the engine already has a task {name!r}: choose another name or replace it (--replace)")

    def check_open(self) -> None:
        """Raise :class:`UsageError` if the tasks are constants of the model."""
        if self.manifest.baked is not None:
            raise UsageError(
                f"the tasks of {self.path} are baked into its model: export it again with the tasks that you want"
            )

    def remove_task(self, name: str) -> None:
        """Remove a task from the folder.

        Raises:
            UsageError: the task does not exist.
        """
        self.check_open()
        with self.locked():
            folder = self.task_folder(name)
            if digest := digest_of(self.path, name):
                count_version(self.path, name, digest, digest)
            aside = Path(tempfile.mkdtemp(".part", f".{name}.", folder.parent))
            folder.replace(aside / name)  # the rename is atomic, deleting file by file is not
            shutil.rmtree(aside)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write ``engine.json`` into the engine folder ``path``."""
    write_json(path / MANIFEST, _sealed(manifest.to_dict()))
