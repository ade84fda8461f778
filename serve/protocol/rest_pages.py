"""The web page and the documentation of the API."""

from __future__ import annotations

from pathlib import Path

import fastapi_offline
from fastapi import FastAPI
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from prompttune.serve.protocol.settings import PAGE, TransportSettings

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


def add_pages(application: FastAPI, settings: TransportSettings) -> None:
    """Add the page at ``/`` and the documentation at ``/docs``; both hold no data and work offline."""

    @application.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(settings.page / "index.html", headers=PAGE_HEADERS)

    @application.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return FileResponse(PAGE / "docs.html", headers=DOCS_HEADERS)

    @application.get("/docs/start.js", include_in_schema=False)
    async def docs_script() -> Response:
        return FileResponse(PAGE / "docs.js", headers=DOCS_HEADERS)

    application.mount("/page", _Files(settings.page, PAGE_HEADERS))
    application.mount("/docs/assets", _Files(_SWAGGER, DOCS_HEADERS))
