"""Settings of the server, of which the options of ``prompttune serve`` and the arguments of Ray Serve are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prompttune.errors import UsageError
from prompttune.export.options import RuntimeOptions
from prompttune.serve.limits import MEBI, Limits, read_size
from prompttune.settings import make, part, setting, settle


@dataclass(frozen=True)
class EngineSettings:
    """Which engine is served, where, and how much memory its tasks may take."""

    engine: Path
    devices: tuple[str, ...] = setting(
        ("cpu",), "Device: cpu, cuda or cuda:INDEX; may be repeated for more workers.", option="device", repeat=True
    )
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    """Options of the runtime. Each of ``devices`` replaces its device."""
    max_batch: int = setting(16, "Most images in a batch.", low=1)
    max_delay_s: float = setting(
        0.0, "Longest wait of an image for others while its device is free.", low=0, option="max_delay_ms"
    )
    stall_s: float = setting(
        120.0, "Longest time of a batch; a worker that exceeds it is restarted.", above=0, option="stall_seconds"
    )
    resident_tasks: int = setting(
        64, "Number of tasks that each device keeps loaded; the least recently used are evicted.", low=1
    )
    host_bytes: int = setting(
        1024 * MEBI, "Memory of each worker for tasks that are not loaded, so that they are not read from disk again.",
        option="host_memory", kind=str, read=read_size, shown="1GiB", metavar="SIZE",
    )  # fmt: skip
    watch: tuple[Path, ...] = ()
    """Additional folders of tasks to follow."""
    in_process: bool = False
    """Run the engines in this process, where a fault of one is a fault of all; for a process that is supervised."""

    def __post_init__(self) -> None:
        settle(self)
        if not self.devices or len(set(self.devices)) != len(self.devices):
            raise UsageError("name each device once, and one at least")
        for device in self.devices:
            _ = RuntimeOptions(device).cuda_index  # refuses what is no device

    @classmethod
    def of(cls, engine: Path, values: Mapping[str, Any], **others: Any) -> EngineSettings:
        """The settings of an engine out of options or arguments; a delay is in milliseconds there."""
        made = {**values, **others, "engine": engine, "runtime": make(RuntimeOptions, {**values, "device": "cpu"})}
        if "max_delay_ms" in made:
            made["max_delay_ms"] /= 1000
        return make(cls, made)


@dataclass(frozen=True)
class ServiceSettings:
    """How a service treats its requests."""

    limits: Limits = part(Limits)
    max_queue: int = setting(1024, "Most answers inside, an image for one task each.", low=1)
    """Rows, waiting or running."""
    timeout_s: float = setting(60.0, "Timeout of a request, in seconds.", above=0, option="timeout")
    """Time limit of a request that does not name a shorter one."""
    decode_workers: int = setting(2, "Number of decoding threads.", low=1, shown="one per core")
    watch_interval_s: float | None = setting(
        None, "Seconds between two scans.", low=0.05, option="watch_seconds", shown="2.0"
    )
    """None looks only when a load is asked for."""
