"""The ingress: takes HTTP from Ray's proxies, chooses replicas by task, and asks another one if a replica dies."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from prompttune.serve.messages import SEVERAL, ServeError, UnavailableError
from prompttune.serve.protocol.body import read_body
from prompttune.serve.protocol.rest_shared import SAFE_METHODS, serve_error_answer
from prompttune.serve.protocol.security import Access
from prompttune.serve.protocol.settings import TransportSettings
from prompttune.serve.ray_serve.messages import ATTEMPTS, PAUSE_S, RequestHead, WholeAnswer

LOG = logging.getLogger("prompttune.serve")

ANSWER_S = 5.0
"""Seconds beyond a request's timeout, so that the replica itself reports the timeout."""
REPLICA_LOST = (RayActorError, NodeDiedError, ObjectLostError)
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]

_INFER = re.compile(r"/v2/models/([^/]+)(?:/versions/[^/]+)?/infer")


class Ingress:
    """Forwards whole requests. Every request can be repeated, because requests do not change a replica.

    Args:
        engine: the engine replicas.
        transport: limits and tokens.
        timeout_s: timeout of a request inside a replica, in seconds.
        affinity: whether to prefer replicas that hold the request's task.
    """

    def __init__(
        self, engine: DeploymentHandle, transport: TransportSettings, timeout_s: float, affinity: bool
    ) -> None:
        self._engine = engine.options(method_name="answer")
        self._transport = transport
        self._seconds = timeout_s + ANSWER_S
        self._affinity = affinity
        self._tasks: set[str] = set()
        """Names that a replica has answered for: Ray never forgets a name, so an invented one must not reach it."""

    def __serve_build_asgi_app__(self) -> Starlette:
        """The application that Ray runs in an ingress replica."""
        return Starlette(
            routes=[Route("/{path:path}", self._forward, methods=METHODS)],
            exception_handlers={ServeError: _error},
        )

    async def _forward(self, request: Request) -> Response:
        if request.method not in SAFE_METHODS:
            # Replicas check every call; checking here spares the ingress the body of a stranger.
            self._transport.guard.check(Access.INFERENCE, request.headers.get("authorization", ""))
        body = bytes(await read_body(request, self._transport.limits, self._transport.body_seconds))
        scope = request.scope
        path = scope["path"].removeprefix(scope["root_path"])
        headers, root_path = list(scope["headers"]), scope["root_path"]
        head = RequestHead(request.method, path, scope["query_string"], headers, scope["scheme"], root_path)
        task = _task_of(head)
        answer = await self._ask(head, body, task)
        if task and answer.status == 200:
            self._tasks.add(task)
        response = Response(answer.body, answer.status)
        # Ray's proxy sends the same id itself.
        response.raw_headers = [(name, value) for name, value in answer.headers if name != b"x-request-id"]
        return response

    async def _ask(self, head: RequestHead, body: bytes, task: str) -> WholeAnswer:
        """Ask one replica after another.

        Raises:
            UnavailableError: too many replicas died, none is available in time, or all are full.
        """
        try:
            async with asyncio.timeout(self._seconds):
                for _ in range(ATTEMPTS):
                    try:
                        return await self._ask_one(head, body, task)
                    except REPLICA_LOST as problem:
                        LOG.warning("a replica was lost with a request: %s", type(problem).__name__)
                        await asyncio.sleep(PAUSE_S)
        except (BackPressureError, DeploymentUnavailableError):
            raise UnavailableError("all replicas are busy, or none is left") from None
        except TimeoutError:
            raise UnavailableError("no replica answered in time") from None
        raise UnavailableError(f"{ATTEMPTS} replicas were lost with this request")

    async def _ask_one(self, head: RequestHead, body: bytes, task: str) -> WholeAnswer:
        known = self._affinity and task in self._tasks
        engine = self._engine.options(multiplexed_model_id=task) if known else self._engine
        answered: Any = await engine.remote(head, body, task)
        return WholeAnswer(*answered)


def _task_of(head: RequestHead) -> str:
    """The task of a request; empty if it is for several or none."""
    found = _INFER.fullmatch(head.path)
    return found[1] if found is not None and found[1] not in SEVERAL else ""


async def _error(_: Request, problem: Exception) -> Response:
    assert isinstance(problem, ServeError)
    return serve_error_answer(problem)
