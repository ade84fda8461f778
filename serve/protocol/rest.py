"""The Open Inference Protocol v2 over HTTP, as an ASGI application.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import Response

from prompttune.serve.messages import ServeError
from prompttune.serve.protocol import schemas
from prompttune.serve.protocol.rest_extensions import extension_routes
from prompttune.serve.protocol.rest_infer import inference_routes
from prompttune.serve.protocol.rest_middleware import ObserveRequests
from prompttune.serve.protocol.rest_models import health_routes, model_routes, repository_routes
from prompttune.serve.protocol.rest_pages import add_pages, status_routes
from prompttune.serve.protocol.rest_shared import error_answer, serve_error_answer
from prompttune.serve.protocol.service import InferenceService
from prompttune.serve.protocol.settings import TransportSettings
from prompttune.serve.protocol.state import State
from prompttune.version import __version__

_ABOUT = 'Every task is a model; the model `mixed` takes a task for each image. Errors are `{"error": "…"}`.'
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


def rest_application(service: InferenceService, settings: TransportSettings, state: State | None = None) -> FastAPI:
    """Create the application; it needs no lifespan, and calls ``service`` on the event loop that runs it.

    ``state`` is shared with the gRPC server, if there is one.
    """
    state = state or State(settings)
    application = _Application(
        title="prompttune", version=__version__, description=_ABOUT, docs_url=None, redoc_url=None
    )
    for router in (
        inference_routes(service, settings, state.regions),
        health_routes(service),
        model_routes(service, settings, state.regions),
        extension_routes(service, settings, state.regions),
        repository_routes(service, settings),
        status_routes(service, settings),
    ):
        application.include_router(router)
    add_pages(application, settings)
    application.add_exception_handler(ServeError, _serve_error)
    application.add_exception_handler(HTTPException, _http_error)
    application.add_exception_handler(RequestValidationError, _invalid)
    application.add_middleware(ObserveRequests, id_length=settings.limits.id_length, calls=state.calls)
    return application


async def _serve_error(_: Request, problem: Exception) -> Response:
    assert isinstance(problem, ServeError)
    return serve_error_answer(problem)


async def _http_error(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    where = f"{request.method} {request.url.path}"
    message = {404: f"{where} does not exist", 405: f"{where} is not allowed"}.get(problem.status_code, problem.detail)
    return error_answer(message, problem.status_code, dict(problem.headers or {}))


async def _invalid(_: Request, problem: Exception) -> Response:
    assert isinstance(problem, RequestValidationError)
    first = problem.errors()[0]
    return error_answer(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", 422)
