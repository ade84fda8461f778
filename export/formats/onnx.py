"""ONNX files for ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

from prompttune.errors import UsageError
from prompttune.export.formats.base import BuildRequest, Built, Format, Settings
from prompttune.export.onnx import MODEL_FILE, OPSET, WEIGHTS_FILE, export_onnx


class OnnxFormat(Format):
    """``model.onnx`` and its weights beside it."""

    name = "onnx"

    def check(self, settings: Settings) -> None:
        """See :meth:`Format.check`."""
        if settings.axes or settings.options:
            raise UsageError("the format onnx needs no sizes of axes and has no options of its own")

    def build(self, request: BuildRequest, folder: Path) -> Built:
        """See :meth:`Format.build`."""
        inputs, outputs = export_onnx(request.model, folder)
        files = [name for name in (MODEL_FILE, WEIGHTS_FILE) if (folder / name).is_file()]
        return Built(inputs, outputs, files, opset=OPSET)
