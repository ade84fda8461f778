"""Settings of the server, of which the options of ``prompttune serve`` and the arguments of Ray Serve are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prompttune.errors import UsageError
from prompttune.export.options import RuntimeOptions
from prompttune.serve.limits import MEBI, Limits, read_size
from prompttune.serve.protocol.security import Guard, Tls, read_tokens
from prompttune.serve.protocol.settings import TransportSettings
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
        made = {**values, **others, "engine": engine, "runtime": RuntimeOptions(threads=values.get("threads"))}
        if "max_delay_ms" in made:
            made["max_delay_ms"] /= 1000
        return make(cls, made)


@dataclass(frozen=True)
class ServiceSettings:
    """How a service treats its requests."""

    limits: Limits = part(Limits)
    max_queue: int = setting(1024, "Most images inside.", low=1)
    """Rows, waiting or running."""
    timeout_s: float = setting(60.0, "Timeout of a request, in seconds.", above=0, option="timeout")
    """Time limit of a request that does not name a shorter one."""
    decode_workers: int = setting(2, "Number of decoding threads.", low=1, shown="one per core")
    watch_interval_s: float | None = setting(
        None, "Seconds between two scans.", low=0.05, option="watch_seconds", shown="2.0"
    )
    """None looks only when a load is asked for."""


@dataclass(frozen=True)
class AccessSettings:
    """Who may ask for what, and the files that say so."""

    token_file: Path | None = setting(
        None, "Bearer tokens for inference, one per line.", shown="inference is open", path="file"
    )
    allow_control: bool = setting(False, "Let clients load and unload tasks.")
    control_token_file: Path | None = setting(None, "Bearer tokens for control.", path="file")
    tls_certificate: Path | None = setting(None, "Certificate chain of the server, PEM.", path="file")
    tls_key: Path | None = setting(None, "Private key of the certificate, PEM.", path="file")
    tls_client_ca: Path | None = setting(None, "Authority of client certificates.", path="file")

    def __post_init__(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise UsageError("--tls-certificate and --tls-key go together")

    @property
    def guard(self) -> Guard:
        """The tokens, read from their files.

        Raises:
            UsageError: a file cannot be read, or holds no tokens.
        """
        tokens = None if self.token_file is None else read_tokens(self.token_file)
        control = None if self.control_token_file is None else read_tokens(self.control_token_file)
        return Guard(tokens, control, self.allow_control)

    @property
    def tls(self) -> Tls | None:
        """The certificate, checked; None without one."""
        if self.tls_certificate is None or self.tls_key is None:
            return None
        return Tls(self.tls_certificate, self.tls_key, self.tls_client_ca)


@dataclass(frozen=True)
class ServerSettings:
    """Everything that ``prompttune serve`` is told."""

    engine: EngineSettings
    service: ServiceSettings = part(ServiceSettings)
    transport: TransportSettings = part(TransportSettings)
    host: str = setting(
        "127.0.0.1", "Address or name to listen on, the same for both transports; 0.0.0.0 or :: for all of IPv4 and "
        "IPv6.", envvar="PROMPTTUNE_HOST",
    )  # fmt: skip
    http_port: int = setting(8000, "Port of HTTP; 0 takes a free one.", low=0, high=65535)
    grpc_port: int | None = setting(8001, "Port of gRPC; 0 takes a free one.", low=0, high=65535)
    """None serves HTTP alone."""
    drain_s: float = setting(
        30.0, "Seconds after SIGTERM to answer the requests inside; the remaining ones get 503.", low=0,
        option="drain_seconds",
    )  # fmt: skip
