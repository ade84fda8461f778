"""Settings of the transports, independent of the service behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from prompttune.serve.limits import Limits
from prompttune.serve.protocol.security import Guard, Tls

PAGE = Path(__file__).parent.parent / "page"


@dataclass(frozen=True)
class TransportSettings:
    """Settings that HTTP and gRPC share."""

    limits: Limits = field(default_factory=Limits)
    guard: Guard = field(default_factory=Guard)
    tls: Tls | None = None
    page: Path = PAGE
    """Folder of the web page's static files, with ``index.html``."""
    head_seconds: float = 10.0
    """Time limit for the headers of an HTTP request, in seconds."""
    body_seconds: float = 60.0
    """Time limit for the body of an HTTP request, in seconds."""
    head_bytes: int = 64 * 1024
    """Size limit of an HTTP request line with its headers, in bytes."""
    idle_seconds: int = 75
    """Seconds that an HTTP connection may stay idle: longer than a proxy keeps it, which is often 60 seconds."""
    proxies: tuple[str, ...] = ()
    """Addresses and networks of proxies whose ``X-Forwarded-*`` headers are trusted; ``*`` for all."""
    shared_memory: bool = False
    """Whether clients on this machine may pass tensors in shared memory."""
    root_path: str = ""
    """Path prefix under which a proxy publishes the server, without a trailing slash."""
    stream_requests: int = 64
    """Largest number of running requests in one gRPC stream; the next one is read when one is answered."""
