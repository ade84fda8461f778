"""A format and its runtime in one file, as another package would write them: a program of torch.export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from prompttune.export.folder import Manifest
from prompttune.export.formats import BuildRequest, Built, Format
from prompttune.export.runtimes import Array, RuntimeOptions
from prompttune.export.runtimes.tensors import TensorRuntime, as_torch
from prompttune.settings import setting

FILE = "program.pt2"


@dataclass(frozen=True)
class ProgramOptions:
    """Options of the format."""

    remark: str = setting("", "Remark to keep in the manifest.")


class ProgramFormat(Format):
    """``program.pt2``, which runs wherever PyTorch does."""

    name, title = "program", "torch.export"
    precisions = ("fp32",)
    default_attention = "fused"
    options = ProgramOptions

    def build(self, request: BuildRequest, folder: Path) -> Built:
        traced = request.trace()
        torch.export.save(traced.program, folder / FILE)
        return Built(traced.inputs, traced.outputs, [FILE], details=dict(request.settings.options))


class ProgramRuntime(TensorRuntime):
    """The program in PyTorch."""

    def __init__(self, folder: Path, manifest: Manifest, options: RuntimeOptions) -> None:
        super().__init__(torch.device(options.device), f"torch.export of PyTorch {torch.__version__}")
        self._program = torch.export.load(folder / FILE).module()

    def run(self, inputs: Mapping[str, NDArray[Any]], bank: Mapping[str, Any]) -> Array:
        with torch.no_grad():
            logits: Array = self._program(*map(as_torch, inputs.values()), dict(bank)).numpy()
        return logits
