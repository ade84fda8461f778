"""Export: one graph over a frozen backbone, tasks as inputs, engine folders, parity with PyTorch."""

from prompttune.export.build import add_task, export_engine, list_tasks, remove_task
from prompttune.export.figures import Comparison
from prompttune.export.folder import EngineFolder, Manifest, Task, load_task
from prompttune.export.formats import FORMATS
from prompttune.export.formats import Settings as ExportSettings
from prompttune.export.gate import Gate
from prompttune.export.graph import MultiTaskGraph, trace
from prompttune.export.parity import ParityReport
from prompttune.export.validate import validate_engine

__all__ = [
    "FORMATS",
    "Comparison",
    "EngineFolder",
    "ExportSettings",
    "Gate",
    "Manifest",
    "MultiTaskGraph",
    "ParityReport",
    "Task",
    "add_task",
    "export_engine",
    "list_tasks",
    "load_task",
    "remove_task",
    "trace",
    "validate_engine",
]
