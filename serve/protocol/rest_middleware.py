"""Middleware around every HTTP request: its id, its log line, and an answer for uncaught errors."""

from __future__ import annotations

import logging

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prompttune.serve.messages import UnavailableError
from prompttune.serve.protocol.calls import Calls
from prompttune.serve.protocol.logs import RequestRecord, new_request_id, usable_id
from prompttune.serve.protocol.rest_shared import RECORD, error_answer, serve_error_answer
from prompttune.serve.tracing import continued

logger = logging.getLogger(__name__)

_CLIENT_LEFT = 499
_ROUTINE = ("/v2/health/", "/metrics", "/status")


class ObserveRequests:
    """ASGI middleware; from request data, only ids, names and counts reach the log."""

    def __init__(self, app: ASGIApp, id_length: int, calls: Calls) -> None:
        self._app = app
        self._id_length = id_length
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application and write the log line."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope[RECORD] = self._record(scope)
        status = 0
        # The body's id may replace the one in the record, and need not fit a header.
        header_id = record.request_id

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = header_id
                if self._calls.leaving:
                    headers["Connection"] = "close"
            await send(message)

        # Routes of GET also answer HEAD; the server then sends no body.
        answered = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            with continued(Headers(scope=scope)), self._calls.inside():
                await self._app(answered, receive, observed)
        except UnavailableError as problem:
            if status == 0:
                await serve_error_answer(problem)(scope, receive, observed)
        except ClientDisconnect:
            status = _CLIENT_LEFT
        except Exception:
            logger.exception("request %s failed", record.request_id)
            if status == 0:
                answer = error_answer(f"internal error; the log has it under request {record.request_id}", 500)
                await answer(scope, receive, observed)
        finally:
            record.finish(status or _CLIENT_LEFT)

    def _record(self, scope: Scope) -> RequestRecord:
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        return RequestRecord(
            "http",
            f"{scope['method']} {path}",
            request_id=sent_id(Headers(scope=scope), self._id_length) or new_request_id(),
            routine=path.startswith(_ROUTINE),
        )


def sent_id(headers: Headers, longest: int) -> str:
    """``X-Request-Id`` if it is fit for a header, else empty."""
    return usable_id(headers.get("x-request-id", ""), longest)
