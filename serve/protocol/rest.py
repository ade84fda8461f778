"""The Open Inference Protocol v2 over HTTP, as an ASGI application.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from pydantic.json_schema import models_json_schema
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prompttune.serve.messages import ServeError, UnavailableError
from prompttune.serve.protocol import rest_routes, schemas
from prompttune.serve.protocol.calls import Calls, SharedState
from prompttune.serve.protocol.logs import RequestRecord, new_request_id
from prompttune.serve.protocol.rest_infer import inference_routes
from prompttune.serve.protocol.rest_pages import add_pages
from prompttune.serve.protocol.rest_shared import RECORD, json_answer, sent_id, serve_error_answer
from prompttune.serve.protocol.settings import TransportSettings
from prompttune.serve.service.service import Service
from prompttune.serve.tracing import continued
from prompttune.version import __version__

_ABOUT = (
    "Every task is a model; the model `mixed` takes a task for each image, and `panel` answers several for each. "
    'Errors are `{"error": "…"}`.'
)
_CLIENT_LEFT = 499
_ROUTINE = ("/v2/health/", "/metrics", "/status")
_REQUESTS = (schemas.InferenceRequest, schemas.IndexRequest, schemas.RepositoryRequest)


class _Application(FastAPI):
    """FastAPI whose OpenAPI document includes the requests that the routes read themselves."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, created once."""
        if self.openapi_schema is None:
            document = super().openapi()
            _, requests = models_json_schema(
                [(model, "validation") for model in _REQUESTS], ref_template="#/components/schemas/{model}"
            )
            document["components"]["schemas"].update(requests["$defs"])
            self.openapi_schema = document
        return self.openapi_schema


def rest_application(service: Service, settings: TransportSettings, state: SharedState | None = None) -> FastAPI:
    """Create the application; it needs no lifespan, and calls ``service`` on the event loop that runs it.

    ``state`` is shared with the gRPC server, if there is one.
    """
    state = state or SharedState(settings)
    application = _Application(
        title="prompttune", version=__version__, description=_ABOUT, docs_url=None, redoc_url=None
    )
    for router in (
        inference_routes(service, settings, state),
        rest_routes.health_routes(service),
        rest_routes.model_routes(service, settings, state.regions),
        rest_routes.extension_routes(service, settings, state),
        rest_routes.repository_routes(service, settings),
        rest_routes.status_routes(service, settings),
    ):
        application.include_router(router)
    add_pages(application, settings)
    application.add_exception_handler(ServeError, _serve_error)
    application.add_exception_handler(HTTPException, _http_error)
    application.add_middleware(ObserveRequests, id_length=settings.limits.id_length, calls=state.calls)
    return application


async def _serve_error(_: Request, problem: Exception) -> Response:
    assert isinstance(problem, ServeError)
    return serve_error_answer(problem)


async def _http_error(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    where = f"{request.method} {request.url.path}"
    message = {404: f"{where} does not exist", 405: f"{where} is not allowed"}.get(problem.status_code, problem.detail)
    return json_answer({"error": message}, problem.status_code, dict(problem.headers or {}))


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
            unexpected = record.unexpected()
            if status == 0:
                await serve_error_answer(unexpected)(scope, receive, observed)
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
