"""A model repository of NVIDIA's Triton Inference Server around an engine.

::

    models/
      prompttune/
        config.pbtxt       written through Triton's own protobuf class
        labels.txt         class names, where all tasks share them
        1/                 the engine folder: Triton finds its model.onnx or model.plan under the names it expects

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_repository.html
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompttune.errors import MissingExtraError, UsageError, choose
from prompttune.export.build import check_output, export_engine
from prompttune.export.folder import MANIFEST, ONNX_FILE, EngineFolder, EngineTask, Manifest
from prompttune.export.formats import ExportSettings
from prompttune.export.layout import ASKED, BATCH, LOGITS, TensorSpec
from prompttune.export.runtimes import RuntimeOptions
from prompttune.export.runtimes.tensorrt import PLAN_FILE
from prompttune.export.tasks import Checkpoints, check_fit, name_checkpoints
from prompttune.files import locked, replacing_folder, write_text
from prompttune.settings import setting, settle

CONFIG_FILE, LABELS_FILE = "config.pbtxt", "labels.txt"
VERSION = "1"
"""Name of the folder that holds the engine; Triton counts a model's versions."""
MAX_BATCH_SIZE = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
BACKENDS = {
    "onnx": ("onnxruntime_onnx", "onnxruntime", ONNX_FILE),
    "trt": ("tensorrt_plan", "tensorrt", PLAN_FILE),
}
"""Triton's platform and backend, and the model file, by format of the engine."""
DATA_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "int64": "TYPE_INT64"}
"""Triton's data type by numpy dtype."""
_BACKBONE = ("name", "image_size", "fingerprint", "mean", "std", "interpolation")
"""Facts about the backbone that clients may know; the place of its weights is not one of them."""


@dataclass(frozen=True)
class TritonSettings:
    """Settings of the model in Triton."""

    name: str = setting(
        "prompttune", "Triton: name of the model, and of its folder in the repository.", option="model_name",
        metavar="NAME",
    )  # fmt: skip
    bank_inputs: bool = setting(
        False, "Triton: each request carries its tasks, and requests are not batched; by default the tasks are baked "
        "into the model.",
    )  # fmt: skip
    max_batch_size: int | None = setting(
        None, "Triton: largest number of images per call.", low=1, shown="64; for a plan, the largest of its axis batch"
    )
    max_delay_ms: float = setting(1.0, "Triton: longest wait of a request for others to join its batch.", low=0)

    def __post_init__(self) -> None:
        settle(self)

    def check(self, model: ExportSettings) -> None:
        """Raise at once, before anything is loaded, if Triton could not serve such a model.

        Raises:
            UsageError: Triton could not serve the model; the message says what to choose instead.
            MissingExtraError: Triton's protobuf classes are not installed.
        """
        if not _NAME.fullmatch(self.name):
            raise UsageError(
                f"bad model name {self.name!r}: use letters, digits, '.', '_' and '-', first a letter or a digit"
            )
        choose("format of a Triton model", model.format, BACKENDS)
        if model.split:
            raise UsageError("Triton takes one graph: leave out split")
        if self.max_batch_size is not None and model.format == "trt":
            raise UsageError("a plan's largest batch is its profile's: give --axis batch=1:8:64 instead")
        if model.axes.get(BATCH, (1,))[0] > 1:
            raise UsageError("Triton also sends single images: let the axis batch start at 1")
        if self.bank_inputs:
            self._check_bank_inputs(model)
        bf16 = "bf16" in (model.precision, model.bank_precision)
        if model.format == "onnx" and (bf16 or "runtime" in model.options) and model.target == "cpu":
            raise UsageError(
                "Triton opens ONNX files in ONNX Runtime, without bf16 on a CPU: leave out bf16 and --runtime"
            )
        if importlib.util.find_spec("tritonclient") is None:
            raise MissingExtraError("tritonclient", "serve", "or export with --format onnx")

    def _check_bank_inputs(self, model: ExportSettings) -> None:
        if model.baked:
            raise UsageError("the tasks are either baked into the model or its inputs: leave out one of the two")
        if self.max_batch_size is not None:
            raise UsageError("requests that carry their own tasks are not batched: leave out the largest batch size")
        if model.format == "onnx" and model.bank_precision == "bf16":
            raise UsageError("Triton passes no bf16 tensors to ONNX Runtime: choose the bank precision fp16 or fp32")


def export_triton(
    checkpoints: Checkpoints,
    repository: str | Path,
    triton: TritonSettings | None = None,
    *,
    format: str | ExportSettings = "onnx",  # noqa: A002
    overwrite: bool = False,
    on_stage: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> EngineFolder:
    """Export some checkpoints as a model of a Triton repository; other models of the repository are not changed.

    The tasks are baked into the model unless ``triton`` says otherwise. The model appears only when it is complete and
    proven.

    Args:
        checkpoints: see :func:`export_engine`.
        repository: Triton's model folder; created if it is missing.
        triton: settings of the model in Triton.
        format: ``onnx`` or ``trt``, or settings with one of them.
        overwrite: whether to replace a model of that name.
        on_stage: called with each stage.
        **options: other arguments of :func:`export_engine`.

    Returns:
        The engine folder within the repository.

    Raises:
        MissingExtraError: Triton's protobuf classes are not installed.
        UsageError: Triton cannot serve such a model, or a model of that name exists.
        PrompttuneError: everything that :func:`export_engine` raises.
    """
    triton = triton or TritonSettings()
    settings = (format if isinstance(format, ExportSettings) else ExportSettings(format)).resolved()
    triton.check(settings)
    settings = dataclasses.replace(settings, baked=not triton.bank_inputs)
    folder = Path(repository) / triton.name
    named = name_checkpoints(checkpoints)
    _check_output(folder, overwrite)
    check_fit(named).task_type.refuse("triton")
    with locked(folder):
        _check_output(folder, overwrite)
        with replacing_folder(folder, CONFIG_FILE) as temporary:
            engine = export_engine(named, temporary / VERSION, format=settings, on_stage=on_stage, **options)
            on_stage("writing Triton's configuration")
            _describe(engine, settings, triton, temporary)
    return EngineFolder(folder / VERSION, verify=False)


def _check_output(folder: Path, overwrite: bool) -> None:
    check_output(folder, overwrite, f"{VERSION}/{MANIFEST}", "a model of prompttune", "model name")


def _describe(engine: EngineFolder, settings: ExportSettings, triton: TritonSettings, folder: Path) -> None:
    """Write the files next to the engine."""
    tasks = {name: engine.read_task(name) for name in engine.manifest.baked or engine.tasks()}
    gpu = RuntimeOptions(settings.target).cuda_index is not None
    labels = shared_labels(tasks)
    config = make_config(engine.manifest, tasks, triton, gpu, None if labels is None else LABELS_FILE)
    write_text(folder / CONFIG_FILE, as_text(config))
    if labels is not None:
        write_text(folder / LABELS_FILE, "\n".join(labels) + "\n")


def make_config(
    manifest: Manifest,
    tasks: Mapping[str, EngineTask],
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
    from tritonclient.grpc import model_config_pb2 as triton_config

    platform, backend, model_file = BACKENDS[manifest.format]
    batched = manifest.baked is not None
    outputs = [
        {
            "name": spec.name,
            "data_type": DATA_TYPES[spec.dtype],
            "dims": _dims(spec, batched),
            "label_filename": labels_file if spec.name == LOGITS else None,
        }
        for spec in manifest.outputs
    ]
    return triton_config.ModelConfig(
        name=triton.name,
        platform=platform,
        backend=backend,
        default_model_filename=model_file,
        input=[
            {"name": spec.name, "data_type": DATA_TYPES[spec.dtype], "dims": _dims(spec, batched)}
            for spec in manifest.inputs
        ],
        output=outputs,
        instance_group=[{"kind": "KIND_GPU" if gpu else "KIND_CPU", "count": 1}],
        model_warmup=[_warmup(manifest, tasks, batched)],
        parameters={name: {"string_value": value} for name, value in _parameters(manifest, tasks).items()},
        **(_batching(manifest, triton) if batched else {}),
    )


def as_text(config: Any) -> str:
    """The text form that Triton reads; equal messages give equal text."""
    from google.protobuf import text_format

    text: str = text_format.MessageToString(config, as_utf8=True)
    return text


def shared_labels(tasks: Mapping[str, EngineTask]) -> Sequence[str] | None:
    """The class names that all tasks share; None if they differ, because one file cannot tell tasks apart."""
    first, *others = (task.labels for task in tasks.values())
    return first if all(labels == first for labels in others) else None


def _dims(spec: TensorSpec, batched: bool) -> list[int]:
    """Sizes in Triton's form: those of one row if Triton batches, else all of them; -1 is any size."""
    sizes = spec.shape[1:] if batched else spec.shape
    return [-1 if isinstance(size, str) else size for size in sizes]


def _batching(manifest: Manifest, triton: TritonSettings) -> dict[str, Any]:
    """Let Triton batch requests. A bank lacks a batch axis, so requests that carry one are never combined."""
    delay = {"max_queue_delay_microseconds": round(triton.max_delay_ms * 1000)}
    if BATCH not in manifest.sizes.ranges:
        # ONNX Runtime is not tuned for a size, and Triton's own default is then to prefer the largest batch.
        return {"max_batch_size": triton.max_batch_size or MAX_BATCH_SIZE, "dynamic_batching": delay}
    _, likely, high = manifest.sizes.ranges[BATCH]
    return {
        "max_batch_size": high,
        "dynamic_batching": {**delay, "preferred_batch_size": sorted({likely, high})},
    }


def _warmup(manifest: Manifest, tasks: Mapping[str, EngineTask], batched: bool) -> dict[str, Any]:
    """Images of zeros, so that a model that cannot run is never ready and no client pays for the first run."""
    state = next(iter(tasks.values())).shapes()
    axes = {} if batched else manifest.form.needed_for_all([manifest.axes_of(state, "the warm-up")])
    sizes = manifest.sizes.holding({BATCH: 1, ASKED: 1, **axes}, "the warm-up")
    inputs = {}
    for spec in manifest.inputs:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
        dims = shape[1:] if batched else shape
        inputs[spec.name] = {"data_type": DATA_TYPES[spec.dtype], "dims": dims, "zero_data": True}
    return {"name": "zeros", "batch_size": sizes[BATCH] if batched else 1, "inputs": inputs}


def _parameters(manifest: Manifest, tasks: Mapping[str, EngineTask]) -> dict[str, str]:
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
