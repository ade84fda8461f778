"""Routes for people and their tools: the web page, its data, metrics and the documentation."""

from __future__ import annotations

from pathlib import Path

import fastapi_offline
from fastapi import APIRouter, FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from prompttune.serve.protocol.rest_shared import errors, json_answer, require
from prompttune.serve.protocol.security import Access
from prompttune.serve.protocol.service import InferenceService
from prompttune.serve.protocol.settings import TransportSettings

_COMMON = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
_POLICY = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
PAGE_HEADERS = {**_COMMON, "Content-Security-Policy": f"{_POLICY}; img-src 'self' blob: data:"}
"""Headers of the web page. They allow only the server's own content, without inline scripts, and dropped images."""
DOCS_HEADERS = {
    **_COMMON,
    "Content-Security-Policy": f"{_POLICY}; img-src 'self' data:; style-src 'self' 'unsafe-inline'",
}
"""Headers of the documentation: Swagger UI needs inline styles and draws its icons from data URLs."""

_SWAGGER = Path(fastapi_offline.__file__).parent / "static"
_DOCS_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>prompttune: API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/assets/swagger-ui.css">
</head>
<body>
<div id="docs"></div>
<script src="docs/assets/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
_DOCS_SCRIPT = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#docs", deepLinking: true, validatorUrl: null});\n'


class _Files(StaticFiles):
    """A folder whose files are sent with the page's headers."""

    def __init__(self, folder: Path, headers: dict[str, str]) -> None:
        super().__init__(directory=folder, check_dir=False)
        self._headers = headers

    async def get_response(self, path: str, scope: Scope) -> Response:
        """The file, or status 304 if it has not changed."""
        response = await super().get_response(path, scope)
        response.headers.update(self._headers)
        return response


def status_routes(service: InferenceService, settings: TransportSettings) -> APIRouter:
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


def add_pages(application: FastAPI, settings: TransportSettings) -> None:
    """Add the page at ``/`` and the documentation at ``/docs``; both hold no data and work offline."""

    @application.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(settings.page / "index.html", headers=PAGE_HEADERS)

    @application.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(_DOCS_PAGE, headers=DOCS_HEADERS)

    @application.get("/docs/start.js", include_in_schema=False)
    async def docs_script() -> Response:
        return Response(_DOCS_SCRIPT, media_type="text/javascript", headers=DOCS_HEADERS)

    application.mount("/page", _Files(settings.page, PAGE_HEADERS))
    application.mount("/docs/assets", _Files(_SWAGGER, DOCS_HEADERS))
