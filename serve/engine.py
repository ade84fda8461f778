"""An engine, open for inference: any mix of its tasks in one call."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from prompttune.backbones import Backbone
from prompttune.errors import EngineError, UsageError, choose
from prompttune.export.folder import EngineFolder, check_task_name
from prompttune.export.gate import engine_gate
from prompttune.export.layout import bank_dtype
from prompttune.export.proof import fold_proven
from prompttune.export.runtimes import Array, Runtime, RuntimeOptions, open_runtime
from prompttune.export.samples import Samples
from prompttune.export.tasks import Fit, check_fit, engine_backbone
from prompttune.images import ImageLike, open_image
from prompttune.preprocess import Preprocess
from prompttune.serve.answers import TOP_K, Score, likeliest, softmax
from prompttune.serve.bank import BakedBank, Bank, Entry, Snapshot
from prompttune.serve.masks import class_map

PIXELS = "or give pixels, uint8 [H, W, 3] in RGB"
Images = Tensor | NDArray[np.float32] | ImageLike | Sequence[ImageLike]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer for one row."""

    task: str
    task_version: str
    """The version of the task that gave the answer."""
    label: str
    probability: float
    top_k: tuple[Score, ...]
    """The likeliest classes, best first."""


@dataclasses.dataclass(frozen=True)
class TaskLogits:
    """A row's logits and what they mean."""

    labels: Sequence[str]
    """Class names, in the order of ``logits``."""
    task_version: str
    """The version of the task that gave the answer."""
    logits: Array
    """float32 [C], C the task's own classes; of a segmentation [C, h, w]."""


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """The answer of a segmentation for one row."""

    task: str
    task_version: str
    """The version of the task that gave the answer."""
    labels: Sequence[str]
    """Class names, by index."""
    mask: NDArray[np.uint8]
    """Class index of each pixel of the model's input, [S, S]."""


class Engine:
    """An engine folder, open on a device. Every method may be called from any thread.

    Args:
        path: the engine folder.
        device: ``cpu``, ``cuda`` or ``cuda:INDEX``.
        threads: CPU threads of one operator; None takes one for each core.
        cuda_graph: on a GPU, capture one CUDA graph for each batch size and replay it.
        provider: ``tensorrt`` runs an ONNX engine in ONNX Runtime's TensorRT provider; None takes the device's own.
        cache: folder for what that provider compiles, kept between runs.
        spin: let CPU threads that wait for the next operator spin, see :class:`RuntimeOptions`.
        verify: check the model's digests first.
        tasks: keep these tasks alone resident; None takes all.

    Raises:
        UsageError: there is no such task.
        EngineError: the engine is missing or damaged, or the runtime cannot open it.
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
        verify: bool = True,
        tasks: Sequence[str] | None = None,
    ) -> None:
        self.folder = EngineFolder(path, verify=verify)
        self.device = device
        manifest = self.folder.manifest
        options = RuntimeOptions(device, threads, cuda_graph, provider, None if cache is None else Path(cache), spin)
        self._runtime = open_runtime(self.folder.path, manifest, options)
        self._dtype = bank_dtype(manifest.bank_precision)
        names = self.folder.tasks() if tasks is None else dict.fromkeys(tasks)
        held = {name: self.folder.read_task(name) for name in names}
        self._bank: Bank | BakedBank
        if manifest.baked is None:
            self._bank = Bank(self._runtime, manifest.layout, held, self._dtype)
        else:
            self._bank = BakedBank(manifest.baked, held)
        self._transforms: dict[Preprocess, Callable[[Image.Image], Tensor]] = {}
        self._backbone: Backbone | None = None

    @property
    def description(self) -> str:
        """Runtime, version and device, in words."""
        return self._runtime.description

    @property
    def bank(self) -> Bank | BakedBank:
        """The resident task states."""
        return self._bank

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        return self.folder.manifest.image_size

    @property
    def tasks(self) -> list[str]:
        """Names of the resident tasks, sorted."""
        return sorted(self._bank.entries)

    def labels(self, task: str) -> list[str]:
        """Class names of a task, in the order of its logits.

        Raises:
            UsageError: there is no such task.
        """
        return list(self._entry(self._bank.entries, task).task.labels)

    def preprocess(self, task: str) -> Preprocess:
        """The evaluation transform of a task, as settings."""
        return self._entry(self._bank.entries, task).task.preprocess

    def version(self, task: str) -> str:
        """The resident version of a task, a digest of all that its answers depend on."""
        return self._entry(self._bank.entries, task).version

    @staticmethod
    def _entry(entries: Mapping[str, Entry], name: str) -> Entry:
        return entries[choose("task", name, entries)]

    # --------------------------------------------------------------- answering

    def logits(self, images: Tensor | NDArray[np.float32], tasks: str | Sequence[str]) -> Array:
        """Raw logits.

        Args:
            images: normalised float32 [B, 3, S, S].
            tasks: a task name for each row, or one for all.

        Returns:
            float32 [B, C], of a segmentation [B, C, h, w], with C the largest resident class count; what is past a
            row's own classes is -inf.

        Raises:
            UsageError: the wrong shape, dtype, number of rows or task.
        """
        batch = self._batch(images)
        names = _per_row(tasks, len(batch))
        with self._bank.lease() as snapshot:
            return self._run(batch, [self._entry(snapshot.entries, name) for name in names], snapshot)

    def answer(self, images: Tensor | NDArray[np.float32], tasks: Sequence[str]) -> list[TaskLogits]:
        """Each row's own logits, with the labels and the version of the task that gave them.

        Args:
            images: normalised float32 [B, 3, S, S].
            tasks: a task name for each row.

        Raises:
            UsageError: the wrong shape, dtype, number of rows or task.
        """
        batch = self._batch(images)
        names = _per_row(tasks, len(batch))
        with self._bank.lease() as snapshot:
            entries = [self._entry(snapshot.entries, name) for name in names]
            return _own(entries, self._run(batch, entries, snapshot))

    def predict(self, images: Images, tasks: str | Sequence[str], top_k: int = TOP_K) -> list[Prediction]:
        """Classify images, each for its own task, in one call.

        Args:
            images: normalised float32 [B, 3, S, S]; or one image or a sequence of them, each a path, the bytes of an
                image file, a PIL image or RGB pixels (uint8 [H, W, 3]), which go through
                :func:`prompttune.read_image` and the evaluation transform of their row's task.
            tasks: a task name for each row, or one for all.
            top_k: how many classes to return at most.

        Raises:
            UsageError: the wrong shape, dtype, number of rows or task; or the tasks are segmentations.
            DataError: an image file cannot be read.
        """
        if top_k < 1:
            raise UsageError(f"top_k must be at least 1, not {top_k}")
        if self.folder.manifest.segmentation is not None:
            raise UsageError("the engine's tasks are segmentations: call segment(), which gives a class to each pixel")
        names, answers = self._answers(images, tasks)
        return [_prediction(name, answer, top_k) for name, answer in zip(names, answers, strict=True)]

    def segment(self, images: Images, tasks: str | Sequence[str]) -> list[Segmentation]:
        """Give each pixel of images a class, each image for its own task, in one call.

        Args:
            images: as :meth:`predict` takes them.
            tasks: a task name for each row, or one for all.

        Raises:
            UsageError: the wrong shape, dtype, number of rows or task; or the tasks are classifications.
            DataError: an image file cannot be read.
            EngineError: logits are not finite.
        """
        if self.folder.manifest.segmentation is None:
            raise UsageError("the engine's tasks are classifications: call predict()")
        names, answers = self._answers(images, tasks)
        return [_segmentation(name, answer, self.image_size) for name, answer in zip(names, answers, strict=True)]

    def _answers(self, images: Images, tasks: str | Sequence[str]) -> tuple[list[str], list[TaskLogits]]:
        """The task of each row, and what it says."""
        pixels = isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim < 4
        single = pixels or isinstance(images, (str, os.PathLike, bytes, Image.Image)) or hasattr(images, "read")
        rows: Tensor | NDArray[np.float32] | Sequence[ImageLike] = [images] if single else images  # type: ignore[list-item,assignment]
        names = _per_row(tasks, len(rows))
        with self._bank.lease() as snapshot:
            entries = [self._entry(snapshot.entries, name) for name in names]
            if isinstance(rows, Tensor) or (isinstance(rows, np.ndarray) and rows.dtype != np.uint8):
                batch = self._batch(rows)
            else:
                batch = np.stack([self._prepare(row, entry) for row, entry in zip(rows, entries, strict=True)])
            return names, _own(entries, self._run(batch, entries, snapshot))

    def transform(self, preprocess: Preprocess) -> Callable[[Image.Image], Tensor]:
        """The evaluation transform of ``preprocess``, made once: RGB PIL image to normalised [3, S, S]."""
        if preprocess not in self._transforms:
            self._transforms[preprocess] = preprocess.transform()
        return self._transforms[preprocess]

    def _prepare(self, image: ImageLike, entry: Entry) -> Array:
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

    def _run(self, batch: Array, entries: Sequence[Entry], snapshot: Snapshot) -> Array:
        # Rows come from the snapshot's own entries, so none can be out of range: on a GPU that would be undefined.
        index = np.array([entry.row for entry in entries], dtype=np.int64)
        return self._runtime.run(batch, index, snapshot.placed)

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
        """Fold a checkpoint into the engine. The graph is not touched and calls go on meanwhile.

        The first call loads the backbone in PyTorch and keeps it for the next ones.

        Args:
            name: what to call the task.
            checkpoint: the checkpoint folder.
            replace: replace a task of that name; calls see the old one or the new one.
            save: write the task into the engine folder as well, so that it is there after a restart.
            parity: compare with PyTorch first, alone and mixed with resident tasks; a task that differs is not added.
            weights: where to take the backbone's weights from, if not from where the export took them.

        Raises:
            UsageError: the name is taken or bad.
            CheckpointError: the checkpoint is missing or damaged.
            EngineError: it does not fit the engine.
            ParityError: it does not answer as PyTorch does.
        """
        self.folder.check_open()
        check_task_name(name)
        if name in self._bank.entries and not replace:
            raise UsageError(f"the engine already has a task {name!r}: choose another name or give replace=True")
        if save:
            self.folder.check_free(name, replace)
        manifest = self.folder.manifest
        check_fit({name: Path(checkpoint)}, Fit.of_manifest(manifest))
        if self._backbone is None:
            self._backbone = engine_backbone(manifest, weights)
        with self._bank.lease() as snapshot:  # holds the rows of the tasks that the new one is mixed with
            task = fold_proven(
                manifest,
                name,
                checkpoint,
                self._backbone,
                {one: entry.task for one, entry in snapshot.entries.items()},
                lambda tasks: _Trial(self._runtime, Bank(self._runtime, manifest.layout, tasks, self._dtype)),
                Samples(),
                engine_gate(manifest) if parity else None,
            )
        if save:
            self.folder.write_task(name, task, replace)
        self._bank.put(name, task, replace)

    def remove_task(self, name: str, *, save: bool = True) -> None:
        """Take a task out.

        Args:
            name: the task.
            save: remove it from the engine folder as well.

        Raises:
            UsageError: there is no such task.
        """
        self.folder.check_open()
        self._bank.remove(name)
        if save and name in self.folder.tasks():
            self.folder.remove_task(name)


class _Trial:
    """Tasks that are not published yet, behind an engine's own runtime."""

    def __init__(self, runtime: Runtime, bank: Bank) -> None:
        self._runtime = runtime
        self._bank = bank

    @property
    def description(self) -> str:
        return self._runtime.description

    def logits(self, images: Array, tasks: Sequence[str]) -> Array:
        with self._bank.lease() as snapshot:
            index = np.array([snapshot.entries[task].row for task in tasks], dtype=np.int64)
            return self._runtime.run(np.ascontiguousarray(images), index, snapshot.placed)


def _per_row(tasks: str | Sequence[str], rows: int) -> list[str]:
    """A task name for each of ``rows`` rows."""
    names = [tasks] * rows if isinstance(tasks, str) else list(tasks)
    if len(names) != rows:
        raise UsageError(f"{rows} images but {len(names)} tasks: give one task for each image, or one for all")
    return names


def _own(entries: Sequence[Entry], logits: Array) -> list[TaskLogits]:
    """Rows of logits [B, C] without the columns past each row's own classes."""
    return [
        TaskLogits(entry.task.labels, entry.version, row[: entry.task.num_classes])
        for entry, row in zip(entries, logits, strict=True)
    ]


def _segmentation(name: str, answer: TaskLogits, side: int) -> Segmentation:
    if not np.isfinite(answer.logits).all():
        raise EngineError(f"task {name!r} gave logits that are not finite")
    return Segmentation(name, answer.task_version, answer.labels, class_map(answer.logits, side))


def _prediction(name: str, answer: TaskLogits, top_k: int) -> Prediction:
    if not np.isfinite(answer.logits).all():
        raise EngineError(f"task {name!r} gave logits that are not finite")
    scores = likeliest(softmax(answer.logits), answer.labels, top_k)
    return Prediction(name, answer.task_version, scores[0].label, scores[0].probability, scores)
