"""A stand-in for TensorRT: it records what it is told, succeeds or fails as told, and computes nothing.

That its names are TensorRT's own is not shown here but by ``scripts/tensorrt_contract.py``.
"""

from __future__ import annotations

import contextlib
import enum
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prompttune as pt

VERSION = "10.13.3.9"
CACHE_MAGIC = b"timings"


def install(monkeypatch: pytest.MonkeyPatch, module: types.ModuleType) -> Any:
    """Put a fake library in place."""
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def folded_state(model: pt.PromptModel) -> dict[str, np.ndarray]:
    """What an engine holds of a task."""
    with torch.no_grad():
        return {key: value.numpy() for key, value in model.task_state().items()}


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU of compute capability 9.0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class Flags(enum.Enum):
    TF32 = 7
    VERSION_COMPATIBLE = 13


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    BF16 = 7
    INT64 = 8


class Memory(bytes):
    """What TensorRT gives out as a buffer."""


class Cache:
    def __init__(self, stored: bytes) -> None:
        self.stored = stored

    def serialize(self) -> Memory:
        return Memory(CACHE_MAGIC + b"+" + self.stored)


class Config:
    def __init__(self) -> None:
        self.flags = {Flags.TF32}
        self.workspace: int | None = None
        self.profiles: list[dict[str, Any]] = []
        self.cache: Cache | None = None
        self.progress_monitor: Any = None

    def clear_flag(self, flag: Flags) -> None:
        self.flags.remove(flag)

    def set_flag(self, flag: Flags) -> None:
        self.flags.add(flag)

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self.workspace = size

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, stored: bytes) -> Cache | None:
        return Cache(stored) if not stored or stored.startswith(CACHE_MAGIC) else None

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache
        return True

    def get_timing_cache(self) -> Cache | None:
        return self.cache


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, low: list[int], likely: list[int], high: list[int]) -> None:
        self.shapes[name] = (tuple(low), tuple(likely), tuple(high))


class Context:
    """Says yes to everything except what is named in ``refuses``."""

    def __init__(self, logits: tuple[int, ...], refuses: str = "") -> None:
        self.logits, self.refuses = logits, refuses
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.runs = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return index == 0 and self.refuses != "profile"

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return self.refuses != "shape"

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return self.refuses != f"address of {name}"

    def infer_shapes(self) -> list[str]:
        return ["image"] if self.refuses == "inference" else []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name == "logits"
        return self.logits

    def execute_async_v3(self, stream: int) -> bool:
        self.runs += 1
        return self.refuses != "run"


def fake_tensorrt(**told: Any) -> types.ModuleType:
    """A module to put into ``sys.modules``; ``configs`` and ``onnx_files`` of it tell what was built.

    Args:
        told: ``engine``, what a plan opens as.
    """
    module: Any = types.ModuleType("tensorrt")
    module.__version__ = VERSION
    module.configs, module.onnx_files, module.networks = [], [], []

    class ILogger:
        def __init__(self) -> None:
            pass

    class IProgressMonitor:
        def __init__(self) -> None:
            pass

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def create_network(self, flags: int) -> Any:
            module.networks.append(flags)
            return types.SimpleNamespace(num_layers=0)

        def create_builder_config(self) -> Config:
            module.configs.append(Config())
            return module.configs[-1]

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Any, config: Config) -> Memory:
            monitor = config.progress_monitor
            monitor.phase_start("building", None, 2)
            assert monitor.step_complete("building", 0)
            monitor.phase_finish("building")
            return Memory(b"plan")

    class OnnxParser:
        def __init__(self, network: Any, logger: Any) -> None:
            pass

        def parse_from_file(self, path: str) -> bool:
            module.onnx_files.append({file.name for file in Path(path).parent.iterdir()})
            return True

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.engine_host_code_allowed = False
            module.runtime = self

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            return told.get("engine")

    module.ILogger, module.IProgressMonitor, module.Builder = ILogger, IProgressMonitor, Builder
    module.ILogger.Severity = Severity
    module.OnnxParser, module.Runtime, module.DataType, module.Dims = OnnxParser, Runtime, DataType, list
    module.BuilderFlag = Flags
    module.ProfilingVerbosity = types.SimpleNamespace(DETAILED="detailed")
    module.LayerInformationFormat = types.SimpleNamespace(JSON="json")
    module.MemoryPoolType = types.SimpleNamespace(WORKSPACE="workspace")
    module.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
    module.HardwareCompatibilityLevel = types.SimpleNamespace(
        NONE="none", AMPERE_PLUS="ampere+", SAME_COMPUTE_CAPABILITY="same"
    )
    module.TensorIOMode = types.SimpleNamespace(INPUT="input", OUTPUT="output")
    return module  # type: ignore[no-any-return]
