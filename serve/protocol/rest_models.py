"""Health, metadata, statistics and the model repository over HTTP."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from prompttune.serve.messages import BadRequestError, NotFoundError, UnavailableError, shown
from prompttune.serve.protocol import schemas
from prompttune.serve.protocol.codec import refuse_overrides
from prompttune.serve.protocol.describe import (
    config_values,
    index_values,
    metadata_values,
    server_values,
    statistics_values,
)
from prompttune.serve.protocol.rest_shared import errors, json_answer, read_object, record_of, require
from prompttune.serve.protocol.security import Access
from prompttune.serve.protocol.service import InferenceService
from prompttune.serve.protocol.settings import TransportSettings
from prompttune.serve.protocol.shared_memory import Regions

MODEL, VERSION = "/models/{model}", "/models/{model}/versions/{version}"


def health_routes(service: InferenceService) -> APIRouter:
    """Liveness and readiness routes, open to probes."""
    router = APIRouter(prefix="/v2/health", tags=["health"])

    @router.get("/live", summary="Is the process alive?", responses={200: {"model": schemas.Live}, **errors(503)})
    async def live() -> Response:
        if not service.live():
            raise UnavailableError("the server is not healthy")
        return json_answer({"live": True})

    @router.get("/ready", summary="Is the server ready?", responses={200: {"model": schemas.Ready}, **errors(503)})
    async def ready() -> Response:
        if not service.ready():
            raise UnavailableError("the server is not ready: it is warming up or shutting down")
        return json_answer({"ready": True})

    return router


def model_routes(service: InferenceService, settings: TransportSettings, regions: Regions) -> APIRouter:
    """Routes for metadata of the server and the models, and for the models' configuration, readiness and statistics."""
    router = APIRouter(prefix="/v2", tags=["metadata"], dependencies=require(Access.INFERENCE, settings))

    @router.get("", summary="The server", responses={200: {"model": schemas.Server}, **errors(401)})
    async def server() -> Response:
        return json_answer(server_values(service.server_metadata(), regions))

    # These routes precede those of a model, which would take "stats" for a model's name.
    @router.get("/models/stats", summary="Statistics of all models", responses=_documented(schemas.Statistics))
    async def all_statistics() -> Response:
        return json_answer(statistics_values(service.statistics()))

    @router.get(MODEL, summary="A model's inputs, outputs and labels", responses=_documented(schemas.Model))
    @router.get(VERSION, summary="Inputs, outputs and labels of one version", responses=_documented(schemas.Model))
    async def metadata(model: str, version: str = "") -> Response:
        found = service.model_metadata(model, version)
        more = {"labels": list(found.labels), "parameters": dict(found.parameters)}
        return json_answer({**metadata_values(found), **more})

    @router.get(f"{MODEL}/ready", summary="Is a model ready?", responses=_documented(schemas.ModelReady))
    @router.get(f"{VERSION}/ready", summary="Is a version ready?", responses=_documented(schemas.ModelReady))
    async def ready(model: str, version: str = "") -> Response:
        if not service.model_ready(model, version):
            raise NotFoundError(f"model {shown(model)} is not ready or does not exist")
        return json_answer({"name": model, "ready": True})

    @router.get(f"{MODEL}/config", summary="A model's Triton configuration", responses=_documented(dict[str, Any]))
    @router.get(f"{VERSION}/config", summary="Configuration of one version", responses=_documented(dict[str, Any]))
    async def config(model: str, version: str = "") -> Response:
        return json_answer(config_values(service.model_metadata(model, version)))

    @router.get(f"{MODEL}/stats", summary="A model's statistics", responses=_documented(schemas.Statistics))
    @router.get(f"{VERSION}/stats", summary="Statistics of one version", responses=_documented(schemas.Statistics))
    async def statistics(model: str, version: str = "") -> Response:
        return json_answer(statistics_values(service.statistics(model, version)))

    return router


def _documented(model: Any) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": model}, **errors(400, 401, 404)}


def repository_routes(service: InferenceService, settings: TransportSettings) -> APIRouter:
    """Routes for the repository index, and for loading and unloading models."""
    router = APIRouter(prefix="/v2/repository", tags=["repository"])

    @router.post(
        "/index",
        summary="List every model, loaded or not",
        dependencies=require(Access.INFERENCE, settings),
        responses={200: {"model": list[schemas.IndexedModel]}, **errors(400, 401, 413)},
        openapi_extra=_body("IndexRequest"),
    )
    async def index(request: Request) -> Response:
        ready = (await read_object(request, settings)).get("ready", False)
        if not isinstance(ready, bool):
            raise BadRequestError(f"'ready' must be true or false, it is {shown(ready)}")
        return json_answer(index_values(service.index(ready)))

    async def read_control(model: str, request: Request) -> None:
        record_of(request).model = model
        parameters = (await read_object(request, settings)).get("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            raise BadRequestError("'parameters' must be an object")
        refuse_overrides(parameters or {})

    controlled: dict[str, Any] = {
        "dependencies": require(Access.CONTROL, settings),
        "responses": {200: {"description": "Done"}, **errors(400, 401, 403, 404, 413, 503)},
        "openapi_extra": _body("RepositoryRequest"),
    }

    @router.post("/models/{model}/load", summary="Load a model or its new version", **controlled)
    async def load(model: str, request: Request) -> Response:
        await read_control(model, request)
        await service.load(model)
        return json_answer({})

    @router.post("/models/{model}/unload", summary="Unload a model", **controlled)
    async def unload(model: str, request: Request) -> Response:
        await read_control(model, request)
        await service.unload(model)
        return json_answer({})

    return router


def _body(schema: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"requestBody": {"required": False, "content": content}}
