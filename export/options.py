"""How an engine is opened: settings that every command on engines shares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prompttune.errors import UsageError
from prompttune.settings import setting

PROVIDERS = ("tensorrt",)


@dataclass(frozen=True)
class RuntimeOptions:
    """Options for opening an engine; a runtime raises :class:`UsageError` for options that it does not support."""

    device: str = setting("cpu", "Device: cpu, cuda or cuda:INDEX.")
    threads: int | None = setting(None, "CPU threads of the model.", low=1, shown="one per core", section="Speed")
    """Threads of one operator; None for one per core."""
    cuda_graph: bool = setting(False, "Capture one CUDA graph for each batch size and replay it.")
    provider: str | None = setting(
        None, "Run an ONNX engine in ONNX Runtime's TensorRT provider.", PROVIDERS, shown="the device's own"
    )
    cache: Path | None = setting(
        None, "Folder for the provider's compiled engines, kept between runs.", option="provider_cache", path="folder"
    )
    spin: bool = True
    """Whether CPU threads that wait for the next operator spin: faster alone, wasteful next to other work."""

    @property
    def cuda_index(self) -> int | None:
        """Index of the CUDA device, None on a CPU.

        Raises:
            UsageError: the device is neither ``cpu`` nor ``cuda`` nor ``cuda:INDEX``.
        """
        kind, _, index = self.device.partition(":")
        if kind == "cpu" and not index:
            return None
        if kind != "cuda" or (index and not index.isdigit()):
            raise UsageError(f"unknown device {self.device!r}; known: cpu, cuda, cuda:INDEX")
        return int(index or 0)
