"""A task's metadata in the protocol: its tensors, its labels, how an image becomes its input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from prompttune.export.folder import Manifest, TaskRecord
from prompttune.serve.messages import PANEL, ModelMetadata, TensorMetadata

PLATFORM = "prompttune"


def task_metadata(manifest: Manifest, record: TaskRecord, number: int) -> ModelMetadata:
    """Metadata of one task; ``number`` is its version."""
    return ModelMetadata(
        record.name,
        [str(number)],
        PLATFORM,
        [_image(manifest)],
        _outputs(len(record.labels)),
        record.labels,
        {
            **_parameters(manifest),
            "task_version": record.version,
            "preprocess": json.dumps(record.preprocess.to_dict()),
        },
    )


def several_metadata(manifest: Manifest, name: str, number: int) -> ModelMetadata:
    """Metadata of :data:`~prompttune.serve.messages.MIXED` or :data:`PANEL`."""
    parameters, outputs = _parameters(manifest), _outputs(-1)
    task = TensorMetadata("task", "BYTES", (-1, 1))
    if name == PANEL:
        task = TensorMetadata("tasks", "BYTES", (-1, -1))
        parameters["tasks.BYTES"] = "[N, K], or [K] for all images: names of tasks; empty or left out for all tasks"
        outputs = [replace(one, shape=(-1, *one.shape)) for one in outputs]
    return ModelMetadata(name, [str(number)], PLATFORM, [_image(manifest), task], outputs, [], parameters)


def _image(manifest: Manifest) -> TensorMetadata:
    size = manifest.image_size
    return TensorMetadata("image", "FP32", (-1, 3, size, size))


def _outputs(classes: int) -> Sequence[TensorMetadata]:
    return (
        TensorMetadata("logits", "FP32", (-1, classes)),
        TensorMetadata("probabilities", "FP32", (-1, classes)),
        TensorMetadata("label", "BYTES", (-1, -1)),
        TensorMetadata("score", "FP32", (-1, -1)),
        TensorMetadata("task", "BYTES", (-1,)),
        TensorMetadata("task_version", "BYTES", (-1,)),
    )


def _parameters(manifest: Manifest) -> dict[str, str]:
    return {
        "image.UINT8": "[N, H, W, 3]: RGB of any size, resized by the task's transform",
        "image.BYTES": "[N]: JPEG, PNG or WebP files; base64 in JSON",
        "method": str(manifest.method["name"]),
        "backbone": str(manifest.backbone["name"]),
    }
