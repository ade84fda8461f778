"""Subjects to time: an engine, the plain backbone in the same runtime, the same tasks in PyTorch."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from prompttune.errors import UsageError
from prompttune.export.banks import BankForm, stack_states
from prompttune.export.folder import EngineFolder, Manifest
from prompttune.export.layout import TASK_INDEX
from prompttune.export.precision.casting import exact_convolutions
from prompttune.export.runtimes import Array, RuntimeOptions, open_runtime
from prompttune.export.runtimes.choice import ONNXRUNTIME, OPENVINO, runtime_of
from prompttune.export.tasks import engine_backbone, engine_model
from prompttune.serve.bench.plain import export_plain, plain_settings
from prompttune.serve.bench.settings import ONE
from prompttune.serve.engine import Engine

ENGINE, BACKBONE, TORCH = "engine", "backbone", "torch"

Call = Callable[[], object]


def noise(batch_size: int, image_size: int, seed: int) -> Array:
    """Normalised images [B, 3, S, S] of seeded normal noise."""
    return np.random.default_rng(seed).standard_normal((batch_size, 3, image_size, image_size), dtype=np.float32)


def assignments(tasks: Sequence[str], batch_size: int, mix: str) -> list[list[str]]:
    """The tasks of the rows of successive calls, one list per call, until they repeat; one empty list without tasks."""
    if not tasks:
        return [[]]
    if mix == ONE:
        return [[tasks[0]] * batch_size]
    rounds = math.lcm(len(tasks), batch_size)
    rows = list(itertools.islice(itertools.cycle(tasks), rounds))
    return [rows[start : start + batch_size] for start in range(0, rounds, batch_size)]


@dataclass(frozen=True)
class OpenSubject:
    """A loaded side of a comparison."""

    description: str
    answer: Callable[[Array, list[str]], object]
    """Answers images [B, 3, S, S] for a task each. Images come from host memory, and answers go back there."""
    engine: Engine | None = None

    def call(self, images: Array, rows: Sequence[list[str]]) -> Call:
        """A function that answers ``images``, each time with the next of the assignments ``rows``."""
        following = itertools.cycle(rows)
        return lambda: self.answer(images, next(following))


@dataclass(frozen=True)
class BenchSubject:
    """One side of a comparison."""

    name: str
    """Short name, unique among the subjects."""
    tasks: list[str]
    """Tasks that rows alternate between; empty for a side without tasks."""
    image_size: int
    """Side of the square input, in pixels."""
    prepare: Callable[[], Callable[[], OpenSubject]]
    """Does what does not count as opening; returns the function that loads the model and its tasks, which is timed."""


def engine_subject(name: str, path: str | Path, options: RuntimeOptions, limit: int | None = None) -> BenchSubject:
    """An engine folder, run by :class:`Engine`; its digests are checked in the time of opening.

    Args:
        name: name of the subject.
        path: the folder.
        options: device and threads.
        limit: largest number of its tasks to alternate between.

    Raises:
        EngineError: the folder does not hold an engine.
        UsageError: the engine does not have tasks.
    """
    folder = EngineFolder(path, verify=False)
    if not (tasks := folder.tasks()[:limit]):
        raise UsageError(f"{path} has no tasks to measure: add one with prompttune tasks add")

    def load() -> OpenSubject:
        engine, made = Engine(folder.path, **vars(options)), folder.manifest
        words = f"{made.method['name']} {made.format} {made.precision}, {engine.description}"
        return OpenSubject(words, engine.logits, engine)

    return BenchSubject(name, tasks, folder.manifest.image_size, lambda: load)


def plain_subject(
    manifest: Manifest, options: RuntimeOptions, weights: str | Path | None, stack: ExitStack
) -> BenchSubject:
    """The engine's backbone without any task, see :mod:`prompttune.serve.bench.plain`."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prompttune-bench-")))

    def prepare() -> Callable[[], OpenSubject]:
        settings = plain_settings(manifest, options.device)
        exported = export_plain(manifest, engine_backbone(manifest, weights), settings, folder)

        def load() -> OpenSubject:
            runtime = open_runtime(folder, exported, options)
            return OpenSubject(
                f"plain {exported.format} {exported.precision}, {runtime.description}",
                lambda images, _: runtime.logits(images, {TASK_INDEX: np.zeros((len(images), 1), dtype=np.int64)}, {}),
            )

        return load

    return BenchSubject(BACKBONE, [], manifest.image_size, prepare)


def torch_subject(
    folder: EngineFolder, options: RuntimeOptions, weights: str | Path | None, limit: int | None = None
) -> BenchSubject:
    """The engine's tasks in eager PyTorch, float32, through the model's own forward.

    Rows of one task share a state, as in an evaluation; mixed rows gather theirs, as in the exported graph.
    """
    manifest, device, tasks = folder.manifest, options.device, folder.tasks()[:limit]
    row_of = {name: row for row, name in enumerate(tasks)}

    def load() -> OpenSubject:
        model = engine_model(manifest, engine_backbone(manifest, weights)).to(device)
        form = BankForm(manifest.layout, by_class=False)
        stacked = stack_states(form, [folder.read_task(name).state for name in tasks])
        bank = {key: torch.from_numpy(rows).to(device) for key, rows in stacked.rows.items()}

        @torch.inference_mode()
        def answer(images: Array, names: list[str]) -> object:
            distinct = names if len({*names}) > 1 else names[:1]  # one row stands for all that are alike
            index = torch.tensor([row_of[name] for name in distinct], device=device)
            state = {key: value.index_select(0, index) for key, value in bank.items()}
            with exact_convolutions(device != "cpu"):
                return model.forward_state(torch.from_numpy(images).to(device), state).logits.cpu().numpy()

        return OpenSubject(f"eager PyTorch {torch.__version__} fp32, {device}", answer)

    return BenchSubject(TORCH, tasks, manifest.image_size, lambda: load)


def subject_of(
    against: str,
    folder: EngineFolder,
    options: RuntimeOptions,
    weights: str | Path | None,
    limit: int | None,
    stack: ExitStack,
    taken: Collection[str] = (),
) -> BenchSubject:
    """The subject named by a word or a path: ``backbone``, ``torch``, a runtime or another engine's folder.

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
        if folder.manifest.format == "onnx":
            options = replace(options, runtime=runtime_of(folder.path, folder.manifest, options))
        return plain_subject(folder.manifest, options, weights, stack)
    if against in (ONNXRUNTIME, OPENVINO):
        return engine_subject(against, folder.path, replace(options, runtime=against), limit)
    if against == TORCH:
        return torch_subject(folder, options, weights, limit)
    if not Path(against).is_dir():
        raise UsageError(f"nothing to compare with at {against!r}; give {BACKBONE}, {TORCH} or an engine folder")
    parts = Path(against).resolve().parts
    ends = ("/".join(parts[-length:]) for length in range(1, len(parts) + 1))
    name = next((end for end in ends if end not in {*taken, ENGINE, BACKBONE, TORCH}), against)
    return engine_subject(name, against, options, limit)
