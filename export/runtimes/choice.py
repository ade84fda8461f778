"""Which runtime opens an ONNX engine, and the quickest one of a machine, as ``prompttune bench`` has found it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import platform
from pathlib import Path
from typing import Any

from prompttune.errors import UsageError
from prompttune.export.folder import Manifest
from prompttune.export.options import RuntimeOptions
from prompttune.export.runtimes import processor
from prompttune.files import write_json

ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"
COMPILED = Path(".cache", "openvino")
"""Folder in an engine's folder for OpenVINO's compiled models, unless the options name another one."""
QUICKEST = Path(".cache", "quickest.json")
"""File in an engine's folder with the quickest runtime of each machine."""
_KIND = ("model", "model name", "cpu family", "flags", "CPU part", "Features")
"""Facts of a processor's kind, on x86 and ARM."""


def has_openvino() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec(OPENVINO) is not None


def takes_onnxruntime(manifest: Manifest) -> bool:
    """Whether ONNX Runtime runs an ONNX engine on a CPU: not bf16, nor int8 with the signed weights of OpenVINO."""
    signed = manifest.precision == "int8" and manifest.details.get("runtime") == OPENVINO
    return not signed and "bf16" not in (manifest.precision, manifest.bank_precision)


def runtime_of(folder: Path, manifest: Manifest, options: RuntimeOptions) -> str:
    """The runtime of an ONNX engine: the requested one, else the quickest known one, else the one of its export.

    Raises:
        UsageError: a runtime is requested for another format.
    """
    if manifest.format != "onnx":
        if options.runtime != "auto":
            raise UsageError(
                f"a runtime is chosen for ONNX engines alone, and {folder} has the format {manifest.format}"
            )
        return manifest.format
    if manifest.details.get("parts"):
        if options.runtime == OPENVINO:
            raise UsageError(
                "an engine in two parts runs in ONNX Runtime: leave out the runtime, or export without split"
            )
        return ONNXRUNTIME
    if options.runtime != "auto":
        return options.runtime
    if options.cuda_index is not None or options.provider is not None:
        return ONNXRUNTIME
    if not takes_onnxruntime(manifest):
        return OPENVINO
    wanted = quickest(folder, manifest) or manifest.details.get("runtime", ONNXRUNTIME)
    return OPENVINO if wanted == OPENVINO and has_openvino() else ONNXRUNTIME


def quickest(folder: Path, manifest: Manifest) -> str | None:
    """The quickest runtime of this engine on this machine, if it is known."""
    found = _read(folder).get(_machine(manifest))
    return found if found in (ONNXRUNTIME, OPENVINO) else None


def remember(folder: Path, manifest: Manifest, runtime: str) -> bool:
    """Remember the quickest runtime for this machine; returns whether the folder could be written to."""
    with contextlib.suppress(OSError):
        (folder / QUICKEST).parent.mkdir(exist_ok=True)
        write_json(folder / QUICKEST, {**_read(folder), _machine(manifest): runtime})
        return True
    return False


def _read(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        values = json.loads((folder / QUICKEST).read_text())
        return values if isinstance(values, dict) else {}
    return {}


def _machine(manifest: Manifest) -> str:
    """The engine's model, the kind of processor and its instruction sets, as a key."""
    known = {platform.machine(), *(record.sha256 for record in manifest.files.values())}
    known |= {f"{name}: {value}" for name, value in processor.facts() if name in _KIND}
    return hashlib.sha256("\n".join(sorted(known)).encode()).hexdigest()[:16]
