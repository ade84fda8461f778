"""``POST /v2/models/{model}/infer``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from prompttune.serve.messages import InferRequest
from prompttune.serve.protocol import body as bodies
from prompttune.serve.protocol import codec, schemas
from prompttune.serve.protocol.calls import SharedState
from prompttune.serve.protocol.codec import OutputForm, Target
from prompttune.serve.protocol.rest_shared import allow, errors, record_of, require, sent_id
from prompttune.serve.protocol.security import Access
from prompttune.serve.protocol.settings import TransportSettings
from prompttune.serve.service.service import Service

INLINE_JSON, INLINE_BODY = 32 * 1024, 2**20
"""Largest JSON and largest body in bytes to decode on the event loop."""
HEADER_LENGTH = "Inference-Header-Content-Length"
T = TypeVar("T")

_BODY = {
    "requestBody": {
        "required": True,
        "description": "JSON, or JSON followed by raw tensors (then the header Inference-Header-Content-Length gives "
        "the JSON's length), also compressed as gzip or deflate.",
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/InferenceRequest"},
                "example": schemas.INFERENCE_EXAMPLE,
            }
        },
    }
}
_DOCUMENTED: dict[str, Any] = {
    "responses": {200: {"model": schemas.InferenceResponse}, **errors(400, 401, 404, 408, 413, 415, 501, 503, 504)},
    "openapi_extra": _BODY,
    "tags": ["inference"],
}


def _direct(settings: TransportSettings) -> type[APIRoute]:
    """Routes that allow inference and call their function with the path's parameters: FastAPI documents them, but
    solves no dependencies per request."""

    class Direct(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            async def answer(request: Request) -> Response:
                allow(request, Access.INFERENCE, settings)
                response: Response = await self.endpoint(request=request, **request.path_params)
                return response

            return answer

    return Direct


def inference_routes(service: Service, settings: TransportSettings, state: SharedState) -> APIRouter:
    """The two paths of inference: with and without a version."""
    router = APIRouter(route_class=_direct(settings), dependencies=require(Access.INFERENCE, settings))
    limits, regions = settings.limits, state.regions

    def decode(
        body: bytearray, length: str | None, compressed: bool, target: Target
    ) -> tuple[InferRequest, OutputForm]:
        plain = bodies.decompress(body, limits) if compressed else body
        return codec.decode_request(plain, codec.header_length(length, len(plain)), target, limits, regions)

    @router.post("/v2/models/{model}/infer", summary="Classify images", **_DOCUMENTED)
    @router.post("/v2/models/{model}/versions/{version}/infer", summary="Classify with one version", **_DOCUMENTED)
    async def infer(model: str, request: Request, version: str = "") -> Response:
        record = record_of(request)
        record.model, record.version = model, version
        body = await bodies.read_body(request, limits, settings.body_seconds)
        length = request.headers.get(HEADER_LENGTH)
        compressed = bodies.check_encoding(request.headers.get("content-encoding", ""))
        work = (body, length, compressed, Target(model, version, sent_id(request.headers, limits.id_length)))
        # A small request may point to large tensors in shared memory.
        if not compressed and not regions.allowed and _is_small(length, len(body)):
            decoded, form = decode(*work)
        else:
            decoded, form = await asyncio.get_running_loop().run_in_executor(state.decoders, decode, *work)
        record.describe(decoded)
        response = await unless_gone(request, service.infer(decoded))
        record.version = response.version
        return await _respond(codec.encode_response(response, form), request.headers.get("accept-encoding", ""))

    return router


def _is_small(length: str | None, size: int) -> bool:
    """Whether a body of ``size`` bytes is decoded on the event loop, in well under a millisecond."""
    json_bytes = codec.header_length(length, size)
    return size <= INLINE_BODY and (size if json_bytes is None else json_bytes) <= INLINE_JSON


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled if the client leaves first.

    Raises:
        starlette.requests.ClientDisconnect: the client left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait((working,))


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _respond(encoded: codec.EncodedResponse, accept: str) -> Response:
    headers = {"Vary": "Accept-Encoding"}
    media_type = "application/json"
    if encoded.header_length is not None:
        media_type = "application/octet-stream"
        headers[HEADER_LENGTH] = str(encoded.header_length)
    content = encoded.body
    encoding = bodies.accepted_encoding(accept) if len(content) >= bodies.COMPRESS_FROM else None
    if encoding is not None:
        headers["Content-Encoding"] = encoding
        content = await asyncio.to_thread(bodies.compress, content, encoding)
    return Response(content, 200, headers, media_type=media_type)
