"""Inference over gRPC, one request at a time or in a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from prompttune.serve.messages import InferRequest
from prompttune.serve.protocol import grpc_codec
from prompttune.serve.protocol.decoding import Decoders
from prompttune.serve.protocol.grpc_stream import answer_stream
from prompttune.serve.protocol.logs import RequestRecord
from prompttune.serve.protocol.service import InferenceService
from prompttune.serve.protocol.settings import TransportSettings
from prompttune.serve.protocol.state import State

_LONGEST_S = 365 * 24 * 3600


class Inference:
    """``ModelInfer`` and ``ModelStreamInfer``."""

    def __init__(self, service: InferenceService, settings: TransportSettings, state: State) -> None:
        self._service = service
        self._settings = settings
        self._calls = state.calls
        self._regions = state.regions
        self._threads = Decoders()

    async def answer(self, message: Any, context: Any, record: RequestRecord) -> Any:
        """Answer one request; the call's deadline applies to it, and cancelling the call cancels it."""
        record.model, record.version = message.model_name, message.model_version
        spans = grpc_codec.output_spans(message, self._regions)
        request = await self._decode(message, time_left(context))
        record.describe(request)
        response = await self._service.infer(request)
        record.version = response.version
        return grpc_codec.encode_response(response, spans)

    def answer_stream(self, messages: AsyncIterator[Any], context: Any) -> AsyncGenerator[Any, None]:
        """Answer the requests of a stream, each as soon as it is done."""

        async def answer(message: Any, record: RequestRecord) -> Any:
            with self._calls.inside():
                return await self.answer(message, context, record)

        return answer_stream(messages, answer, self._settings.stream_requests)

    async def _decode(self, message: Any, timeout_s: float | None) -> InferRequest:
        limits = self._settings.limits
        if grpc_codec.is_small(message):
            return grpc_codec.decode_request(message, limits, timeout_s, self._regions)
        return await self._threads.run(grpc_codec.decode_request, message, limits, timeout_s, self._regions)


def time_left(context: Any) -> float | None:
    """Seconds until the call's deadline; None without a deadline."""
    left: float | None = context.time_remaining()
    return None if left is None or left > _LONGEST_S else max(left, 0.0)
