"""Settings of the transports, independent of the service behind them."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from prompttune.errors import UsageError
from prompttune.serve.limits import Limits
from prompttune.serve.protocol.security import Guard, Tls
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
