"""Support for reverse proxies: the address, scheme, host and path prefix that the client sees."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from prompttune.serve.messages import BadRequestError, shown
from prompttune.serve.protocol.rest_shared import serve_error_answer
from prompttune.serve.protocol.settings import prefix_problem


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
