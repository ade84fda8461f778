"""The calls of the Open Inference Protocol v2 over gRPC.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_grpc.md
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

from tritonclient.grpc import service_pb2

from prompttune.serve.messages import InferRequest, ServeError, UnsupportedError
from prompttune.serve.protocol import grpc_codec
from prompttune.serve.protocol.calls import SharedState
from prompttune.serve.protocol.codec import refuse_overrides
from prompttune.serve.protocol.describe import (
    LOG_SETTINGS,
    NO_LOG_CHANGES,
    NO_TRACE_CHANGES,
    TRACE_SETTINGS,
    config_values,
    server_metadata,
)
from prompttune.serve.protocol.logs import RequestRecord, answered
from prompttune.serve.protocol.settings import TransportSettings
from prompttune.serve.service.service import Service

_LONGEST_S = 365 * 24 * 3600
_LOG_FIELDS: dict[type, str] = {bool: "bool_param", int: "uint32_param", str: "string_param"}


def plain_calls(service: Service, settings: TransportSettings, state: SharedState) -> dict[str, Callable[..., Any]]:
    """Every call except inference, by name: from a message to the reply's values, or to an awaitable of them."""
    regions, cuda = state.regions, state.cuda_regions

    async def control(change: Callable[[str], Awaitable[None]], message: Any) -> None:
        refuse_overrides(message.parameters)
        await change(message.model_name)

    def trace(message: Any) -> Any:
        if message.settings:
            raise UnsupportedError(NO_TRACE_CHANGES)
        if message.model_name:
            service.model_metadata(message.model_name)
        values = {name: [value] if isinstance(value, str) else value for name, value in TRACE_SETTINGS.items()}
        return {"settings": {name: {"value": value} for name, value in values.items()}}

    def log(message: Any) -> Any:
        if message.settings:
            raise UnsupportedError(NO_LOG_CHANGES)
        return {"settings": {name: {_LOG_FIELDS[type(value)]: value} for name, value in LOG_SETTINGS.items()}}

    return {
        "ServerLive": lambda _: {"live": service.live()},
        "ServerReady": lambda _: {"ready": service.ready()},
        "ModelReady": lambda one: {"ready": service.model_ready(one.name, one.version)},
        "ServerMetadata": lambda _: server_metadata(service, regions),
        "ModelMetadata": lambda one: service.model_metadata(one.name, one.version),
        "ModelConfig": lambda one: {
            "config": config_values(service.model_metadata(one.name, one.version), settings.limits.rows)
        },
        "ModelStatistics": lambda one: {"model_stats": service.statistics(one.name, one.version)},
        "RepositoryIndex": lambda one: {"models": service.index(one.ready)},
        "RepositoryModelLoad": functools.partial(control, service.load),
        "RepositoryModelUnload": functools.partial(control, service.unload),
        "SystemSharedMemoryStatus": lambda one: {"regions": {kept["name"]: kept for kept in regions.status(one.name)}},
        "SystemSharedMemoryRegister": lambda one: regions.register(one.name, one.key, one.offset, one.byte_size),
        "SystemSharedMemoryUnregister": lambda one: regions.unregister(one.name),
        "CudaSharedMemoryStatus": lambda one: cuda.status(one.name),
        "CudaSharedMemoryRegister": lambda _: cuda.check_allowed(),
        "CudaSharedMemoryUnregister": lambda one: cuda.unregister(one.name),
        "TraceSetting": trace,
        "LogSettings": log,
    }


class InferenceCalls:
    """``ModelInfer`` and ``ModelStreamInfer``."""

    def __init__(self, service: Service, settings: TransportSettings, state: SharedState) -> None:
        self._service = service
        self._settings = settings
        self._state = state

    async def answer(self, message: Any, context: Any, record: RequestRecord) -> Any:
        """Answer one request; the call's deadline applies to it, and cancelling the call cancels it."""
        record.model, record.version = message.model_name, message.model_version
        spans = grpc_codec.output_spans(message, self._state.regions)
        request = await self._decode(message, time_left(context))
        record.describe(request)
        response = await self._service.infer(request)
        record.version = response.version
        return grpc_codec.encode_response(response, spans)

    def answer_stream(self, messages: AsyncIterator[Any], context: Any) -> AsyncGenerator[Any, None]:
        """Answer the requests of a stream, each as soon as it is done."""

        async def answer(message: Any, record: RequestRecord) -> Any:
            with self._state.calls.inside():
                return await self.answer(message, context, record)

        return answer_stream(messages, answer, self._settings.stream_requests)

    async def _decode(self, message: Any, timeout_s: float | None) -> InferRequest:
        arguments = (message, self._settings.limits, timeout_s, self._state.regions)
        if grpc_codec.is_small(message):
            return grpc_codec.decode_request(*arguments)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._state.decoders, grpc_codec.decode_request, *arguments)


def time_left(context: Any) -> float | None:
    """Seconds until the call's deadline; None without a deadline."""
    left: float | None = context.time_remaining()
    return None if left is None or left > _LONGEST_S else max(left, 0.0)


async def answer_stream(
    messages: AsyncIterator[Any], answer: Callable[[Any, RequestRecord], Awaitable[Any]], limit: int
) -> AsyncGenerator[Any, None]:
    """Answers in the order in which they are ready; at most ``limit`` requests run at once.

    An error is also an answer and does not end the stream. When the client leaves, everything is cancelled.
    """
    room = asyncio.Semaphore(limit)
    done: asyncio.Queue[Any] = asyncio.Queue()

    async def run(message: Any) -> None:
        await done.put(await _stream_answer(message, answer))

    async def read() -> None:
        # Leaving the group waits for every answer.
        async with asyncio.TaskGroup() as running:
            async for message in messages:
                await room.acquire()
                running.create_task(run(message))

    reading = asyncio.create_task(read())
    reading.add_done_callback(lambda _: done.put_nowait(None))
    try:
        while (response := await done.get()) is not None:
            yield response
            room.release()
        await reading
    finally:
        reading.cancel()
        await asyncio.wait((reading,))


async def _stream_answer(message: Any, answer: Callable[[Any, RequestRecord], Awaitable[Any]]) -> Any:
    record = RequestRecord("grpc", "ModelStreamInfer")

    async def work() -> Any:
        return service_pb2.ModelStreamInferResponse(infer_response=await answer(message, record))

    async def refuse(problem: ServeError) -> Any:
        """An error reply, with the fields that tell the client which request it answers."""
        named = service_pb2.ModelInferResponse(
            model_name=message.model_name, model_version=message.model_version, id=message.id
        )
        return service_pb2.ModelStreamInferResponse(error_message=str(problem), infer_response=named)

    response = await answered(record, work(), refuse)
    # A model here answers each request once, so every answer is its request's last.
    response.infer_response.parameters[grpc_codec.FINAL_RESPONSE].bool_param = True
    return response
