"""Machine and versions behind a figure, which every table must name."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch

from prompttune.export.runtimes.processor import facts, instructions
from prompttune.spreadsheets import write_table

_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx2")
"""Instruction sets that decide how quick matrix products are; one name of processor may stand for all of them."""


def hardware_name(device: str = "cpu") -> str:
    """Name of the CUDA device; or of the processor, with its instruction sets and number of threads."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    models, known = [value for name, value in facts() if name == "model name"], instructions()
    if not models:
        return platform.processor()
    return " ".join([models[0], *(one for one in _INSTRUCTIONS if one in known), f"x{len(models)}"])


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
