"""Shared parts of the HTTP routes: answers, documented errors, tokens."""

from __future__ import annotations

import math
from typing import Any

import orjson
from fastapi import Request
from fastapi.params import Security
from fastapi.security import HTTPBearer
from starlette.datastructures import Headers
from starlette.responses import Response

from prompttune.serve.messages import (
    ForbiddenError,
    ServeError,
    TooLargeError,
    UnauthorizedError,
    UnavailableError,
)
from prompttune.serve.protocol.body import read_body
from prompttune.serve.protocol.codec import parse_object
from prompttune.serve.protocol.logs import RequestRecord, usable_id
from prompttune.serve.protocol.schemas import ErrorMessage
from prompttune.serve.protocol.security import Access
from prompttune.serve.protocol.settings import TransportSettings

RECORD = "prompttune.record"
"""Key of the request's log record in its ASGI scope."""
CONTROL_BYTES = 2**20
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_bearer = HTTPBearer(auto_error=False, description="A token from the server's token file, if it has one")


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses of a route that may return these errors."""
    meanings = {kind.http_status: kind.__doc__ for kind in ServeError.__subclasses__()}
    return {status: {"model": ErrorMessage, "description": meanings[status]} for status in statuses}


def json_answer(values: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """``values`` as JSON."""
    return Response(orjson.dumps(values), status, headers, media_type="application/json")


def serve_error_answer(problem: ServeError) -> Response:
    """The HTTP answer of an error, with the headers that its status needs."""
    headers = {}
    if isinstance(problem, UnavailableError):
        headers["Retry-After"] = str(max(1, math.ceil(problem.retry_after_s)))
    if isinstance(problem, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    return json_answer({"error": str(problem)}, problem.http_status, headers)


async def read_object(request: Request, settings: TransportSettings) -> dict[str, Any]:
    """The JSON object of a small request; empty for an empty body."""
    body = await read_body(request, settings.limits, settings.body_seconds)
    if len(body) > CONTROL_BYTES:
        raise TooLargeError(f"the request exceeds {CONTROL_BYTES} bytes")
    return parse_object(body) if body.strip() else {}


def record_of(request: Request) -> RequestRecord:
    """The request's log record."""
    record: RequestRecord = request.scope[RECORD]
    return record


def allow(request: Request, access: Access, settings: TransportSettings) -> None:
    """Allow a request or raise the errors of :meth:`Guard.check`.

    Requests from pages of other sites are refused too: without tokens nothing else would stop them.
    """
    if request.method not in SAFE_METHODS and request.headers.get("sec-fetch-site") == "cross-site":
        raise ForbiddenError("pages of other sites may not call this server")
    settings.guard.check(access, request.headers.get("authorization", ""))


def require(access: Access, settings: TransportSettings) -> list[Any]:
    """Dependencies that call :func:`allow`."""

    async def check(request: Request) -> None:
        allow(request, access, settings)

    # The second is a scheme that only makes OpenAPI show where a token goes; it refuses nothing.
    return [Security(check), Security(_bearer)]


def sent_id(headers: Headers, longest: int) -> str:
    """``X-Request-Id`` if it is fit for a header, else empty."""
    return usable_id(headers.get("x-request-id", ""), longest)
