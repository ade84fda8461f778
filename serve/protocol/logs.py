"""Structured logs: one JSON object per line, and one line for each request.

A line never holds a token, a query string or any part of a request's body except its id, model, version and row count.
"""

from __future__ import annotations

import logging
import re
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import IO, TypeVar

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.orjson import OrjsonFormatter

from prompttune.serve.messages import InferRequest, ServeError

ACCESS = "prompttune.access"
_access = logging.getLogger(ACCESS)
LOG = logging.getLogger("prompttune.serve")
T = TypeVar("T")
_ID = re.compile(r"[!-~]+")


def configure_logs(level: int | str = logging.INFO, stream: IO[str] | None = None) -> None:
    """Write every log record of the process as a JSON line to ``stream``, standard error by default."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        OrjsonFormatter(
            "{asctime}{levelname}{name}{message}",
            style="{",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            datefmt="%Y-%m-%dT%H:%M:%S%z",
            reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn's, for terminals
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error"):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    # uvicorn's access lines hold query strings; our lines replace them.
    logging.getLogger("uvicorn.access").disabled = True


def new_request_id() -> str:
    """An id for a request without one."""
    return uuid.uuid4().hex


def usable_id(value: str, longest: int) -> str:
    """``value`` if it is fit as a request id for a header and a log, else an empty string."""
    return value if len(value) <= longest and _ID.fullmatch(value) else ""


@dataclass
class RequestRecord:
    """Log record of one request; filled while the request is answered."""

    transport: str
    """``http`` or ``grpc``."""
    operation: str
    """HTTP method and path without the query, or the name of the gRPC call."""
    request_id: str = field(default_factory=new_request_id)
    model: str = ""
    version: str = ""
    rows: int | None = None
    routine: bool = False
    """Whether this is a probe, which is logged only at debug level."""
    started: float = field(default_factory=time.perf_counter)

    def describe(self, request: InferRequest) -> None:
        """Record the id and the row count of a decoded request."""
        first = request.inputs[0].data
        self.request_id = request.id or self.request_id
        self.rows = first.shape[0] if first.ndim else None

    def finish(self, status: int | str) -> None:
        """Write the log line; ``status`` is an HTTP status code or a gRPC status name."""
        level = logging.DEBUG if self.routine else logging.INFO
        if _access.isEnabledFor(level):
            _access.log(
                level,
                "request",
                extra={
                    "transport": self.transport,
                    "operation": self.operation,
                    "request_id": self.request_id,
                    "model": self.model,
                    "version": self.version,
                    "rows": self.rows,
                    "status": status,
                    "ms": round((time.perf_counter() - self.started) * 1000, 3),
                },
            )

    def unexpected(self) -> ServeError:
        """Log the exception that is being handled; return the error that the client sees instead."""
        LOG.exception("request %s failed", self.request_id)
        return ServeError(f"internal error; the log has it under request {self.request_id}")


async def answered(record: RequestRecord, work: Awaitable[T], refuse: Callable[[ServeError], Awaitable[T]]) -> T:
    """The result of ``work``, or of ``refuse`` with the error that it raises; writes the log line of a gRPC call."""
    status = "CANCELLED"
    try:
        found = await work
        status = "OK"
        return found
    except Exception as problem:
        refused = problem if isinstance(problem, ServeError) else record.unexpected()
        status = refused.grpc_status
        return await refuse(refused)
    finally:
        record.finish(status)
