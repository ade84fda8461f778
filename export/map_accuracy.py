"""Mean IoU of both sides on images with masks, in the same pass that compares their logits."""

from __future__ import annotations

import contextlib
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from prompttune.errors import DataError
from prompttune.evaluation.segmentation import PixelTally
from prompttune.export.accuracy import Accuracy, read_ahead
from prompttune.export.compare import Reference, Runner
from prompttune.export.figures import Array, Comparison
from prompttune.export.folder import Task
from prompttune.export.gate import Gate
from prompttune.export.map_figures import MapTally
from prompttune.transform import EvaluationTransform

METRIC = "mIoU"


def measure_maps(
    runner: Runner,
    reference: Reference,
    name: str,
    task: Task,
    spec: str,
    source: Any,
    gate: Gate,
    limit: int | None,
    against: str,
) -> tuple[list[Accuracy], list[Comparison]]:
    """As ``measure_accuracy``, for a segmentation: scored at the size of the model's input.

    Raises:
        DataError: none of the images can be read.
    """
    from prompttune.training.data.mask_transforms import NEAREST

    labelled = list(source.classes) == list(task.labels)
    total = len(source) if limit is None else min(limit, len(source))
    chosen = np.unique(np.linspace(0, len(source) - 1, total).astype(int)).tolist()
    tally, size, count, bad = MapTally(gate.noise), max(gate.batch_sizes), 0, []
    sides, exact = (PixelTally(task.num_classes), PixelTally(task.num_classes)), EvaluationTransform(task.preprocess)
    with contextlib.closing(read_ahead(source, task, chosen)) as images:
        while read := list(islice(images, size)):
            kept = [(index, image, mask) for index, image, mask in read if image is not None]
            if not kept:
                continue
            batch = np.stack([image for _, image, _ in kept])
            expected = reference(batch, name)
            found = np.array(runner.logits(batch, [name] * len(batch))[:, : task.num_classes])
            tally.add(expected, found)
            finite = np.isfinite(found).all(axis=(1, 2, 3))
            bad += [source.describe(kept[row][0]) for row in np.flatnonzero(~finite)]
            if labelled:
                masks = torch.cat([exact.resized_with(torch.from_numpy(mask)[None], NEAREST) for *_, mask in kept])
                for side, logits in zip(sides, (found, expected), strict=True):
                    side.add(_classes(logits, task.preprocess.image_size), masks.numpy())
            count += len(batch)
    if not count:
        raise DataError(f"none of the images chosen from {spec} can be read")
    settings: dict[str, Any] = {"not_finite": len(bad), "not_finite_images": tuple(bad[:10]), "metric": METRIC}
    comparison = tally.result(name, against, size)
    if not labelled:
        reason = "the classes of the data are not the task's labels"
        return [Accuracy(name, spec, count, skipped=reason, **settings)], [comparison]
    ours, theirs = (side.result(task.labels, with_loss=False) for side in sides)
    figures = {"engine": ours.to_dict(), "reference": theirs.to_dict()}
    accuracy = Accuracy(name, spec, count, engine=ours.miou, reference=theirs.miou, pixels=figures, **settings)
    return [accuracy], [comparison]


def _classes(logits: Array, side: int) -> np.ndarray[Any, Any]:
    """Class of each pixel [B, S, S] of logits [B, C, h, w]."""
    resized = F.interpolate(torch.from_numpy(logits), size=(side, side), mode="bilinear", align_corners=False)
    return resized.argmax(dim=1).numpy()
