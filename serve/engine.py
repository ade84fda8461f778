"""An engine, open for inference: any mix of its tasks in one call."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from prompttune.backbones import Backbone
from prompttune.errors import EngineError, UsageError, choose
from prompttune.export.folder import (
    STATE_FILE,
    TASKS,
    EngineFolder,
    EngineTask,
    TaskRecord,
    check_task_name,
    read_record,
)
from prompttune.export.layout import FLOAT32, bank_dtype, largest_axes
from prompttune.export.layout import TASKS as TASKS_AXIS
from prompttune.export.parity.gate import engine_gate
from prompttune.export.parity.proof import MIXED_WITH, fold_proven
from prompttune.export.parity.samples import Samples
from prompttune.export.runtimes import Array, RuntimeOptions, StateRunner, open_checked, open_runtime
from prompttune.export.tasks import Fit, check_fit, engine_backbone
from prompttune.images import ImageLike, open_image
from prompttune.images.preprocess import Preprocess
from prompttune.serve.answers import Score, likeliest
from prompttune.serve.bank import BakedBank, Bank, Entry, baked_entries
from prompttune.serve.limits import TOP_K
from prompttune.serve.masks import class_map

PIXELS = "or give pixels, uint8 [H, W, 3] in RGB"
EAGER = 64
"""Largest number of tasks that are loaded when an engine is opened."""
MEMORY = 2 << 30
"""Bytes for resident tasks, unless their number is given."""

Images = Tensor | NDArray[np.float32] | ImageLike | Sequence[ImageLike]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer for one row."""

    task: str
    task_version: str
    """Version of the task that gave the answer."""
    label: str
    probability: float
    top_k: tuple[Score, ...]
    """The likeliest classes, best first."""


@dataclasses.dataclass(frozen=True)
class TaskLogits:
    """Logits of a row, with their labels."""

    labels: Sequence[str]
    """Class names, in the order of ``logits``."""
    task_version: str
    """Version of the task that gave the answer."""
    logits: Array
    """float32 [C], C the task's own classes; for a segmentation [C, h, w]."""


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """The answer of a segmentation for one row."""

    task: str
    task_version: str
    """Version of the task that gave the answer."""
    labels: Sequence[str]
    """Class names, by index."""
    mask: NDArray[np.uint8]
    """Class index of each pixel of the model's input, [S, S]."""


Lists = Sequence[list[str] | tuple[str, ...]]
Tasks = str | Sequence[str] | Lists
"""A task for all images, a task for each, or several for each; one list of several is for all images."""
_Pair = tuple[int, int]
"""Number of an image, and of a task among those that it is asked about."""


class Engine:
    """An engine folder, open on a device. Every method may be called from any thread.

    Args:
        path: the engine folder.
        device: ``cpu``, ``cuda`` or ``cuda:INDEX``.
        threads: CPU threads of one operator; None for one per core.
        cuda_graph: whether to capture one CUDA graph for each batch size on a GPU and replay it.
        provider: ``tensorrt`` runs an ONNX engine in ONNX Runtime's TensorRT provider; None uses the device's own.
        cache: folder for the compiled engines of that provider and of OpenVINO, kept between runs.
        spin: whether CPU threads that wait for the next operator spin, see :class:`RuntimeOptions`.
        runtime: ``onnxruntime`` or ``openvino`` for an ONNX engine; ``auto`` chooses, see :class:`RuntimeOptions`.
        image_cache: MiB for the frozen work on images, see :class:`RuntimeOptions`.
        skip_unchanged: difference from one of the last images below which that work is reused, see there.
        verify: whether to check the model's digests first.
        tasks: tasks to answer for, with room for the largest of them from the start, so that an answer's last digits do
            not depend on which task was loaded first; None for all tasks of the folder.
        resident_tasks: largest number of tasks in memory; None for as many as fit in about :data:`MEMORY`. Up to
            :data:`EAGER` of them are loaded at once if they may all be resident. Otherwise a task is loaded on request
            and replaces the least recently used one.

    Raises:
        UsageError: a task does not exist.
        EngineError: the engine is missing or damaged, or the runtime cannot open it. A damaged task that is not among
            ``tasks`` is an error only when it is requested.
        MissingExtraError: the device needs an extra that is not installed.

    Example:
        >>> engine = Engine("engine")
        >>> engine.predict(["a.jpg", "b.jpg"], tasks=["digits", "shapes"])[0].label
        'three'
    """

    def __init__(
        self,
        path: str | Path,
        device: str = "cpu",
        *,
        threads: int | None = None,
        cuda_graph: bool = False,
        provider: str | None = None,
        cache: str | Path | None = None,
        spin: bool = True,
        runtime: str = "auto",
        image_cache: int = 0,
        skip_unchanged: float = 0.0,
        verify: bool = True,
        tasks: Sequence[str] | None = None,
        resident_tasks: int | None = None,
    ) -> None:
        if resident_tasks is not None and resident_tasks < 1:
            raise UsageError(f"resident_tasks must be at least 1, not {resident_tasks}")
        self.folder = EngineFolder(path, verify=False)
        self.device = device
        manifest = self.folder.manifest
        kept = None if cache is None else Path(cache)
        options = RuntimeOptions(
            device, threads, cuda_graph, provider, kept, spin, runtime, image_cache, skip_unchanged
        )
        if verify:
            self._runtime = open_checked(self.folder, options)
        else:
            self._runtime = open_runtime(self.folder.path, manifest, options)
        self._dtype = bank_dtype(manifest.bank_precision)
        self._unsaved: dict[str, tuple[EngineTask, str]] = {}
        """Tasks without a folder, which therefore cannot be loaded again."""
        self._bank: Bank
        if tasks is not None:
            self._names = set(tasks)
            for name in sorted(self._names):
                self.folder.task_folder(name)
        if manifest.baked is None:
            self._bank = self._open_bank(tasks is not None, resident_tasks)
        else:
            self._bank = BakedBank(baked_entries(manifest.baked, self.folder.scan(only=self._names).records))
        self._transforms: dict[Preprocess, Callable[[Image.Image], Tensor]] = {}
        self._backbone: Backbone | None = None

    @functools.cached_property
    def _names(self) -> set[str]:
        """The tasks that it answers for; a long list is read only when it is needed."""
        baked = self.folder.manifest.baked
        return set(self.folder.tasks() if baked is None else set(baked).intersection(self.folder.tasks()))

    def _open_bank(self, named: bool, resident_tasks: int | None) -> Bank:
        """The bank with its initial tasks; ``named`` tasks must all exist."""
        form = self.folder.manifest.form
        some = sorted(self._names) if named else self.folder.tasks(EAGER + 1)
        limit = self._runtime.sizes.most(TASKS_AXIS, resident_tasks or default_residents(self.folder, some))
        loaded: dict[str, tuple[EngineTask, str]] = {}
        axes: dict[str, int] = {}
        if len(some) <= EAGER:
            self._names = set(some)
        if len(some) <= min(limit, EAGER):
            for name in some:
                with contextlib.nullcontext() if named else contextlib.suppress(EngineError):
                    loaded[name] = self.folder.load_task(name)
        elif named:
            records = (read_record(self.folder.task_folder(name)) for name in some)
            axes = largest_axes(self.folder.manifest.axes_of(one.shapes, one.name) for one in records)
        tasks = {name: task for name, (task, _) in loaded.items()}
        versions = {name: version for name, (_, version) in loaded.items()}
        return Bank(self._runtime, form, tasks, self._dtype, axes=axes, limit=limit, versions=versions)

    def _load(self, name: str) -> tuple[EngineTask, str]:
        """Read a task that is not resident, with its version."""
        if name in self._unsaved:
            return self._unsaved[name]
        return self.folder.load_task(self._known(name))

    def _known(self, name: str) -> str:
        if "_names" not in self.__dict__:  # do not read a long list for one task
            self.folder.task_folder(name)
            return name
        return name if name in self._names else choose("task", name, self.tasks)

    @property
    def description(self) -> str:
        """Runtime, version and device, as text."""
        return self._runtime.description

    @property
    def bank(self) -> Bank:
        """The resident task states."""
        return self._bank

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        return self.folder.manifest.image_size

    @property
    def tasks(self) -> list[str]:
        """Sorted names of the tasks that it answers for, resident or not."""
        return sorted(self._names)

    def labels(self, task: str) -> list[str]:
        """Class names of a task, in the order of its logits.

        Raises:
            UsageError: the task does not exist.
        """
        return list(self._facts(task).labels)

    def preprocess(self, task: str) -> Preprocess:
        """The evaluation transform of a task, as settings."""
        return self._facts(task).preprocess

    def version(self, task: str) -> str:
        """The version of a task, a digest of everything that affects its answers."""
        entry = self._bank.entries.get(task)
        return self._facts(task).version if entry is None else entry.version

    def _facts(self, name: str) -> EngineTask | TaskRecord:
        """Record of a task, from memory or from its folder."""
        entry = self._bank.entries.get(name)
        if entry is not None:
            return entry.task
        if name in self._unsaved:
            return self._unsaved[name][0]
        return read_record(self.folder.task_folder(self._known(name)))

    # --------------------------------------------------------------- answering

    def logits(self, images: Tensor | NDArray[np.float32], tasks: Tasks) -> Array:
        """Raw logits.

        Args:
            images: normalised float32 [B, 3, S, S].
            tasks: a task name for each image, or one for all; lists of K tasks for each image, or one list for all.

        Returns:
            float32 [B, C], for lists of tasks [B, K, C], for a segmentation [..., C, h, w], with C the largest class
            count of ``tasks``; values past a row's own classes are -inf.

        Raises:
            UsageError: the shape, dtype, number of rows or task is wrong.
        """
        batch = self._batch(images)
        asked = _asked(tasks, len(batch))
        if len({len(row) for row in asked}) > 1:
            raise UsageError("logits() takes as many tasks for each image as for the others; call answer() for lists")
        answers = self._answered(asked, lambda rows, _: _some(batch, rows))
        widest = max(len(one.logits) for one in answers.values())
        whole = np.full((len(batch), len(asked[0]), widest, *answers[0, 0].logits.shape[1:]), -np.inf, np.float32)
        for pair, one in answers.items():
            whole[pair][: len(one.logits)] = one.logits
        return whole if _several(tasks) else whole[:, 0]

    @overload
    def answer(self, images: Tensor | NDArray[np.float32], tasks: str | Sequence[str]) -> list[TaskLogits]: ...

    @overload
    def answer(self, images: Tensor | NDArray[np.float32], tasks: Lists) -> list[list[TaskLogits]]: ...

    def answer(self, images: Tensor | NDArray[np.float32], tasks: Tasks) -> list[TaskLogits] | list[list[TaskLogits]]:
        """Each row's own logits, with the labels and the version of its task.

        Args:
            images: normalised float32 [B, 3, S, S].
            tasks: see :meth:`predict`.

        Returns:
            The logits of each image; for lists of tasks a list for each image, in the order of its tasks.

        Raises:
            UsageError: the shape, dtype, number of rows or task is wrong.
        """
        batch = self._batch(images)
        asked = _asked(tasks, len(batch))
        answers = self._answered(asked, lambda rows, _: _some(batch, rows))
        each = [[answers[image, number] for number in range(len(row))] for image, row in enumerate(asked)]
        return each if _several(tasks) else [one for (one,) in each]

    @overload
    def predict(self, images: Images, tasks: str | Sequence[str], top_k: int = TOP_K) -> list[Prediction]: ...

    @overload
    def predict(self, images: Images, tasks: Lists, top_k: int = TOP_K) -> list[list[Prediction]]: ...

    def predict(self, images: Images, tasks: Tasks, top_k: int = TOP_K) -> list[Prediction] | list[list[Prediction]]:
        """Classify images, each for its own tasks, in one call; the tasks of an image share its frozen work.

        Args:
            images: normalised float32 [B, 3, S, S]; or one image or a sequence of them, each a path, the bytes of an
                image file, a PIL image or RGB pixels (uint8 [H, W, 3]), which go through
                :func:`prompttune.read_image` and the evaluation transform of their task.
            tasks: a task name for each image, or one for all; lists of names, a list for each image or one for all.
            top_k: largest number of classes to return.

        Returns:
            A prediction for each image; for lists of tasks a list for each image, in the order of its tasks.

        Raises:
            UsageError: the shape, dtype, number of rows or task is wrong; or the tasks are segmentations.
            DataError: an image file cannot be read.
        """
        if top_k < 1:
            raise UsageError(f"top_k must be at least 1, not {top_k}")
        kind = self.folder.manifest.task_type
        kind.refuse("predict")
        predictions: list[list[Prediction]] = []
        for row in self._answers(images, tasks):
            predictions.append([])
            for name, one in row:
                scores = likeliest(kind.probabilities(one.logits), one.labels, top_k)
                best = scores[0]
                predictions[-1].append(Prediction(name, one.task_version, best.label, best.probability, scores))
        return predictions if _several(tasks) else [one for (one,) in predictions]

    def segment(self, images: Images, tasks: Tasks) -> list[Segmentation] | list[list[Segmentation]]:
        """Give each pixel of images a class, each image for its own tasks, in one call.

        Args:
            images: see :meth:`predict`.
            tasks: see :meth:`predict`.

        Raises:
            UsageError: the shape, dtype, number of rows or task is wrong; or the tasks are classifications.
            DataError: an image file cannot be read.
            EngineError: logits are not finite.
        """
        self.folder.manifest.task_type.refuse("segment")
        maps = [
            [
                Segmentation(name, one.task_version, one.labels, class_map(one.logits, self.image_size))
                for name, one in row
            ]
            for row in self._answers(images, tasks)
        ]
        return maps if _several(tasks) else [one for (one,) in maps]

    def _answers(self, images: Images, tasks: Tasks) -> list[list[tuple[str, TaskLogits]]]:
        """The tasks of each image, and their finite answers."""
        pixels = isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim < 4
        single = pixels or isinstance(images, (str, os.PathLike, bytes, Image.Image)) or hasattr(images, "read")
        rows: Tensor | NDArray[np.float32] | Sequence[ImageLike] = [images] if single else images  # type: ignore[list-item,assignment]
        asked = _asked(tasks, len(rows))

        if isinstance(rows, Tensor) or (isinstance(rows, np.ndarray) and rows.dtype != np.uint8):
            batch = self._batch(rows)
            answers = self._answered(asked, lambda some, _: _some(batch, some))
        else:
            given: NDArray[np.float32] | Sequence[ImageLike] = rows

            def prepare(some: Sequence[int], entries: Sequence[Entry]) -> Array:
                pairs = zip(some, entries, strict=True)
                return np.stack([self._prepared(given[row], entry) for row, entry in pairs])

            answers = self._answered(asked, prepare, by_transform=True)
        for (image, number), one in answers.items():
            if not np.isfinite(one.logits).all():
                raise EngineError(f"task {asked[image][number]!r} gave logits that are not finite")
        return [[(name, answers[image, number]) for number, name in enumerate(row)] for image, row in enumerate(asked)]

    def transform(self, preprocess: Preprocess) -> Callable[[Image.Image], Tensor]:
        """The evaluation transform of ``preprocess``, made once: from an RGB PIL image to normalised [3, S, S]."""
        if preprocess not in self._transforms:
            self._transforms[preprocess] = preprocess.transform()
        return self._transforms[preprocess]

    def _prepared(self, image: ImageLike, entry: Entry) -> Array:
        prepared: Array = self.transform(entry.task.preprocess)(open_image(image)).numpy()
        return prepared

    def _batch(self, images: Tensor | NDArray[np.float32]) -> Array:
        """Checked images, contiguous [B, 3, S, S]."""
        array = images.detach().cpu().numpy() if isinstance(images, Tensor) else images
        if not isinstance(array, np.ndarray):
            raise UsageError(f"images must be a tensor or an array, not {type(images).__name__}")
        size = self.image_size
        if array.ndim != 4 or array.shape[1:] != (3, size, size) or not len(array):
            shape = f"[B, 3, {size}, {size}] with B at least 1, not {list(array.shape)}"
            raise UsageError(f"images must be {shape}; {PIXELS}")
        if array.dtype != np.float32:
            raise UsageError(f"images must be float32 and normalised, not {array.dtype}; {PIXELS}")
        return np.ascontiguousarray(array)

    def _answered(
        self,
        asked: Sequence[Sequence[str]],
        images: Callable[[Sequence[int], Sequence[Entry]], Array],
        by_transform: bool = False,
    ) -> dict[_Pair, TaskLogits]:
        """The answer to every pair of an image and a task: in one call, or in more if the tasks exceed the resident
        limit.

        Args:
            asked: the tasks of each image.
            images: gives the batch of some images, each for a task whose entry does not change in the meantime.
            by_transform: whether the tasks of one row must share their evaluation transform.
        """
        waiting, found = list(dict.fromkeys(name for row in asked for name in row)), {}
        while waiting:
            with self._bank.lease(waiting, self._load) as snapshot:
                held = {name for name in waiting if name in snapshot.entries}
                waiting = [name for name in waiting if name not in held]
                rows: dict[tuple[int, Preprocess | None], list[_Pair]] = {}
                for image, row in enumerate(asked):
                    for number, name in enumerate(row):
                        if name in held:
                            transform = snapshot.entries[name].task.preprocess if by_transform else None
                            rows.setdefault((image, transform), []).append((image, number))
                for some in _of_similar_length(rows.values()):
                    tasks = [[asked[image][number] for image, number in pairs] for pairs in some]
                    entries = [snapshot.entries[row[0]] for row in tasks]
                    batch = images([pairs[0][0] for pairs in some], entries)
                    logits = self._runtime.logits(batch, snapshot.index(tasks, self._runtime.sizes), snapshot.placed)
                    for own, pairs in zip(logits, some, strict=True):
                        for scores, (image, number) in zip(own, pairs, strict=True):
                            entry = snapshot.entries[asked[image][number]]
                            kept = scores[: entry.task.num_classes]
                            found[image, number] = TaskLogits(entry.task.labels, entry.version, kept)
        return found

    # ------------------------------------------------------------------- tasks

    def add_task(
        self,
        name: str,
        checkpoint: str | Path,
        replace: bool = False,
        *,
        save: bool = True,
        parity: bool = True,
        weights: str | Path | None = None,
    ) -> None:
        """Fold a checkpoint into the engine. The graph is not changed, and calls continue in the meantime.

        The first call loads the backbone in PyTorch and keeps it for later calls.

        Args:
            name: name of the task.
            checkpoint: the checkpoint folder.
            replace: whether to replace a task of that name; calls see either the old or the new one.
            save: whether to also write the task into the engine folder, so that it exists after a restart.
            parity: whether to compare with PyTorch first, alone and mixed with resident tasks; a task that differs is
                not added.
            weights: source of the backbone's weights, if it differs from that of the export.

        Raises:
            UsageError: the name is taken or invalid.
            CheckpointError: the checkpoint is missing or damaged.
            EngineError: the checkpoint does not fit the engine.
            ParityError: the task's answers differ from PyTorch's.
        """
        self.folder.check_open()
        check_task_name(name)
        if name in self._names and not replace:
            raise UsageError(f"the engine already has a task {name!r}: choose another name or give replace=True")
        manifest = self.folder.manifest
        check_fit({name: Path(checkpoint)}, Fit.of_manifest(manifest))
        with self.folder.locked() if save else contextlib.nullcontext():
            if save:
                self.folder.check_free(name, replace)
            if self._backbone is None:
                self._backbone = engine_backbone(manifest, weights)
            task = fold_proven(
                manifest,
                name,
                checkpoint,
                self._backbone,
                (self._some_residents(name) or self.folder.read_some(MIXED_WITH, name)) if parity else {},
                lambda tasks: StateRunner(
                    self._runtime.without_graphs(), manifest, {name: task.state for name, task in tasks.items()}
                ),
                Samples(),
                engine_gate(manifest) if parity else None,
            )
            version = task.version
            if save:
                self.folder.write_task(name, task, replace)
                self._unsaved.pop(name, None)
            else:
                self._unsaved[name] = task, version
            self._bank.put(name, task, replace, version)
            self._names.add(name)

    def _some_residents(self, besides: str) -> dict[str, EngineTask]:
        """Copies of resident tasks, as many as a new one is mixed with, so that rows do not wait for the proof."""
        names = [name for name in self._bank.entries if name != besides][:MIXED_WITH]
        with self._bank.lease(names) as snapshot:
            held = {name: snapshot.entries[name].task for name in names if name in snapshot.entries}
            return {
                name: dataclasses.replace(task, state={key: np.array(value) for key, value in task.state.items()})
                for name, task in held.items()
            }

    def remove_task(self, name: str, *, save: bool = True) -> None:
        """Remove a task.

        Args:
            name: name of the task.
            save: whether to remove it from the engine folder as well.

        Raises:
            UsageError: the task does not exist.
        """
        self.folder.check_open()
        if name not in self._bank.entries:
            self._known(name)
        if save and (self.folder.path / TASKS / name).is_dir():
            self.folder.remove_task(name)
        self._names.discard(name)
        self._unsaved.pop(name, None)
        with contextlib.suppress(UsageError):  # the task is not resident
            self._bank.remove(name)


def _several(tasks: Tasks) -> bool:
    """Whether tasks are given as lists of several for each image."""
    return not isinstance(tasks, str) and any(not isinstance(one, str) for one in tasks)


def _asked(tasks: Tasks, images: int) -> list[list[str]]:
    """The task names of each image."""
    if isinstance(tasks, str):
        return [[tasks]] * images
    rows = [[one] if isinstance(one, str) else one for one in tasks]
    several = _several(tasks)
    if several:
        names = "give a list of at least one task name for each image, or one list for all"
        for one in tasks:
            if not isinstance(one, list | tuple) or not one or not all(isinstance(name, str) for name in one):
                raise UsageError(f"{names}, not {one!r}")
        rows = rows * images if len(rows) == 1 else rows
    if len(rows) != images:
        what, each = ("lists of tasks", "list") if several else ("tasks", "task")
        raise UsageError(f"{images} images but {len(rows)} {what}: give one {each} for each image, or one for all")
    return [[*row] for row in rows]


def _of_similar_length(rows: Iterable[list[_Pair]]) -> Iterable[list[list[_Pair]]]:
    """Rows whose lengths have the same next power of two, filled up with their own last pairs to the same length."""
    groups: dict[int, list[list[_Pair]]] = {}
    for pairs in rows:
        groups.setdefault((len(pairs) - 1).bit_length(), []).append(pairs)
    for some in groups.values():
        longest = max(map(len, some))
        yield [pairs + pairs[-1:] * (longest - len(pairs)) for pairs in some]


def _some(batch: Array, rows: Sequence[int]) -> Array:
    return batch if len(rows) == len(batch) else batch[list(rows)]


def default_residents(folder: EngineFolder, names: Iterable[str]) -> int:
    """Number of tasks that fit in about :data:`MEMORY`, by the size of the first; a plan may allow fewer."""
    states = (folder.path / TASKS / name / STATE_FILE for name in names)
    size = next((state.stat().st_size for state in states if state.is_file()), 1)
    itemsize = bank_dtype(folder.manifest.bank_precision).itemsize
    most = max(EAGER, MEMORY * FLOAT32.itemsize // (size * itemsize or 1))
    return max(1, folder.manifest.sizes.most(TASKS_AXIS, most + 1) - 1)  # a row is to spare for the next task
