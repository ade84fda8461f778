"""Search for the place where an engine and PyTorch start to differ: intermediate results of both, block by block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from prompttune.errors import EngineError, UsageError, first_line
from prompttune.export.banks import stack_states
from prompttune.export.folder import ONNX_FILE, EngineTask, Manifest
from prompttune.export.layout import IMAGE, TASK_INDEX, bank_dtype, bank_input
from prompttune.export.parity.figures import Array
from prompttune.export.runtimes import RuntimeOptions
from prompttune.layers.probe import recording
from prompttune.model import PromptModel

IMAGES = 4
"""Number of a task's images whose intermediate results are compared."""
_PREFIX = "debug."


@dataclass(frozen=True)
class Probe:
    """One intermediate result of both sides."""

    name: str
    max_abs: float
    """Largest absolute difference of a value."""
    relative: float
    """Euclidean norm of the difference over the norm of PyTorch's result."""
    cosine: float


@dataclass(frozen=True)
class Bisection:
    """Intermediate results of one task, in the order of the computation."""

    task: str
    tolerance: float
    """Relative difference that rounding in the precision explains."""
    probes: tuple[Probe, ...]
    skipped: tuple[str, ...]
    """Results that the engine's file does not hold any more, or holds in another shape."""

    @property
    def first(self) -> str | None:
        """The first result beyond the tolerance."""
        return next((one.name for one in self.probes if not one.relative <= self.tolerance), None)

    @property
    def verdict(self) -> str:
        """The result in one line."""
        first = self.first
        if first is None:
            return f"task {self.task!r}: every intermediate result is within {self.tolerance:g} of PyTorch's"
        one = next(probe for probe in self.probes if probe.name == first)
        return (
            f"task {self.task!r}: the first intermediate result that diverges is {first}, by {one.relative:.2g} "
            f"of its norm (tolerance {self.tolerance:g})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "first": self.first, "verdict": self.verdict}


def check_probes(manifest: Manifest) -> dict[str, str]:
    """Name of the value in the engine's ONNX file for each intermediate result.

    Raises:
        UsageError: the engine is not an ONNX file, or does not name such values.
    """
    if manifest.format != "onnx":
        raise UsageError(
            f"an engine of the format {manifest.format} does not show its intermediate results: export the same "
            "settings with --format onnx and debug that engine"
        )
    if manifest.details.get("parts"):
        raise UsageError("an engine in two parts does not show its intermediate results: export it without split")
    probes = manifest.details.get("probes")
    if not probes:
        raise UsageError("the engine does not name its intermediate results: export it again")
    return dict(probes)


def bisect(
    folder: Path,
    manifest: Manifest,
    model: PromptModel,
    name: str,
    task: EngineTask,
    images: Array,
    tolerance: float,
    options: RuntimeOptions | None = None,
) -> Bisection:
    """Run one task in PyTorch and in the engine's ONNX file, and compare the intermediate results.

    ``images`` are normalised [N, 3, S, S], of which the first few are used; differences up to ``tolerance`` of a
    result's norm count as equal. The folder is not changed, and its weights are not copied.

    Raises:
        UsageError: see :func:`check_probes`.
        EngineError: ONNX Runtime cannot run the file with its intermediate results as outputs.
    """
    shown = np.ascontiguousarray(images[:IMAGES])
    expected = _torch_results(model, task, shown)
    found = _onnx_results(folder, manifest, name, task, shown, options or RuntimeOptions())
    probes, skipped = [], []
    for key, value in expected.items():
        if key in found and found[key].shape == value.shape:
            probes.append(_compare(key, value, found[key]))
        else:
            skipped.append(key)
    return Bisection(name, tolerance, tuple(probes), tuple(skipped))


def _compare(name: str, expected: Array, found: Array) -> Probe:
    left, right = expected.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = left - right
        apart, norm = float(np.linalg.norm(difference)), float(np.linalg.norm(left))
        product = norm * float(np.linalg.norm(right))
        relative = 0.0 if apart == 0 else apart / norm if norm else math.inf
        cosine = float(left @ right) / product if product else 1.0
    return Probe(name, float(np.abs(difference).max(initial=0.0)), relative, cosine)


def _torch_results(model: PromptModel, task: EngineTask, images: Array) -> dict[str, Array]:
    """Intermediate results of the eager forward; each row has its own state, as in the graph."""
    state = {
        key: torch.from_numpy(np.array(value)).expand(len(images), *value.shape[1:])
        for key, value in task.state.items()
    }
    with torch.no_grad(), recording() as recorded:
        model.forward_state(torch.from_numpy(images), state)
    return {name: value.float().numpy() for name, value in recorded.items()}


def _onnx_results(
    folder: Path, manifest: Manifest, name: str, task: EngineTask, images: Array, options: RuntimeOptions
) -> dict[str, Array]:
    """The intermediate results that the engine's file still holds, as float32."""
    from prompttune.export.runtimes.onnxruntime import open_session

    model = onnx.load(str(folder / ONNX_FILE), load_external_data=False)
    probes = _add_outputs(model, check_probes(manifest))
    try:
        session = open_session(folder, options, model)
        values = session.run_with_ort_values(
            [_PREFIX + probe for probe in probes], _feeds(manifest, name, task, images)
        )
    except Exception as problem:  # ONNX Runtime's errors share no base class below Exception
        words = f"ONNX Runtime cannot show the intermediate results of {folder}"
        raise EngineError(f"{words}: {first_line(problem)}") from None
    return {probe: value.numpy() for probe, value in zip(probes, values, strict=True)}


def _add_outputs(model: onnx.ModelProto, probes: Mapping[str, str]) -> list[str]:
    """Make values of a graph outputs, cast to float32; return the probes whose value the graph still computes."""
    held = {output for node in model.graph.node for output in node.output}
    present = [probe for probe, value in probes.items() if value in held]
    for probe in present:
        output = _PREFIX + probe
        model.graph.node.append(onnx.helper.make_node("Cast", [probes[probe]], [output], to=onnx.TensorProto.FLOAT))
        model.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    return present


def _feeds(manifest: Manifest, name: str, task: EngineTask, images: Array) -> dict[str, ort.OrtValue]:
    """Inputs of one call of the task ``name``: a bank with only this task, or its row in a baked-in bank."""
    if manifest.baked is not None:
        row = np.full((len(images), 1), manifest.baked.index(name), dtype=np.int64)
        return {IMAGE: _value(images), TASK_INDEX: _value(row if manifest.asks_many else row[:, 0])}
    bank = stack_states(manifest.form, [task.state], bank_dtype(manifest.bank_precision))
    index = bank.index([[0]] * len(images))
    if not manifest.asks_many:
        index = {TASK_INDEX: index[TASK_INDEX][:, 0]}
    feeds: dict[str, NDArray[Any]] = {
        IMAGE: images,
        **index,
        **{bank_input(key): rows for key, rows in bank.rows.items()},
    }
    return {key: _value(value) for key, value in feeds.items()}


def _value(array: NDArray[Any]) -> ort.OrtValue:
    if array.dtype == bank_dtype("bf16"):
        # ONNX Runtime accepts only NumPy's types: pass the bits with their element type.
        bits, kind = array.view(np.uint16), onnx.TensorProto.BFLOAT16
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, kind)
    return ort.OrtValue.ortvalue_from_numpy(array)
