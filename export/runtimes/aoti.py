"""AOTInductor packages: PyTorch's compiled programs, on a CPU or a GPU, without the model's own code."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from prompttune.errors import EngineError, first_line
from prompttune.export.folder import Manifest
from prompttune.export.precision.casting import exact_convolutions
from prompttune.export.runtimes.base import Array, RuntimeOptions, refuse_options
from prompttune.export.runtimes.tensorrt_compatibility import check_capability
from prompttune.export.runtimes.tensorrt_library import require_cuda
from prompttune.export.runtimes.tensors import TensorRuntime, as_torch

MODEL_FILE = "model.pt2"
_VECTORS = ("DEFAULT", "AVX2", "AVX512")
"""PyTorch's names of x86 instruction sets, each including the one before."""


class AotiRuntime(TensorRuntime):
    """A package in PyTorch's own loader. On a GPU calls run on the current stream of the calling thread.

    Raises:
        UsageError: an option does not apply to this format, or the CUDA device is missing.
        EngineError: the package was compiled for another kind of device, or it cannot be opened.
    """

    def __init__(self, folder: Path, manifest: Manifest, options: RuntimeOptions) -> None:
        refuse_options(options, "the format aoti", "cuda_graph", "provider", "cache")
        index = options.cuda_index
        self._check_device(manifest, index)
        device = torch.device("cpu") if index is None else torch.device("cuda", index)
        super().__init__(device, f"AOTInductor of PyTorch {torch.__version__}")
        self._exact = index is not None and manifest.precision == "fp32"
        if options.threads is not None:
            torch.set_num_threads(options.threads)  # the package's kernels share PyTorch's threads
        from torch._inductor import aoti_load_package  # takes seconds to import

        path = folder / MODEL_FILE
        try:
            self._program = aoti_load_package(str(path), device_index=-1 if index is None else index)
        except Exception as problem:  # the loader's errors share no base class below Exception
            raise EngineError(f"PyTorch cannot open {path}: {first_line(problem)}") from None

    @staticmethod
    def _check_device(manifest: Manifest, index: int | None) -> None:
        made = manifest.details
        wanted = "cpu" if index is None else "cuda"
        if made["device"] != wanted:
            raise EngineError(
                f"the engine was compiled for {made['device']}, not for {wanted}: open it there, or export it again "
                f"with --device {wanted}"
            )
        if index is None:
            here = torch.backends.cpu.get_cpu_capability()
            contained = _VECTORS[: _VECTORS.index(here) + 1] if here in _VECTORS else (here,)
            if made["cpu"] not in contained:
                raise EngineError(
                    f"the engine was compiled for a CPU with {made['cpu']}, this one has {here}: export it again here"
                )
            return
        require_cuda(f"cuda:{index}", "an AOTInductor engine for cuda")
        check_capability(made, torch.cuda.get_device_capability(index))

    def run(self, inputs: Mapping[str, NDArray[Any]], bank: Mapping[str, Any]) -> Array:
        """See :meth:`Runtime.run`."""
        # The loader takes the stream of the current device, which need not be the program's.
        here = torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
        try:
            with torch.no_grad(), here:
                given = [as_torch(one).to(self._device) for one in inputs.values()]
                with exact_convolutions(self._exact):
                    # In the order of the captured argument: a dict of another order is refused.
                    answer = self._program(*given, *([dict(bank)] if bank else []))
                logits: Array = answer.cpu().numpy()
        except Exception as problem:  # the program's errors share no base class below Exception
            raise EngineError(f"the AOTInductor engine failed: {first_line(problem)}") from None
        return logits
