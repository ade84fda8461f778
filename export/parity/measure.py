"""Evaluation of both sides on labelled images, in the pass that compares them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping

import torch

from prompttune.export.folder import EngineTask
from prompttune.export.parity.accuracy import OTHER_CLASSES, Accuracy, NotFinite, Sides, both_sides
from prompttune.export.parity.compare import Reference, Runner, tally_for
from prompttune.export.parity.figures import Comparison
from prompttune.export.parity.gate import Gate
from prompttune.export.parity.samples import Samples


def measure_accuracy(
    runner: Runner,
    reference: Reference,
    name: str,
    tasks: Mapping[str, EngineTask],
    samples: Samples,
    gate: Gate,
    limit: int | None,
    against: str,
    evaluate: bool = False,
) -> tuple[list[Accuracy], list[Comparison]]:
    """The task ``name`` over its labelled validation images, read once: how right both sides are, how far apart.

    Args:
        runner: the engine.
        reference: what it is held to.
        name: the task.
        tasks: name → task.
        samples: images.
        gate: gives the batch size, the largest of the comparison, and the noise of ties.
        limit: at most so many images, evenly spread.
        against: the reference's name.
        evaluate: give all figures of both sides, not top-1 alone.

    Returns:
        One of each; none of them for a task without data.

    Raises:
        DataError: none of the images can be read.
    """
    task, spec = tasks[name], samples.spec(name)
    source = samples.images(name, task)
    if spec is None or source is None:
        return [], []
    kind, matched = samples.task_type, source.matched and source.matched[0]
    size, bad, tally, count = max(gate.batch_sizes), NotFinite(), None, 0
    unseen = 0 if matched is None else matched.unseen
    sides = (kind.scores(task.num_classes, unseen), kind.scores(task.num_classes, unseen))
    with contextlib.closing(both_sides(runner, reference, name, task, spec, source, size, limit)) as batches:
        for indices, targets, expected, found in batches:
            tally = tally or tally_for(expected, gate.noise)
            tally.add(expected, found)
            bad.add(found, indices, source)
            if matched is not None:
                seen = torch.stack([torch.as_tensor(target) for target in targets])
                for side, logits in zip(sides, (found, expected), strict=True):
                    side.add(torch.tensor(logits), seen)
            count += len(indices)
    assert tally is not None  # both_sides refuses data without a readable image
    comparison, metric = tally.result(name, against, size), kind.measures
    accuracy = Accuracy(
        name, spec, count, not_finite=bad.count, not_finite_images=tuple(bad.images), metric=metric.score_title
    )
    if matched is None:
        return [dataclasses.replace(accuracy, skipped=OTHER_CLASSES)], [comparison]
    ours, theirs = (side.result(matched.labels) for side in sides)
    accuracy = dataclasses.replace(
        accuracy, engine=getattr(ours, metric.score), reference=getattr(theirs, metric.score)
    )
    if evaluate:
        notes = (f"{count} images are scored: {source.what}", *ours.notes)
        accuracy = dataclasses.replace(accuracy, evaluation=Sides(ours, theirs), notes=notes)
    return [accuracy], [comparison]
