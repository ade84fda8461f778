"""Messages between the ingress and the replicas (HTTP as text and bytes), and the limits of repeated requests."""

from __future__ import annotations

from typing import NamedTuple

ATTEMPTS = 3
"""Largest number of replicas that a request may lose. A request that kills engines must not kill all of them."""
PAUSE_S = 0.1
"""Seconds for Ray to notice the consequences of a replica's death."""

Headers = list[tuple[bytes, bytes]]


class RequestHead(NamedTuple):
    """A request without its body, which is sent separately: Ray moves top-level ``bytes`` without pickling them."""

    method: str
    path: str
    """Decoded path, after the prefix of the application."""
    query: bytes
    headers: Headers
    scheme: str = "http"
    root_path: str = ""
    """The application's prefix, for redirects and the documentation."""


class WholeAnswer(NamedTuple):
    """A whole answer."""

    status: int
    headers: Headers
    body: bytes
