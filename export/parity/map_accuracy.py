"""Mean IoU of both sides on images with masks, in the same pass that compares their logits."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from prompttune.evaluation.segmentation import PixelTally
from prompttune.export.folder import Task
from prompttune.export.parity.accuracy import OTHER_CLASSES, Accuracy, NotFinite, both_sides
from prompttune.export.parity.compare import Reference, Runner
from prompttune.export.parity.figures import Array, Comparison
from prompttune.export.parity.gate import Gate
from prompttune.export.parity.map_figures import MapTally
from prompttune.export.parity.samples import Labelled
from prompttune.images.transform import EvaluationTransform

METRIC = "mIoU"


def measure_maps(
    runner: Runner,
    reference: Reference,
    name: str,
    task: Task,
    spec: str,
    source: Labelled,
    gate: Gate,
    limit: int | None,
    against: str,
) -> tuple[list[Accuracy], list[Comparison]]:
    """The same as ``measure_accuracy`` for a segmentation, scored at the size of the model's input.

    Raises:
        DataError: every image is unreadable.
    """
    from prompttune.images.joint import NEAREST

    matched = source.matched
    unseen = 0 if matched is None else matched.unseen
    tally, size, bad = MapTally(gate.noise), max(gate.batch_sizes), NotFinite()
    sides, count = (PixelTally(task.num_classes, unseen), PixelTally(task.num_classes, unseen)), 0
    exact = EvaluationTransform(task.preprocess)
    with contextlib.closing(both_sides(runner, reference, name, task, spec, source, size, limit)) as batches:
        for indices, masks, expected, found in batches:
            tally.add(expected, found)
            bad.add(found, indices, source)
            if matched is not None:
                seen = torch.cat([exact.resized_with(torch.from_numpy(mask)[None], NEAREST) for mask in masks]).numpy()
                for side, logits in zip(sides, (found, expected), strict=True):
                    side.add(_classes(logits, task.preprocess.image_size), seen)
            count += len(indices)
    settings: dict[str, Any] = {"not_finite": bad.count, "not_finite_images": tuple(bad.images), "metric": METRIC}
    comparison = tally.result(name, against, size)
    if matched is None:
        return [Accuracy(name, spec, count, skipped=OTHER_CLASSES, **settings)], [comparison]
    ours, theirs = (side.result(matched.labels, with_loss=False) for side in sides)
    settings["notes"] = (f"{count} images are scored: {source.what}", *ours.notes)
    figures = {"engine": ours.to_dict(), "reference": theirs.to_dict()}
    accuracy = Accuracy(name, spec, count, engine=ours.miou, reference=theirs.miou, pixels=figures, **settings)
    return [accuracy], [comparison]


def _classes(logits: Array, side: int) -> np.ndarray[Any, Any]:
    """Class of each pixel [B, S, S] of logits [B, C, h, w]."""
    resized = F.interpolate(torch.tensor(logits), size=(side, side), mode="bilinear", align_corners=False)
    return resized.argmax(dim=1).numpy()
