"""A hub of data sets on this machine that answers what the hub's own client asks, over a folder."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"
"""The one commit of every repository."""


class Hub:
    """What the server serves, and what was asked of it."""

    def __init__(self, folder: Path, repo: str) -> None:
        self.folder, self.repo = folder, repo
        self.fetched: list[str] = []
        """Files whose content was sent."""

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def entry(self, path: str) -> dict[str, Any]:
        place = self.folder / path
        oid = hashlib.sha1(path.encode()).hexdigest()
        if place.is_dir():
            return {"type": "directory", "path": path, "oid": oid, "size": 0}
        return {"type": "file", "path": path, "oid": oid, "size": place.stat().st_size}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"  # no connection outlives the server
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        api, files = f"/api/datasets/{self.hub.repo}", f"/datasets/{self.hub.repo}/resolve/"
        if path == "/":
            self._send(b"")
        elif path.startswith(f"{api}/paths-info/"):
            self._json([self.hub.entry(one) for one in _paths(body) if (self.hub.folder / one).exists()])
        elif path.startswith((f"{api}/revision/", api)) and "/tree/" not in path:
            siblings = [{"rfilename": name} for name in self.hub.files()]
            self._json({"id": self.hub.repo, "sha": SHA, "siblings": siblings, "private": False, "gated": False})
        elif path.startswith(f"{api}/tree/"):
            self._json([self.hub.entry(name) for name in self.hub.files()])
        elif path.startswith(files):
            self._file(path.removeprefix(files).partition("/")[2])
        else:
            self._send(b"{}", status=404, headers={"X-Error-Code": "RepoNotFound"})

    def _file(self, name: str) -> None:
        place = self.hub.folder / name
        if not place.is_file():
            self._send(b"", status=404, headers={"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.hub.fetched.append(name)
        tag = hashlib.sha1(place.read_bytes()).hexdigest()
        self._send(place.read_bytes(), headers={"ETag": f'"{tag}"', "X-Repo-Commit": SHA})

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _paths(body: bytes) -> list[str]:
    """The client sends a form or JSON, by its version."""
    text = body.decode()
    if text.startswith("{"):
        paths: list[str] = json.loads(text)["paths"]
        return paths
    return parse_qs(text)["paths"]


@contextmanager
def serving(folder: Path, repo: str) -> Iterator[tuple[str, Hub]]:
    """Address and record of a hub whose one data set ``repo`` is ``folder``."""
    hub = Hub(folder, repo)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
