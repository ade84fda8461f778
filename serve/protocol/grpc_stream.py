"""A stream of requests over gRPC: many run at once, and each is answered as soon as it is done."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

from tritonclient.grpc import service_pb2

from prompttune.serve.messages import ServeError
from prompttune.serve.protocol.grpc_codec import FINAL_RESPONSE
from prompttune.serve.protocol.logs import RequestRecord

logger = logging.getLogger(__name__)


async def answer_stream(
    messages: AsyncIterator[Any], answer: Callable[[Any, RequestRecord], Awaitable[Any]], limit: int
) -> AsyncGenerator[Any, None]:
    """Answers in the order in which they are ready; at most ``limit`` requests run at once.

    An error is also an answer and does not end the stream. When the client leaves, everything is cancelled.
    """
    room = asyncio.Semaphore(limit)
    done: asyncio.Queue[Any] = asyncio.Queue()

    async def run(message: Any) -> None:
        await done.put(await _answer(message, answer))

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


async def _answer(message: Any, answer: Callable[[Any, RequestRecord], Awaitable[Any]]) -> Any:
    record = RequestRecord("grpc", "ModelStreamInfer")
    status = "CANCELLED"
    try:
        response = await answer(message, record)
        # A model here answers each request once, so every answer is its request's last.
        response.parameters[FINAL_RESPONSE].bool_param = True
        status = "OK"
        return service_pb2.ModelStreamInferResponse(infer_response=response)
    except ServeError as problem:
        status = problem.grpc_status
        return _failure(message, str(problem))
    except Exception:
        logger.exception("request %s failed", record.request_id)
        status = "INTERNAL"
        return _failure(message, f"internal error; the log has it under request {record.request_id}")
    finally:
        record.finish(status)


def _failure(message: Any, error: str) -> Any:
    """An error reply, with the fields that tell the client which request it answers."""
    response = service_pb2.ModelInferResponse(
        model_name=message.model_name, model_version=message.model_version, id=message.id
    )
    response.parameters[FINAL_RESPONSE].bool_param = True
    return service_pb2.ModelStreamInferResponse(error_message=error, infer_response=response)
