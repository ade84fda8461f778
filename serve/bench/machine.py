"""Machine and versions behind a figure, which every table must name."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch

from prompttune.spreadsheets import write_table

_PROCESSORS = Path("/proc/cpuinfo")


def hardware_name(device: str = "cpu") -> str:
    """Name of the CUDA device, or of the processor with its number of threads."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    lines = _PROCESSORS.read_text().splitlines() if _PROCESSORS.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]} x{len(models)}" if models else platform.processor()


def machine_columns(device: str, threads: int, command: str) -> dict[str, str]:
    """The last columns of every table of figures."""
    return {
        "hardware": hardware_name(device),
        "threads": str(threads),
        "torch": str(torch.__version__),
        "timm": str(timm.__version__),
        "onnxruntime": str(onnxruntime.__version__),
        "command": command,
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Write rows with the same keys, each followed by ``columns``, atomically."""
    write_table(path, [{**row, **columns} for row in rows])
