"""``config.pbtxt``, created and written with Triton's own protobuf message."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as triton_config

from prompttune.export.folder import ONNX_FILE, Manifest, Task
from prompttune.export.layout import BATCH, LOGITS, TASKS, TensorSpec
from prompttune.export.runtimes.tensorrt import PLAN_FILE
from prompttune.export.triton.settings import MAX_BATCH_SIZE, TritonSettings


@dataclass(frozen=True)
class Backend:
    """Triton's backend for a format's model file."""

    platform: str
    name: str
    model_file: str


BACKENDS = {
    "onnx": Backend("onnxruntime_onnx", "onnxruntime", ONNX_FILE),
    "trt": Backend("tensorrt_plan", "tensorrt", PLAN_FILE),
}
"""Backend by format of the engine."""

DATA_TYPES = {
    "float32": triton_config.TYPE_FP32,
    "float16": triton_config.TYPE_FP16,
    "bfloat16": triton_config.TYPE_BF16,
    "int64": triton_config.TYPE_INT64,
}
"""Triton's data type by numpy dtype."""
_BACKBONE = ("name", "image_size", "fingerprint", "mean", "std", "interpolation")
"""Facts about the backbone that clients may know; the place of its weights is not one of them."""


def make_config(
    manifest: Manifest,
    tasks: Mapping[str, Task],
    triton: TritonSettings,
    gpu: bool,
    labels_file: str | None = None,
) -> Any:
    """The ``ModelConfig`` of an engine.

    Args:
        manifest: manifest of the engine.
        tasks: tasks of the engine; for a baked engine, in the order of their rows.
        triton: settings of the model in Triton.
        gpu: whether the engine was proven on a GPU, and is therefore to run on one.
        labels_file: file with the class names of the logits.
    """
    backend = BACKENDS[manifest.format]
    batched = manifest.baked is not None
    kind = triton_config.ModelInstanceGroup.KIND_GPU if gpu else triton_config.ModelInstanceGroup.KIND_CPU
    config = triton_config.ModelConfig(
        name=triton.name,
        platform=backend.platform,
        backend=backend.name,
        default_model_filename=backend.model_file,
        input=[_input(spec, batched) for spec in manifest.inputs],
        output=[
            triton_config.ModelOutput(
                name=spec.name,
                data_type=DATA_TYPES[spec.dtype],
                dims=_dims(spec, batched),
                label_filename=labels_file if spec.name == LOGITS else None,
            )
            for spec in manifest.outputs
        ],
        instance_group=[triton_config.ModelInstanceGroup(kind=kind, count=1)],
        model_warmup=[_warmup(manifest, tasks, batched)],
    )
    if batched:
        _set_batching(config, manifest, triton)
    for name, value in _parameters(manifest, tasks).items():
        config.parameters[name].string_value = value
    return config


def as_text(config: Any) -> str:
    """The text form that Triton reads; equal messages give equal text."""
    text: str = text_format.MessageToString(config, as_utf8=True)
    return text


def shared_labels(tasks: Mapping[str, Task]) -> Sequence[str] | None:
    """The class names that all tasks share; None if they differ, because one file cannot tell tasks apart."""
    first, *others = (task.labels for task in tasks.values())
    return first if all(labels == first for labels in others) else None


def _dims(spec: TensorSpec, batched: bool) -> list[int]:
    """Sizes in Triton's form: those of one row if Triton batches, else all of them; -1 is any size."""
    sizes = spec.shape[1:] if batched else spec.shape
    return [-1 if isinstance(size, str) else size for size in sizes]


def _input(spec: TensorSpec, batched: bool) -> Any:
    dims = _dims(spec, batched)
    made = triton_config.ModelInput(name=spec.name, data_type=DATA_TYPES[spec.dtype], dims=dims or [1])
    if not dims:
        # Triton does not support tensors without sizes: clients send [N, 1], the model gets [N].
        made.reshape.SetInParent()
    return made


def _set_batching(config: Any, manifest: Manifest, triton: TritonSettings) -> None:
    """Let Triton batch requests. A bank lacks a batch axis, so requests that carry one are never combined."""
    profile = manifest.details.get("profile")
    config.max_batch_size = profile[BATCH][2] if profile else triton.max_batch_size or MAX_BATCH_SIZE
    config.dynamic_batching.max_queue_delay_microseconds = round(triton.max_delay_ms * 1000)
    if profile:
        # A plan is fastest at the size that it was tuned for. ONNX Runtime does not have such a size, and Triton's own
        # default is then to prefer the largest batch.
        config.dynamic_batching.preferred_batch_size.extend(sorted(set(profile[BATCH][1:])))


def _warmup(manifest: Manifest, tasks: Mapping[str, Task], batched: bool) -> Any:
    """Images of zeros, so that a model that cannot run is never ready and no client pays for the first run."""
    state = next(iter(tasks.values())).shapes()
    axes = {} if batched else manifest.axes_of(state, "the warm-up")
    sizes = manifest.sizes.holding({BATCH: 1, TASKS: 1}, "the warm-up") | axes
    warmup = triton_config.ModelWarmup(name="zeros", batch_size=sizes[BATCH] if batched else 1)
    for spec in manifest.inputs:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
        warmup.inputs[spec.name].MergeFrom(
            triton_config.ModelWarmup.Input(
                data_type=DATA_TYPES[spec.dtype], dims=(shape[1:] or [1]) if batched else shape, zero_data=True
            )
        )
    return warmup


def _parameters(manifest: Manifest, tasks: Mapping[str, Task]) -> dict[str, str]:
    """Facts that a client needs for its requests, as text and JSON; it gets them with the model's configuration."""
    rows = {name: row for row, name in enumerate(manifest.baked or ())}
    records = {
        name: {
            **({"index": rows[name]} if name in rows else {}),
            "version": task.version,
            "labels": task.labels,
            "preprocess": task.preprocess.to_dict(),
        }
        for name, task in tasks.items()
    }
    tools = manifest.tools | {name: manifest.details[name] for name in ("tensorrt",) if name in manifest.details}
    return {
        "tasks": json.dumps(records, ensure_ascii=False),
        "backbone": json.dumps({name: manifest.backbone[name] for name in _BACKBONE}),
        "method": str(manifest.method["name"]),
        "precision": manifest.precision,
        "bank_precision": manifest.bank_precision,
        "tools": json.dumps(tools),
    }
