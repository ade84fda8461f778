"""The routes over HTTP besides inference: health, metadata, statistics, repository, Triton's extensions, figures.

Unsupported extensions report their true state (nothing registered, nothing traced) and refuse changes with status 501.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from prompttune.serve.messages import (
    IndexEntry,
    ModelMetadata,
    ModelStatistics,
    NotFoundError,
    ServerMetadata,
    UnavailableError,
    UnsupportedError,
    shown,
)
from prompttune.serve.protocol.calls import SharedState
from prompttune.serve.protocol.codec import checked, refuse_overrides
from prompttune.serve.protocol.describe import (
    LOG_SETTINGS,
    NO_LOG_CHANGES,
    NO_TRACE_CHANGES,
    TRACE_SETTINGS,
    config_values,
    server_metadata,
)
from prompttune.serve.protocol.rest_shared import errors, json_answer, read_object, record_of, require
from prompttune.serve.protocol.schemas import IndexRequest, RepositoryRequest
from prompttune.serve.protocol.security import Access
from prompttune.serve.protocol.settings import TransportSettings
from prompttune.serve.protocol.shared_memory import Regions
from prompttune.serve.service.service import Service

MODEL, VERSION = "/models/{model}", "/models/{model}/versions/{version}"


def health_routes(service: Service) -> APIRouter:
    """Liveness and readiness routes, open to probes."""
    router = APIRouter(prefix="/v2/health", tags=["health"])

    @router.get("/live", summary="Is the process alive?", responses=_documented(dict[str, bool], 503))
    async def live() -> Response:
        if not service.live():
            raise UnavailableError("the server is not healthy")
        return json_answer({"live": True})

    @router.get("/ready", summary="Is the server ready?", responses=_documented(dict[str, bool], 503))
    async def ready() -> Response:
        if not service.ready():
            raise UnavailableError("the server is not ready: it is warming up or shutting down")
        return json_answer({"ready": True})

    return router


def model_routes(service: Service, settings: TransportSettings, regions: Regions) -> APIRouter:
    """Routes for metadata of the server and the models, and for the models' configuration, readiness and statistics."""
    router = APIRouter(prefix="/v2", tags=["metadata"], dependencies=require(Access.INFERENCE, settings))
    statistics_of = _documented(dict[str, list[ModelStatistics]])

    @router.get("", summary="The server", responses=_documented(ServerMetadata, 401))
    async def server() -> Response:
        return json_answer(server_metadata(service, regions))

    # This route precedes those of a model, which would take "stats" for a model's name.
    @router.get("/models/stats", summary="Statistics of all models", responses=statistics_of)
    @router.get(f"{MODEL}/stats", summary="A model's statistics", responses=statistics_of, openapi_extra=_MODEL)
    @router.get(f"{VERSION}/stats", summary="Statistics of one version", responses=statistics_of, openapi_extra=_BOTH)
    async def statistics(request: Request) -> Response:
        named = request.path_params
        found = service.statistics(named.get("model", ""), named.get("version", ""))
        return json_answer({"model_stats": found})

    @router.get(MODEL, summary="A model's inputs, outputs and labels", responses=_documented(ModelMetadata))
    @router.get(VERSION, summary="Inputs, outputs and labels of one version", responses=_documented(ModelMetadata))
    async def metadata(model: str, version: str = "") -> Response:
        return json_answer(service.model_metadata(model, version))

    @router.get(f"{MODEL}/ready", summary="Is a model ready?", responses=_documented(dict[str, str | bool]))
    @router.get(f"{VERSION}/ready", summary="Is a version ready?", responses=_documented(dict[str, str | bool]))
    async def ready(model: str, version: str = "") -> Response:
        if not service.model_ready(model, version):
            raise NotFoundError(f"model {shown(model)} is not ready or does not exist")
        return json_answer({"name": model, "ready": True})

    @router.get(f"{MODEL}/config", summary="A model's Triton configuration", responses=_documented(dict[str, Any]))
    @router.get(f"{VERSION}/config", summary="Configuration of one version", responses=_documented(dict[str, Any]))
    async def config(model: str, version: str = "") -> Response:
        return json_answer(config_values(service.model_metadata(model, version), settings.limits.rows))

    return router


def _documented(model: Any, *statuses: int) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": model}, **errors(*statuses or (400, 401, 404))}


def repository_routes(service: Service, settings: TransportSettings) -> APIRouter:
    """Routes for the repository index, and for loading and unloading models."""
    router = APIRouter(prefix="/v2/repository", tags=["repository"])

    @router.post(
        "/index",
        summary="List every model, loaded or not",
        dependencies=require(Access.INFERENCE, settings),
        responses=_documented(list[IndexEntry], 400, 401, 413),
        openapi_extra=_body("IndexRequest"),
    )
    async def index(request: Request) -> Response:
        return json_answer(service.index(checked(IndexRequest, await read_object(request, settings)).ready))

    controlled: dict[str, Any] = {
        "dependencies": require(Access.CONTROL, settings),
        "responses": {200: {"description": "Done"}, **errors(400, 401, 403, 404, 413, 503)},
        "openapi_extra": _body("RepositoryRequest"),
    }

    async def read_control(model: str, request: Request) -> None:
        record_of(request).model = model
        refuse_overrides(checked(RepositoryRequest, await read_object(request, settings)).parameters or {})

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


def extension_routes(service: Service, settings: TransportSettings, state: SharedState) -> APIRouter:
    """Routes for shared memory, trace and log settings."""
    router = APIRouter(prefix="/v2", tags=["extensions"], dependencies=require(Access.INFERENCE, settings))
    _add_shared_memory(router, "systemsharedmemory", state.regions, settings)
    _add_shared_memory(router, "cudasharedmemory", state.cuda_regions, settings)

    @router.get("/logging", summary="Log settings", responses=errors(401))
    async def log_settings() -> Response:
        return json_answer(LOG_SETTINGS)

    @router.post("/logging", summary="Refused", responses=errors(401, 501))
    async def update_log_settings() -> Response:
        raise UnsupportedError(NO_LOG_CHANGES)

    @router.get("/trace/setting", summary="Trace settings", responses=errors(401))
    async def trace_settings() -> Response:
        return json_answer(TRACE_SETTINGS)

    @router.get("/models/{model}/trace/setting", summary="Trace settings of a model", responses=errors(401, 404))
    async def model_trace_settings(model: str) -> Response:
        service.model_metadata(model)
        return json_answer(TRACE_SETTINGS)

    @router.post("/trace/setting", summary="Refused", responses=errors(401, 501))
    @router.post("/models/{model}/trace/setting", summary="Refused", responses=errors(401, 501), openapi_extra=_MODEL)
    async def update_trace_settings() -> Response:
        raise UnsupportedError(NO_TRACE_CHANGES)

    return router


def _add_shared_memory(router: APIRouter, kind: str, regions: Regions, settings: TransportSettings) -> None:
    region = f"/{kind}/region/{{name}}"

    @router.get(f"/{kind}/status", summary="Registered regions", responses=errors(401))
    @router.get(f"{region}/status", summary="A registered region", responses=errors(401, 404), openapi_extra=_NAME)
    async def status(request: Request) -> Response:
        return json_answer(regions.status(request.path_params.get("name", "")))

    @router.post(f"{region}/register", summary="Register a region", responses=errors(400, 401, 408, 413, 501))
    async def register(name: str, request: Request) -> Response:
        regions.check_allowed()
        sent = await read_object(request, settings)
        regions.register(name, sent.get("key"), sent.get("offset", 0), sent.get("byte_size"))
        return json_answer({})

    @router.post(f"/{kind}/unregister", summary="Unregister all regions", responses=errors(401))
    @router.post(f"{region}/unregister", summary="Unregister a region", responses=errors(401), openapi_extra=_NAME)
    async def unregister(request: Request) -> Response:
        regions.unregister(request.path_params.get("name", ""))
        return json_answer({})


def status_routes(service: Service, settings: TransportSettings) -> APIRouter:
    """Routes for metrics and for the web page's data."""
    router = APIRouter(tags=["status"], dependencies=require(Access.INFERENCE, settings))

    @router.get("/metrics", summary="Prometheus metrics", responses=errors(401))
    async def metrics() -> Response:
        return Response(service.metrics(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @router.get("/status", summary="Figures of the server", responses=errors(401))
    async def status() -> Response:
        return json_answer(service.status())

    @router.get("/status/tasks", summary="Figures of each task", responses=errors(401))
    async def task_status() -> Response:
        return json_answer(service.task_status())

    return router


def _body(schema: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"requestBody": {"required": False, "content": content}}


def _path_parameters(*names: str) -> dict[str, Any]:
    return {
        "parameters": [{"name": one, "in": "path", "required": True, "schema": {"type": "string"}} for one in names]
    }


_NAME, _MODEL, _BOTH = _path_parameters("name"), _path_parameters("model"), _path_parameters("model", "version")
