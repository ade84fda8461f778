"""Subjects to time: an engine, the plain backbone in the same runtime, the same tasks in PyTorch."""

from __future__ import annotations

import itertools
import math
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prompttune.errors import UsageError
from prompttune.export.folder import EngineFolder, Manifest
from prompttune.export.layout import stack_states
from prompttune.export.precision.casting import exact_convolutions
from prompttune.export.runtimes import Array, RuntimeOptions
from prompttune.export.tasks import engine_backbone, engine_model
from prompttune.model import PromptModel
from prompttune.serve.bench.plain import PlainBackbone, export_plain, plain_settings
from prompttune.serve.engine import Engine

ENGINE, BACKBONE, TORCH = "engine", "backbone", "torch"
ONE, ALL = "one", "all"
MIXES = (ONE, ALL)
"""Every row for the same task; or rows that alternate between the resident tasks, each call continuing the last."""

Call = Callable[[], object]


def noise(batch_size: int, image_size: int, seed: int) -> Array:
    """Normalised images [B, 3, S, S] of seeded normal noise."""
    return np.random.default_rng(seed).standard_normal((batch_size, 3, image_size, image_size), dtype=np.float32)


def assignments(tasks: Sequence[str], batch_size: int, mix: str) -> list[list[str]]:
    """The tasks of the rows of successive calls, one list per call, until they repeat; empty without tasks."""
    if not tasks:
        return []
    if mix == ONE:
        return [[tasks[0]] * batch_size]
    rounds = math.lcm(len(tasks), batch_size)
    rows = list(itertools.islice(itertools.cycle(tasks), rounds))
    return [rows[start : start + batch_size] for start in range(0, rounds, batch_size)]


class Subject(ABC):
    """One side of a comparison. Images come from host memory, and answers go back there, on every device."""

    name: str
    """Short name, unique among the subjects."""
    tasks: list[str]
    """Tasks that rows alternate between; empty for a side without tasks."""
    image_size: int
    """Side of the square input, in pixels."""

    @abstractmethod
    def prepare(self) -> None:
        """Prepare everything that does not count as opening."""

    @abstractmethod
    def open(self) -> None:
        """Load the model and its tasks; this is timed."""

    @property
    @abstractmethod
    def description(self) -> str:
        """Description of the open subject."""

    @abstractmethod
    def call(self, images: Array, rows: Sequence[Sequence[str]]) -> Call:
        """A function that answers ``images`` [B, 3, S, S], each time with the next of the assignments ``rows``."""


class EngineSubject(Subject):
    """An engine folder, run by :class:`Engine`.

    Args:
        name: see :attr:`Subject.name`.
        path: the folder.
        options: device and threads.
        limit: largest number of its tasks to alternate between.

    Raises:
        EngineError: the folder does not hold an engine.
        UsageError: the engine does not have tasks.
    """

    def __init__(self, name: str, path: str | Path, options: RuntimeOptions, limit: int | None = None) -> None:
        self.name = name
        self.folder = EngineFolder(path, verify=False)
        self.tasks, self.image_size = self.folder.tasks()[:limit], self.folder.manifest.image_size
        if not self.tasks:
            raise UsageError(f"{path} has no tasks to measure: add one with prompttune tasks add")
        self._options = options
        self.engine: Engine

    def prepare(self) -> None:
        """Do nothing."""

    def open(self) -> None:
        """Open the folder and check its digests."""
        self.engine = Engine(self.folder.path, **vars(self._options))

    @property
    def description(self) -> str:
        """See :attr:`Subject.description`."""
        manifest = self.engine.folder.manifest
        return f"{manifest.method['name']} {manifest.format} {manifest.precision}, {self.engine.description}"

    def call(self, images: Array, rows: Sequence[Sequence[str]]) -> Call:
        """See :meth:`Subject.call`."""
        following = itertools.cycle(rows)
        return lambda: self.engine.logits(images, next(following))


class PlainSubject(Subject):
    """The engine's backbone without any task, see :mod:`prompttune.serve.bench.plain`."""

    name: str = BACKBONE

    def __init__(
        self, manifest: Manifest, options: RuntimeOptions, weights: str | Path | None, stack: ExitStack
    ) -> None:
        self.tasks, self.image_size = [], manifest.image_size
        self._manifest, self._options, self._weights = manifest, options, weights
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prompttune-bench-")))
        self._plain: PlainBackbone
        self._exported: Manifest

    def prepare(self) -> None:
        """Export the backbone into a temporary folder."""
        backbone = engine_backbone(self._manifest, self._weights)
        settings = plain_settings(self._manifest, self._options.device)
        self._exported = export_plain(self._manifest, backbone, settings, self._folder)

    def open(self) -> None:
        """See :meth:`Subject.open`."""
        self._plain = PlainBackbone(self._folder, self._exported, self._options)

    @property
    def description(self) -> str:
        """See :attr:`Subject.description`."""
        return self._plain.description

    def call(self, images: Array, rows: Sequence[Sequence[str]]) -> Call:  # noqa: ARG002
        """The same function for every assignment."""
        return lambda: self._plain.features(images)


class TorchSubject(Subject):
    """The engine's tasks in eager PyTorch, float32, through the model's own forward.

    Rows of one task share a state, as in an evaluation; mixed rows gather theirs, as in the exported graph.
    """

    name: str = TORCH

    def __init__(
        self, folder: EngineFolder, options: RuntimeOptions, weights: str | Path | None, limit: int | None = None
    ) -> None:
        self.tasks, self.image_size = folder.tasks()[:limit], folder.manifest.image_size
        self._folder, self._options, self._weights = folder, options, weights
        self._model: PromptModel
        self._bank: dict[str, Tensor]

    def prepare(self) -> None:
        """Do nothing."""

    def open(self) -> None:
        """Load the backbone and stack the tasks' states."""
        manifest, device = self._folder.manifest, self._options.device
        self._model = engine_model(manifest, engine_backbone(manifest, self._weights)).to(device)
        bank = stack_states(manifest.layout, [self._folder.read_task(name).state for name in self.tasks])
        self._bank = {key: torch.from_numpy(rows).to(device) for key, rows in bank.items()}

    @property
    def description(self) -> str:
        """See :attr:`Subject.description`."""
        return f"eager PyTorch {torch.__version__} fp32, {self._options.device}"

    def call(self, images: Array, rows: Sequence[Sequence[str]]) -> Call:
        """See :meth:`Subject.call`."""
        device, batch = self._options.device, torch.from_numpy(images)
        row_of = {name: row for row, name in enumerate(self.tasks)}
        # If all rows are alike, one row stands for all.
        indices = [[row_of[name] for name in (one if len({*one}) > 1 else one[:1])] for one in rows]
        following = itertools.cycle(torch.tensor(one, device=device) for one in indices)

        @torch.inference_mode()
        def run() -> object:
            index = next(following)
            state = {key: value.index_select(0, index) for key, value in self._bank.items()}
            with exact_convolutions(device != "cpu"):
                return self._model.forward_state(batch.to(device), state).logits.cpu().numpy()

        return run


def subject_of(
    against: str,
    folder: EngineFolder,
    options: RuntimeOptions,
    weights: str | Path | None,
    limit: int | None,
    stack: ExitStack,
    taken: Collection[str] = (),
) -> Subject:
    """The subject named by a word or a path: ``backbone``, ``torch`` or another engine's folder.

    Args:
        against: the word or the path.
        folder: the engine to compare with.
        options: device and threads.
        weights: source of the backbone's weights, if it differs from that of the export.
        limit: largest number of tasks to alternate between.
        stack: exit stack that removes the subject's temporary files.
        taken: names of other subjects; another engine gets the shortest end of its path that is not among them.

    Raises:
        UsageError: a path is neither a word nor a folder, or the other engine has no tasks.
        EngineError: a path does not hold an engine.
    """
    if against == BACKBONE:
        return PlainSubject(folder.manifest, options, weights, stack)
    if against == TORCH:
        return TorchSubject(folder, options, weights, limit)
    if not Path(against).is_dir():
        raise UsageError(f"nothing to compare with at {against!r}; give {BACKBONE}, {TORCH} or an engine folder")
    return EngineSubject(_short_name(Path(against), {*taken, ENGINE, BACKBONE, TORCH}), against, options, limit)


def _short_name(path: Path, taken: Collection[str]) -> str:
    """The shortest end of a path that is not taken."""
    parts = path.resolve().parts
    ends = ("/".join(parts[-length:]) for length in range(1, len(parts) + 1))
    return next((end for end in ends if end not in taken), str(path))
