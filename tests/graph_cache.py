"""ONNX graphs on disk for all processes of the tests: exporting them is what takes the time.

A graph is a function of the sources, the libraries, the backbone's weights, the method's settings and the precision;
the tensors of a task are its inputs. The first process that needs a graph exports it, every later export with the same
key copies the file, also one through the command line. ``make clean`` removes the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import pickle
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from prompttune.export.formats import BuildRequest
from prompttune.export.formats import onnx as onnx_format

ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch", "timm", "onnx", "onnxscript", "onnx-ir", "numpy")
LARGEST = 16 * 2**20
"""Bytes of a backbone above which a graph is not kept: each full-size one is exported once."""

UNUSED_S = 7200
"""Seconds after which the graphs of other sources are removed; until then another run may read them."""


class Pending:
    """A traced graph that is only traced when its file does not exist."""

    def __init__(self, key: str, trace: Callable[[], Any]) -> None:
        self.key = key
        self._trace = functools.cache(trace)
        self.known: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return self.known[name] if name in self.known else getattr(self._trace(), name)

    def traced(self) -> Any:
        return self._trace()


def install(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Take graphs for ONNX files from ``cache`` where it has them."""
    trace, export = BuildRequest.trace, onnx_format.export_onnx
    folder = cache / _sources()
    folder.mkdir(exist_ok=True)
    for other in cache.iterdir():
        if other != folder and other.stat().st_mtime < time.time() - UNUSED_S:
            shutil.rmtree(other, ignore_errors=True)

    def trace_later(request: BuildRequest, probes: bool = False, device: str = "cpu") -> Any:
        key = _key(request) if probes and device == "cpu" else None
        return Pending(key, lambda: trace(request, probes, device)) if key else trace(request, probes, device)

    def export_once(traced: Any, target: Path, opset: int = onnx_format.OPSET) -> dict[str, str]:
        if not isinstance(traced, Pending):
            return export(traced, target, opset)
        place = folder / f"{traced.key}-{opset}"
        os.utime(folder)
        with _locked(place.with_suffix(".lock")):
            if not place.is_dir():
                made = Path(tempfile.mkdtemp(dir=folder))
                probes = export(traced.traced(), made, opset)
                (made / "told").write_bytes(pickle.dumps((traced.inputs, traced.outputs, probes)))
                made.rename(place)
        for file in place.glob("model*"):
            shutil.copy(file, target)
        inputs, outputs, probes = pickle.loads((place / "told").read_bytes())
        traced.known = {"inputs": inputs, "outputs": outputs}
        return probes

    patch.setattr(BuildRequest, "trace", trace_later)
    patch.setattr(onnx_format, "export_onnx", export_once)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256(platform.python_version().encode())
    for name in LIBRARIES:
        digest.update(f"{name} {metadata.version(name)};".encode())
    models = [ROOT / "tests" / f"{kind}.py" for kind in ("convs", "evas", "swins")]
    for path in (*sorted((ROOT / "prompttune").rglob("*.py")), *sorted((ROOT / "export").rglob("*.py")), *models):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _key(request: BuildRequest) -> str | None:
    """The name of a graph; None for one that is not kept: a plugin's code is not among the sources."""
    model, settings = request.model, request.settings
    fixed = model.state_dict(keep_vars=True) | dict(model.named_buffers())
    fixed = {name: value for name, value in fixed.items() if name not in model.task_parameters()}
    parts = (*model.modules(), model.task_type, model.config)
    plugin = any(type(one).__module__.partition(".")[0] not in ("prompttune", "timm", "torch") for one in parts)
    if plugin or sum(value.nbytes for value in fixed.values()) > LARGEST:
        return None
    digest = hashlib.sha256()
    traced_in = "fp32" if settings.precision == "int8" else settings.precision  # and quantised afterwards
    for part in (
        model.backbone,
        model.backbone.name,
        type(model.method),
        type(model.head),
        model.task_type,
        sorted(model.config.to_dict().items()),
        model.state_layout(),
        model.levels,
        (traced_in, settings.bank_precision, settings.attention, settings.baked),
    ):
        digest.update(f"{part!r};".encode())
    for name, module in model.named_modules():  # such as the number of heads, which no printed module shows
        plain = sorted((key, value) for key, value in vars(module).items() if isinstance(value, int | float))
        digest.update(f"{name} {plain};".encode())
    for name, value in fixed.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if settings.baked:
        for task, state in request.states.items():
            digest.update(task.encode())
            for name, row in state.items():
                digest.update(f"{name} {row.dtype} {row.shape};".encode() + row.tobytes())
    return digest.hexdigest()[:32]
