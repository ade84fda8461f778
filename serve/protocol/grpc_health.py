"""gRPC's own health protocol, which load balancers and Kubernetes use.

https://github.com/grpc/grpc/blob/master/doc/health-checking.md
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from grpc_health.v1 import health_pb2

from prompttune.serve.messages import NotFoundError, shown
from prompttune.serve.protocol.calls import Calls
from prompttune.serve.service.service import Service

SERVER_NAMES = ("", "inference.GRPCInferenceService")
"""Services that stand for the whole server; any other name is that of a model."""
LOOK_EVERY_S = 0.25


class Health:
    """Status of the server and of each model, read from the service at each call."""

    def __init__(self, service: Service, calls: Calls) -> None:
        self._service = service
        self._calls = calls

    def status(self, name: str) -> Any:
        """A ``ServingStatus``; it is never ``SERVING`` while the server is stopping."""
        states = health_pb2.HealthCheckResponse
        ready = self._service.ready() if name in SERVER_NAMES else self._service.model_ready(name)
        if ready and not self._calls.leaving:
            return states.SERVING
        if name not in SERVER_NAMES:
            try:
                self._service.statistics(name)
            except NotFoundError:
                return states.SERVICE_UNKNOWN
        return states.NOT_SERVING

    def check(self, message: Any) -> Any:
        """The current status; raises :class:`NotFoundError` for an unknown model."""
        status = self.status(message.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            raise NotFoundError(f"unknown model {shown(message.service)}")
        return health_pb2.HealthCheckResponse(status=status)

    async def watch(self, message: Any) -> AsyncGenerator[Any, None]:
        """The current status and each change; ends after reporting that the server is stopping."""
        last = None
        while True:
            leaving = self._calls.leaving
            status = self.status(message.service)
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
            if leaving:
                return
            last = status
            await asyncio.sleep(LOOK_EVERY_S)
