"""AOTInductor: the captured program compiled ahead of time by PyTorch's own compiler, for a CPU or a GPU.

https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch._inductor import aoti_compile_and_package
from torch._inductor.cpp_builder import get_cpp_compiler

from prompttune.errors import EngineError, first_line
from prompttune.export.formats.base import BuildRequest, Built, Format, Settings
from prompttune.export.quiet import quiet
from prompttune.export.runtimes.aoti import MODEL_FILE
from prompttune.export.runtimes.base import RuntimeOptions


class AotiFormat(Format):
    """``model.pt2``: machine code and weights in one file, for the kind of device that it was compiled for."""

    name = "aoti"
    precisions = ("fp32", "fp16", "bf16")
    default_attention = "fused"

    def check(self, settings: Settings) -> None:
        """See :meth:`Format.check`.

        Raises:
            UsageError: AOTInductor does not support a setting.
            EngineError: a C++ compiler, or a CUDA device to compile for, is missing.
        """
        super().check(settings)
        if RuntimeOptions(settings.target).cuda_index is not None and not torch.cuda.is_available():
            raise EngineError(
                f"no CUDA device here to compile for {settings.target}: compile on a GPU host, or for cpu"
            )
        try:
            get_cpp_compiler()
        except Exception:  # Inductor's error spans a page
            raise EngineError(
                "AOTInductor needs a C++ compiler and finds none: install g++, or export with --format onnx"
            ) from None

    def build(self, request: BuildRequest, folder: Path) -> Built:
        """See :meth:`Format.build`."""
        device = request.settings.target
        request.on_stage("tracing the graph")
        traced = request.trace(device=device)
        request.on_stage(f"compiling for {device}")
        try:
            with quiet("torch._inductor", stderr=True):
                aoti_compile_and_package(traced.program, package_path=str(folder / MODEL_FILE))
        except Exception as problem:  # Inductor's errors share no base class below Exception
            raise EngineError(f"AOTInductor failed: {first_line(problem)}") from problem
        return Built(traced.inputs, traced.outputs, [MODEL_FILE], details=_made_for(device))


def _made_for(device: str) -> dict[str, str]:
    index = RuntimeOptions(device).cuda_index
    if index is None:
        return {"device": "cpu", "cpu": torch.backends.cpu.get_cpu_capability()}
    major, minor = torch.cuda.get_device_capability(index)
    return {"device": "cuda", "compute_capability": f"{major}.{minor}", "gpu": torch.cuda.get_device_name(index)}
