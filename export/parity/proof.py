"""Comparison of an engine's tasks with their references, and proof of tasks that enter an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from prompttune.backbones import Backbone
from prompttune.errors import ParityError
from prompttune.export.folder import EngineTask, Manifest
from prompttune.export.options import OnStage
from prompttune.export.parity.accuracy import Accuracy
from prompttune.export.parity.compare import (
    CHECKPOINT,
    STATE,
    Reference,
    Runner,
    checkpoint_reference,
    compare_mixed,
    compare_tasks,
    state_reference,
)
from prompttune.export.parity.gate import Gate
from prompttune.export.parity.invariance import check_neighbours, check_swaps
from prompttune.export.parity.measure import measure_accuracy
from prompttune.export.parity.report import ParityReport
from prompttune.export.parity.samples import Samples
from prompttune.export.runtimes import RuntimeOptions, StateRunner, open_runtime
from prompttune.export.tasks import Folded, engine_model, fold_checkpoint

MIXED_WITH = 7
"""Number of an engine's tasks that a new task is mixed with in its proof."""


def open_runner(
    folder: Path, manifest: Manifest, tasks: Mapping[str, EngineTask], options: RuntimeOptions | None = None
) -> StateRunner:
    """Open an engine folder's model with some tasks."""
    states = {name: task.state for name, task in tasks.items()}
    return StateRunner(open_runtime(folder, manifest, options), manifest, states)


def compare_engine(
    runner: Runner,
    references: Mapping[str, Reference],
    tasks: Mapping[str, EngineTask],
    samples: Samples,
    gate: Gate,
    *,
    others: Iterable[str] = (),
    limit: int | None = None,
    evaluate: bool = True,
    on_stage: OnStage = lambda _: None,
    **described: Any,
) -> ParityReport:
    """Compare tasks with references: alone, mixed and swapped, their images alone and in batches, and their accuracy.

    Args:
        runner: runs all of the tasks.
        references: references by name; the last one is that of mixed batches and of the accuracy.
        tasks: tasks to compare.
        samples: the images.
        gate: amount and thresholds of the comparison.
        others: names of tasks to mix them with.
        limit: largest number of images of each task for the accuracy.
        evaluate: whether to give all figures of both sides instead of the accuracy alone.
        on_stage: called with each stage.
        described: further fields of the report.
    """
    samples.check(tasks)
    drawn = {name: samples.draw(name, task, gate.images) for name, task in tasks.items()}
    images = {name: batch for name, (batch, _) in drawn.items()}
    against, answer = list(references.items())[-1]
    comparisons = compare_tasks(runner, references, images, gate.batch_sizes, gate.noise)
    together = {**images, **dict.fromkeys(others, next(iter(images.values())))}
    mixed, apart = compare_mixed(runner, answer, together, gate.batch_sizes, gate.noise, against)
    swaps = check_swaps(runner, together, gate.batch_sizes)
    neighbours = check_neighbours(runner, images, gate.batch_sizes, list(together))
    accuracies: list[Accuracy] = []
    for name in tasks:
        if samples.spec(name) is not None:
            on_stage(f"evaluating {name}")
            accuracy, whole = measure_accuracy(
                runner, answer, name, tasks, samples, gate, limit, against, evaluate=evaluate
            )
            accuracies += accuracy
            comparisons += whole if evaluate else []
    return ParityReport(
        runtime=runner.description,
        images={name: words for name, (_, words) in drawn.items()},
        comparisons=(*comparisons, *mixed),
        mixed_vs_single=apart,
        gate=gate,
        accuracy=tuple(accuracies),
        swaps=tuple(swaps),
        neighbours=tuple(neighbours),
        **described,
    )


def prove(
    runner: Runner,
    folded: Mapping[str, Folded],
    others: Mapping[str, EngineTask],
    manifest: Manifest,
    samples: Samples,
    gate: Gate,
) -> ParityReport:
    """Compare tasks with their checkpoints and with PyTorch on their folded states.

    Args:
        runner: runs all of the tasks.
        folded: tasks to prove.
        others: tasks to mix them with.
        manifest: manifest of the engine.
        samples: the images.
        gate: amount and thresholds of the comparison.
    """
    tasks = {name: one.task for name, one in folded.items()}
    models = {name: one.model for name, one in folded.items()}
    model = engine_model(manifest, next(iter(models.values())).backbone)
    references = {CHECKPOINT: checkpoint_reference(models), STATE: state_reference(model, {**tasks, **others})}
    return compare_engine(
        runner,
        references,
        tasks,
        samples,
        gate,
        others=others,
        limit=gate.images,
        evaluate=False,
        versions=manifest.tools,
    )


def require_passed(report: ParityReport, consequence: str) -> None:
    """Raise :class:`ParityError` with the first failure and ``consequence`` unless the report passed."""
    failures = report.failures
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise ParityError(f"{failures[0]}{more}; {consequence}")


def fold_proven(
    manifest: Manifest,
    name: str,
    checkpoint: str | Path,
    backbone: Backbone,
    others: Mapping[str, EngineTask],
    runner_of: Callable[[Mapping[str, EngineTask]], Runner],
    samples: Samples,
    gate: Gate | None,
) -> EngineTask:
    """Fold a checkpoint and prove it, alone and mixed with tasks that the engine already has.

    Args:
        manifest: manifest of the engine.
        name: name of the new task.
        checkpoint: the checkpoint folder.
        backbone: backbone of the engine.
        others: tasks of the engine, of which the first few are mixed in.
        runner_of: returns a runner of some tasks.
        samples: the images.
        gate: amount and thresholds of the comparison; None skips the proof.

    Returns:
        The task, with its parity report.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        EngineError: the task is larger than the engine takes.
        ParityError: the task does not answer as PyTorch does.
    """
    folded = fold_checkpoint(Path(checkpoint), backbone)
    manifest.axes_of(folded.task.shapes(), f"task {name!r}")
    if gate is None:
        return folded.task
    mixed_with = dict([(one, task) for one, task in others.items() if one != name][:MIXED_WITH])
    axes = [manifest.axes_of(task.shapes(), one) for one, task in {name: folded.task, **mixed_with}.items()]
    most = manifest.form.how_many(manifest.sizes, axes) - 1
    mixed_with = dict(list(mixed_with.items())[:most])
    runner = runner_of({name: folded.task, **mixed_with})
    report = prove(runner, {name: folded}, mixed_with, manifest, samples, gate)
    require_passed(report, f"task {name!r} was not added")
    return dataclasses.replace(folded.task, parity=report.to_dict())
