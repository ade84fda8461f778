"""Triton's extensions besides inference: shared memory, traces and log settings.

Unsupported parts report their true state (nothing registered, nothing traced); changes are refused with status 501.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from prompttune.serve.messages import UnsupportedError
from prompttune.serve.protocol.describe import (
    LOG_SETTINGS,
    NO_LOG_CHANGES,
    NO_TRACE_CHANGES,
    TRACE_SETTINGS,
)
from prompttune.serve.protocol.rest_shared import errors, json_answer, read_object, require
from prompttune.serve.protocol.security import Access
from prompttune.serve.protocol.service import InferenceService
from prompttune.serve.protocol.settings import TransportSettings
from prompttune.serve.protocol.shared_memory import Regions


def extension_routes(service: InferenceService, settings: TransportSettings, regions: Regions) -> APIRouter:
    """Routes for shared memory, trace and log settings."""
    router = APIRouter(prefix="/v2", tags=["extensions"], dependencies=require(Access.INFERENCE, settings))
    _add_shared_memory(router, "systemsharedmemory", regions, settings)
    _add_shared_memory(router, "cudasharedmemory", Regions(allowed=False, kind="CUDA"), settings)

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
        told = await read_object(request, settings)
        regions.register(name, told.get("key"), told.get("offset", 0), told.get("byte_size"))
        return json_answer({})

    @router.post(f"/{kind}/unregister", summary="Unregister all regions", responses=errors(401))
    @router.post(f"{region}/unregister", summary="Unregister a region", responses=errors(401), openapi_extra=_NAME)
    async def unregister(request: Request) -> Response:
        regions.unregister(request.path_params.get("name", ""))
        return json_answer({})


def _path_parameter(name: str) -> dict[str, Any]:
    return {"parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]}


_NAME, _MODEL = _path_parameter("name"), _path_parameter("model")
