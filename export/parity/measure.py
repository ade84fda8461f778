"""Evaluation of both sides on labelled images, of classifications and segmentations, in the pass that compares them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping

from prompttune.evaluation.tally import Tally as ScoreTally
from prompttune.export.folder import Task
from prompttune.export.parity.accuracy import OTHER_CLASSES, Accuracy, NotFinite, Sides, both_sides
from prompttune.export.parity.compare import Reference, Runner
from prompttune.export.parity.figures import Comparison, Tally
from prompttune.export.parity.gate import Gate
from prompttune.export.parity.map_accuracy import measure_maps
from prompttune.export.parity.samples import Samples


def measure_accuracy(
    runner: Runner,
    reference: Reference,
    name: str,
    tasks: Mapping[str, Task],
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
    if samples.masks:
        return measure_maps(runner, reference, name, task, spec, source, gate, limit, against)
    matched = source.matched
    tally, size, bad = Tally(gate.noise), max(gate.batch_sizes), NotFinite()
    unseen = 0 if matched is None else matched.unseen
    sides, count = (ScoreTally(task.num_classes, unseen), ScoreTally(task.num_classes, unseen)), 0
    with contextlib.closing(both_sides(runner, reference, name, task, spec, source, size, limit)) as batches:
        for indices, targets, expected, found in batches:
            tally.add(expected, found)
            bad.add(found, indices, source)
            if matched is not None:
                for side, logits in zip(sides, (found, expected), strict=True):
                    side.add_logits(logits, targets)
            count += len(indices)
    comparison = tally.result(name, against, size)
    accuracy = Accuracy(name, spec, count, not_finite=bad.count, not_finite_images=tuple(bad.images))
    if matched is None:
        return [dataclasses.replace(accuracy, skipped=OTHER_CLASSES)], [comparison]
    ours, theirs = (side.result(matched.labels) for side in sides)
    whole = Sides(ours, theirs) if evaluate else None
    notes = (f"{count} images are scored: {source.what}", *ours.notes) if evaluate else ()
    accuracy = dataclasses.replace(accuracy, engine=ours.top1, reference=theirs.top1, evaluation=whole, notes=notes)
    return [accuracy], [comparison]
