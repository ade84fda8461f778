"""The quickest runtime of an ONNX engine on this machine."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from prompttune.errors import UsageError
from prompttune.export.folder import EngineFolder, Manifest
from prompttune.export.parity.validate import validate_engine
from prompttune.export.runtimes import RuntimeOptions
from prompttune.export.runtimes.choice import ONNXRUNTIME, OPENVINO, has_openvino, remember, takes_onnxruntime
from prompttune.serve.bench.report import Measurement

IMAGES = 8
"""Number of images of each task for the comparison of a runtime that the export was not compared in."""


def runtimes_of(manifest: Manifest, options: RuntimeOptions) -> tuple[str, ...]:
    """The installed runtimes that take the engine.

    Raises:
        UsageError: the engine has one runtime only.
    """
    if manifest.format != "onnx" or options.cuda_index is not None:
        raise UsageError("runtimes are compared for ONNX engines on the cpu")
    exists = {ONNXRUNTIME: takes_onnxruntime(manifest), OPENVINO: has_openvino() and "parts" not in manifest.details}
    return tuple(name for name, has in exists.items() if has)


def remember_quickest(
    folder: EngineFolder, measurements: Iterable[Measurement], options: RuntimeOptions, weights: str | Path | None
) -> str:
    """Remember the quickest of the measured runtimes if it answers as PyTorch does; returns a line that says so.

    The quickest has the smallest geometric mean of the median times, over batch sizes and mixes.
    """
    logs: dict[str, list[float]] = defaultdict(list)
    for one in measurements:
        if one.subject in (ONNXRUNTIME, OPENVINO):
            logs[one.subject].append(math.log(one.latency.p50_ms))
    best, manifest = min(logs, key=lambda name: sum(logs[name])), folder.manifest
    if manifest.parity is None:
        return f"{best} is the quickest, and not remembered: the engine was exported without a comparison with PyTorch"
    if best != manifest.details.get("runtime", OPENVINO if ONNXRUNTIME not in logs else ONNXRUNTIME):
        runtime = replace(options, runtime=best)
        report = validate_engine(folder.path, weights=weights, options=runtime, images=IMAGES)
        if report.failures:
            return f"{best} is the quickest, and not remembered, as it differs from PyTorch: {report.failures[0]}"
    if not remember(folder.path, manifest, best):
        return f"{best} is the quickest, and not remembered: {folder.path} cannot be written to"
    return f"{best} is the quickest; auto uses it on this machine"
