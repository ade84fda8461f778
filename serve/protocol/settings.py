"""How the transports behave, whatever the service behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from prompttune.serve.limits import Limits
from prompttune.serve.protocol.security import Guard, Tls

PAGE = Path(__file__).parent.parent / "page"


@dataclass(frozen=True)
class TransportSettings:
    """What HTTP and gRPC share."""

    limits: Limits = field(default_factory=Limits)
    guard: Guard = field(default_factory=Guard)
    tls: Tls | None = None
    page: Path = PAGE
    """Folder of the web page's static files, ``index.html`` among them."""
    head_seconds: float = 10.0
    """Until the headers of an HTTP request must be complete."""
    body_seconds: float = 60.0
    """Until the body of an HTTP request must be complete."""
    head_bytes: int = 64 * 1024
    """Of an HTTP request line and headers."""
    idle_seconds: int = 75
    """That an HTTP connection may wait for its next request: longer than a proxy keeps it, which is often 60."""
    proxies: tuple[str, ...] = ()
    """Addresses and networks of proxies whose ``X-Forwarded-*`` headers are believed; ``*`` for all."""
    shared_memory: bool = False
    """Whether clients on this machine may leave tensors in shared memory."""
    root_path: str = ""
    """Path prefix under which a proxy shows the server, without a slash at its end."""
    stream_requests: int = 64
    """Requests of one gRPC stream that may run at once; the next are read when one is answered."""
