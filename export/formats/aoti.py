"""AOTInductor: the captured program compiled ahead of time by PyTorch's own compiler, for a CPU or a GPU.

https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from prompttune.errors import EngineError, first_line
from prompttune.export.formats.base import BuildRequest, Built, ExportSettings, Format
from prompttune.export.graph import unbounded_attention
from prompttune.export.quiet import quiet
from prompttune.export.runtimes.aoti import MODEL_FILE
from prompttune.export.runtimes.base import RuntimeOptions
from prompttune.export.runtimes.tensorrt_compatibility import gpu_record
from prompttune.export.runtimes.tensorrt_library import require_cuda

_INCLUDES = "#include <cuda.h>\n#include <cuda_runtime.h>\n#include <cuda_fp8.h>\n"
"""What PyTorch's headers for a program on CUDA include of CUDA's own."""


class AotiFormat(Format):
    """``model.pt2``: machine code and weights in one file, for the kind of device that it was compiled for."""

    name, title = "aoti", "AOTInductor, only needs PyTorch"
    precisions = ("fp32", "fp16", "bf16")
    default_attention = "fused"

    def check(self, settings: ExportSettings) -> None:
        """See :meth:`Format.check`.

        Raises:
            UsageError: AOTInductor does not support a setting.
            EngineError: a C++ compiler, a CUDA device or CUDA's headers are missing.
        """
        super().check(settings)
        for_cuda = RuntimeOptions(settings.target).cuda_index is not None
        if for_cuda:
            require_cuda(settings.target, f"compiling for {settings.target}")
        from torch._inductor import cpp_builder  # takes seconds to import

        try:
            cpp_builder.get_cpp_compiler()
        except Exception:  # Inductor's error spans a page
            raise EngineError(
                "AOTInductor needs a C++ compiler and finds none: install g++, or export with --format onnx"
            ) from None
        if for_cuda:
            with compiling_for(settings.target):
                _check_toolkit()

    def build(self, request: BuildRequest, folder: Path) -> Built:
        """See :meth:`Format.build`."""
        from torch import _inductor

        device = request.settings.target
        request.on_stage("tracing the graph")
        traced = request.trace(device=device)
        request.on_stage(f"compiling for {device}")
        try:
            with quiet("torch._inductor", stderr=True), compiling_for(device):
                _inductor.aoti_compile_and_package(traced.program, package_path=str(folder / MODEL_FILE))
        except Exception as problem:  # Inductor's errors share no base class below Exception
            raise EngineError(f"AOTInductor failed: {first_line(problem)}") from problem
        return Built(traced.inputs, traced.outputs, [MODEL_FILE], details=_made_for(device))


@contextmanager
def compiling_for(device: str) -> Iterator[None]:
    """On CUDA: the device, its attention and, where no CUDA toolkit is, the headers that pip brings with PyTorch."""
    index = RuntimeOptions(device).cuda_index
    if index is None:
        yield
        return
    from torch.utils import cpp_extension  # looks for CUDA, and logs what it misses

    with torch.cuda.device(index), unbounded_attention(device), ExitStack() as stack:
        version = str(torch.version.cuda).partition(".")[0]
        home, triton = _packaged("nvidia", f"cu{version}"), _packaged("triton", "backends/nvidia/include")
        if home is not None and not Path(cpp_extension.CUDA_HOME or "", "include", "cuda.h").is_file():
            stack.enter_context(mock.patch.object(cpp_extension, "CUDA_HOME", str(home)))
            # Behind the others: PyTorch's wheels lack the folder crt of these headers, and Triton has it.
            folders = (os.environ.get("CPATH"), triton and str(triton))
            path = {"CPATH": os.pathsep.join(one for one in folders if one)}
            stack.enter_context(mock.patch.dict(os.environ, path))
        yield


def _packaged(package: str, folder: str) -> Path | None:
    """A folder of an installed package, None if it is not there."""
    spec = importlib.util.find_spec(package)
    places = (Path(place) / folder for place in (spec and spec.submodule_search_locations) or ())
    return next(filter(Path.is_dir, places), None)


def _check_toolkit() -> None:
    """Compile and link as Inductor will.

    Raises:
        EngineError: names what to install.
    """
    from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "check.cpp"
        source.write_text(_INCLUDES)
        try:
            CppBuilder("check", [str(source)], CppTorchDeviceOptions(device_type="cuda", aot_mode=True), folder).build()
        except Exception as problem:  # without a toolkit: OSError, or Inductor's, which quotes the compiler's page
            lines = [line for line in str(problem).splitlines() if "fatal error" in line or "cannot find" in line]
            reason = lines[0].partition("error: ")[2] or lines[0] if lines else first_line(problem)
            raise EngineError(
                f"AOTInductor cannot compile for CUDA here ({reason.strip()}): install the CUDA toolkit "
                f"{torch.version.cuda} and set CUDA_HOME to it, or export with --format onnx"
            ) from None


def _made_for(device: str) -> dict[str, Any]:
    index = RuntimeOptions(device).cuda_index
    if index is None:
        return {"device": "cpu", "cpu": torch.backends.cpu.get_cpu_capability()}
    return {"device": "cuda", **gpu_record(index)}
