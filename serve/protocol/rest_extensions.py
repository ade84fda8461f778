"""Triton's extensions that mean little here: shared memory, traces and log settings.

Asking is answered truthfully (nothing is registered, nothing is traced); changing is refused with 501.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from prompttune.serve.protocol.describe import (
    LOG_SETTINGS,
    NO_LOG_CHANGES,
    NO_SHARED_MEMORY,
    NO_TRACE_CHANGES,
    TRACE_SETTINGS,
)
from prompttune.serve.protocol.elements import shown
from prompttune.serve.protocol.rest_shared import errors, json_answer, require
from prompttune.serve.protocol.security import Access
from prompttune.serve.protocol.service import InferenceService
from prompttune.serve.protocol.settings import TransportSettings
from prompttune.serve.protocol.types import NotFoundError, UnsupportedError


def extension_routes(service: InferenceService, settings: TransportSettings) -> APIRouter:
    """Shared memory, trace and log settings."""
    router = APIRouter(prefix="/v2", tags=["extensions"], dependencies=require(Access.INFERENCE, settings))
    _add_shared_memory(router)

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


def _add_shared_memory(router: APIRouter) -> None:
    for kind in ("systemsharedmemory", "cudasharedmemory"):
        region = f"/{kind}/region/{{name}}"

        @router.get(f"/{kind}/status", summary="Registered regions: none", responses=errors(401))
        async def regions() -> Response:
            return json_answer([])

        @router.get(f"{region}/status", summary="No region is registered", responses=errors(401, 404))
        async def no_region(name: str) -> Response:
            raise NotFoundError(f"no shared memory region {shown(name)} is registered")

        @router.post(f"{region}/register", summary="Refused", responses=errors(401, 501), openapi_extra=_NAME)
        async def register() -> Response:
            raise UnsupportedError(NO_SHARED_MEMORY)

        @router.post(f"/{kind}/unregister", summary="Nothing to do", responses=errors(401))
        @router.post(f"{region}/unregister", summary="Nothing to do", responses=errors(401), openapi_extra=_NAME)
        async def unregister() -> Response:
            return json_answer({})


def _path_parameter(name: str) -> dict[str, Any]:
    return {"parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]}


_NAME, _MODEL = _path_parameter("name"), _path_parameter("model")
