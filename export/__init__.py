"""Export: one graph over a frozen backbone, tasks as inputs, engine folders, parity with PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prompttune.lazy import lazy_names

if TYPE_CHECKING:
    from prompttune.export.build import add_task, export_engine
    from prompttune.export.folder import EngineFolder, EngineTask, Manifest
    from prompttune.export.formats import FORMATS, ExportSettings
    from prompttune.export.graph import MultiTaskGraph, trace
    from prompttune.export.parity.figures import Comparison
    from prompttune.export.parity.gate import Gate
    from prompttune.export.parity.report import ParityReport
    from prompttune.export.parity.validate import validate_engine
    from prompttune.export.runtimes import RUNTIMES

_LAZY = {
    "FORMATS": "prompttune.export.formats",
    "RUNTIMES": "prompttune.export.runtimes",
    "Comparison": "prompttune.export.parity.figures",
    "EngineFolder": "prompttune.export.folder",
    "ExportSettings": "prompttune.export.formats",
    "Gate": "prompttune.export.parity.gate",
    "Manifest": "prompttune.export.folder",
    "MultiTaskGraph": "prompttune.export.graph",
    "ParityReport": "prompttune.export.parity.report",
    "EngineTask": "prompttune.export.folder",
    "add_task": "prompttune.export.build",
    "export_engine": "prompttune.export.build",
    "trace": "prompttune.export.graph",
    "validate_engine": "prompttune.export.parity.validate",
}

__all__ = [
    "FORMATS",
    "RUNTIMES",
    "Comparison",
    "EngineFolder",
    "EngineTask",
    "ExportSettings",
    "Gate",
    "Manifest",
    "MultiTaskGraph",
    "ParityReport",
    "add_task",
    "export_engine",
    "trace",
    "validate_engine",
]

__getattr__ = lazy_names(__name__, _LAZY)
