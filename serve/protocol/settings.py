"""Settings of the server: transports, access, and the engine and service behind them."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from prompttune.errors import UsageError
from prompttune.serve.limits import Limits
from prompttune.serve.protocol.security import Guard, Tls, read_tokens
from prompttune.serve.service.settings import EngineSettings, ServiceSettings
from prompttune.settings import part, setting

PAGE = Path(__file__).parent.parent / "page"
_PREFIX = re.compile(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*")
_OWN = frozenset({"v2", "docs", "page", "status", "metrics", "openapi.json"})
"""First parts of the server's own paths, which a prefix could not be told from."""


def prefix_problem(prefix: str) -> str:
    """Why ``prefix`` cannot stand before the server's paths, empty if it can."""
    if not _PREFIX.fullmatch(prefix):
        return "it must be a path such as /vision, with letters, digits, '.', '_', '~' and '-'"
    first = prefix.split("/")[1] if prefix else ""
    return f"the server has a path /{first} of its own" if first in _OWN else ""


def read_prefix(value: str) -> str:
    """A path prefix without its last slash, empty for none; :class:`UsageError` for text that does not name one."""
    prefix = value.rstrip("/")
    if problem := prefix_problem(prefix):
        raise UsageError(f"--root-path {value!r}: {problem}")
    return prefix


def read_proxies(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """Addresses and networks that are separated by commas, or ``*``; :class:`UsageError` for anything else."""
    if not isinstance(value, str):
        return value
    found = tuple(one.strip() for one in value.split(",") if one.strip())
    for one in found if found != ("*",) else ():
        try:
            ipaddress.ip_network(one)
        except ValueError as problem:
            raise UsageError(f"--forwarded-allow-ips: {problem}; write addresses, networks or * alone") from None
    return found


@dataclass(frozen=True)
class TransportSettings:
    """Settings that HTTP and gRPC share."""

    limits: Limits = part(Limits)
    guard: Guard = field(default_factory=Guard)
    tls: Tls | None = None
    page: Path = PAGE
    """Folder of the web page's static files, with ``index.html``."""
    head_seconds: float = 10.0
    """Time limit for the headers of an HTTP request, in seconds."""
    body_seconds: float = 60.0
    """Time limit for the body of an HTTP request, in seconds."""
    head_bytes: int = 64 * 1024
    """Largest size of an HTTP request line with its headers."""
    idle_seconds: int = setting(
        75, "Seconds that an HTTP connection may stay idle; longer than a proxy in front keeps it.", low=1,
        option="keep_alive_seconds",
    )  # fmt: skip
    proxies: tuple[str, ...] = setting(
        (), "Proxies whose X-Forwarded-For, -Proto, -Host and -Prefix are trusted: addresses and networks, separated "
        "by commas, or * for all.", kind=str, read=read_proxies, option="forwarded_allow_ips", shown="none",
        metavar="ADDRESSES",
    )  # fmt: skip
    shared_memory: bool = setting(
        False, "Let clients on this machine pass tensors in system shared memory; read the page on security first.",
        option="allow_shared_memory",
    )  # fmt: skip
    root_path: str = setting(
        "", "Path prefix under which a proxy publishes the server, such as /vision.", read=read_prefix, metavar="PATH"
    )
    stream_requests: int = 64
    """Largest number of running requests in one gRPC stream; the next one is read when one is answered."""


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
