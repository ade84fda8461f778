"""What the ingress and the replicas say to each other, HTTP as text and bytes, and how often."""

from __future__ import annotations

from typing import NamedTuple

ATTEMPTS = 3
"""Replicas that a request may see die. A request that kills engines must not kill all of them."""
PAUSE_S = 0.1
"""For Ray to notice what the death of a replica took with it."""

Headers = list[tuple[bytes, bytes]]


class Head(NamedTuple):
    """A request without its body, which travels beside it: Ray moves top-level ``bytes`` without pickling them."""

    method: str
    path: str
    """Decoded, behind the prefix of the application."""
    query: bytes
    headers: Headers
    scheme: str = "http"
    root_path: str = ""
    """The application's prefix, for redirects and the documentation."""


class Answer(NamedTuple):
    """A whole answer."""

    status: int
    headers: Headers
    body: bytes
