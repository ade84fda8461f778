"""OpenVINO, for ONNX engines on a CPU: bf16, which ONNX Runtime does not run there, and static int8."""

from __future__ import annotations

import contextlib
import fcntl
import queue
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from prompttune.errors import EngineError, MissingExtraError, UsageError, first_line
from prompttune.export.folder import MANIFEST, ONNX_FILE, Manifest
from prompttune.export.layout import LOGITS, bank_input
from prompttune.export.runtimes.base import Array, BankArray, Runtime, RuntimeOptions, refuse_options
from prompttune.export.runtimes.choice import COMPILED
from prompttune.export.runtimes.processor import saturates_int8

try:
    import openvino as ov
except ImportError:  # the runtime says so when it is opened
    ov = None

SETTINGS: dict[str, Any] = {
    "NUM_STREAMS": 1,
    "ENABLE_CPU_PINNING": False,  # several workers would share the first cores
}


class OpenVinoRuntime(Runtime):
    """An ONNX file in OpenVINO, whose tensors refer to the bank in host memory without a copy.

    Calls that overlap have their own request each and share the threads.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        UsageError: an option belongs to a GPU.
        EngineError: OpenVINO cannot open the file.
    """

    def __init__(self, folder: Path, manifest: Manifest, options: RuntimeOptions) -> None:
        if ov is None:
            raise MissingExtraError("openvino", "openvino", "or give the runtime onnxruntime and another precision")
        refuse_options(options, "OpenVINO", "cuda_graph", "provider")
        if "parts" in manifest.details:
            raise UsageError("OpenVINO does not run engines in two parts: give the runtime onnxruntime")
        if options.cuda_index is not None:
            raise UsageError("the runtime openvino runs on the cpu alone: give the device cpu")
        # In int8 engines the file's types state what runs in bf16; in bf16 engines norms and softmax do too.
        core, hint = ov.Core(), "bf16" if manifest.precision == "bf16" else "f32"
        settings = {**SETTINGS, "INFERENCE_PRECISION_HINT": hint}
        in_fp32 = manifest.precision == "int8" and saturates_int8()
        if in_fp32:  # the same rounded values, multiplied in fp32
            settings["LP_TRANSFORMS_MODE"] = "NO"
        if options.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = options.threads
        try:
            self._model = _compiled(core, folder, settings, options.cache)
        except Exception as problem:  # OpenVINO's errors share no base class below Exception
            raise EngineError(f"OpenVINO cannot open {folder / ONNX_FILE}: {_reason(problem)}") from None
        self._requests: queue.LifoQueue[Any] = queue.LifoQueue()
        self._version, self._computed = ov.__version__.partition("-")[0], manifest.precision
        known = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if (name := self._computed.upper()) in ("FP16", "BF16") and name not in known:
            self._computed += f" in fp32, as this CPU has no {manifest.precision}"
        if in_fp32:
            self._computed += " in fp32, as sums of int8 products saturate on a CPU without VNNI"

    @property
    def description(self) -> str:
        """See :attr:`Runtime.description`."""
        return f"OpenVINO {self._version}, CPU, {self._computed}"

    def place(self, rows: BankArray) -> Any:
        """See :meth:`Runtime.place`."""
        if rows.dtype == ml_dtypes.bfloat16:  # a type that OpenVINO does not know in NumPy
            return ov.Tensor(rows.view(np.uint16), ov.Shape(rows.shape), ov.Type.bf16)
        return ov.Tensor(rows, shared_memory=True)

    def update(self, placed: Any, rows: BankArray, changed: slice) -> None:
        """See :meth:`Runtime.update`; the placed tensor is the host's copy."""

    def run(self, inputs: Mapping[str, NDArray[Any]], bank: Mapping[str, Any]) -> Array:
        """See :meth:`Runtime.run`."""
        feeds = {name: self.place(np.ascontiguousarray(one)) for name, one in inputs.items()}
        feeds |= {bank_input(key): placed for key, placed in bank.items()}
        try:
            request = self._requests.get_nowait()
        except queue.Empty:
            request = self._model.create_infer_request()
        try:
            for name, tensor in feeds.items():
                request.set_tensor(name, tensor)
            request.infer()
            logits = np.array(request.get_tensor(LOGITS).data)
        except Exception as problem:
            raise EngineError(f"OpenVINO failed: {_reason(problem)}") from None
        self._requests.put(request)
        return logits


def _compiled(core: Any, folder: Path, settings: dict[str, Any], cache: Path | None) -> Any:
    """The model of a folder, from its cache if it has one; a model in a folder that is being written has none."""
    path = str(folder / ONNX_FILE)
    cache = cache or (folder / COMPILED if (folder / MANIFEST).is_file() else None)
    with _writing(cache) as place:
        if place is not None:
            with contextlib.suppress(RuntimeError):
                return core.compile_model(path, "CPU", {**settings, "CACHE_DIR": str(place)})
            shutil.rmtree(place, ignore_errors=True)  # damaged, or of another OpenVINO
        return core.compile_model(path, "CPU", settings)


@contextlib.contextmanager
def _writing(cache: Path | None) -> Iterator[Path | None]:
    """The cache's folder, for one process at a time; None where it cannot be written to."""
    with contextlib.ExitStack() as stack:
        try:
            if cache is not None:
                cache.mkdir(parents=True, exist_ok=True)
                fcntl.flock(stack.enter_context((cache / ".lock").open("w")), fcntl.LOCK_EX)
        except OSError:
            cache = None
        yield cache


def _reason(problem: Exception) -> str:
    """The last line of OpenVINO's text; those before it name places in its own sources."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[-1] if lines else first_line(problem)
