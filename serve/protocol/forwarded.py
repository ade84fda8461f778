"""Support for reverse proxies: the address, scheme, host and path prefix that the client sees."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from prompttune.errors import UsageError
from prompttune.serve.protocol.elements import shown
from prompttune.serve.protocol.rest_shared import serve_error_answer
from prompttune.serve.protocol.types import BadRequestError

_PREFIX = re.compile(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*")
_OWN = frozenset({"v2", "docs", "page", "status", "metrics", "openapi.json"})
"""First parts of the server's own paths; a prefix must differ from them."""


def prefix_problem(prefix: str) -> str:
    """The reason why ``prefix`` cannot precede the server's paths; empty if it can."""
    if not _PREFIX.fullmatch(prefix):
        return "it must be a path such as /vision, with letters, digits, '.', '_', '~' and '-'"
    first = prefix.split("/")[1] if prefix else ""
    return f"the server has a path /{first} of its own" if first in _OWN else ""


def read_prefix(value: str) -> str:
    """A path prefix without its last slash, empty for none; raises :class:`UsageError` for an invalid prefix."""
    prefix = value.rstrip("/")
    if problem := prefix_problem(prefix):
        raise UsageError(f"--root-path {value!r}: {problem}")
    return prefix


def read_proxies(value: str) -> tuple[str, ...]:
    """Addresses and networks separated by commas, or ``*``; raises :class:`UsageError` for anything else."""
    found = tuple(one.strip() for one in value.split(",") if one.strip())
    for one in found if found != ("*",) else ():
        try:
            ipaddress.ip_network(one)
        except ValueError as problem:
            raise UsageError(f"--forwarded-allow-ips: {problem}; write addresses, networks or * alone") from None
    return found


class BehindProxy(ProxyHeadersMiddleware):
    """Applies the path prefix and the ``X-Forwarded-*`` headers of trusted proxies; other clients' headers are ignored.

    A proxy may remove the prefix or keep it.
    """

    def __init__(self, app: ASGIApp, proxies: Sequence[str], root_path: str) -> None:
        super().__init__(app, list(proxies))  # type: ignore[arg-type]
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # type: ignore[override]
        """Run the application with the scope that the client sees."""
        if scope["type"] == "http":
            prefix, client = self._root_path, scope.get("client")
            if client is not None and client[0] in self.trusted_hosts:
                headers = Headers(scope=scope)
                if host := _first(headers, "x-forwarded-host"):
                    MutableHeaders(scope=scope)["host"] = host
                prefix = _first(headers, "x-forwarded-prefix").rstrip("/") or prefix
                if problem := prefix_problem(prefix):
                    refused = BadRequestError(f"X-Forwarded-Prefix is {shown(prefix)}: {problem}")
                    await serve_error_answer(refused)(scope, receive, send)
                    return
            if prefix:
                path = scope["path"]
                behind = path == prefix or path.startswith(f"{prefix}/")
                scope["root_path"], scope["path"] = prefix, path if behind else prefix + path
        await super().__call__(scope, receive, send)  # type: ignore[arg-type]


def _first(headers: Headers, name: str) -> str:
    """The first value of a header, which the proxy nearest to the client has set."""
    return headers.get(name, "").split(",")[0].strip()
