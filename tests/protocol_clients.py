"""The four clients of tritonclient behind one synchronous face, so that one test runs through all of them."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio

from tests.fake_service import Running

MODULES = {
    "http": tritonclient.http,
    "http-aio": tritonclient.http.aio,
    "grpc": tritonclient.grpc,
    "grpc-aio": tritonclient.grpc.aio,
}
IMAGE = np.arange(2 * 3 * 4 * 4, dtype=np.float32).reshape(2, 3, 4, 4)
LOGITS = IMAGE.reshape(2, -1).sum(axis=1)[:, None] + np.arange(3, dtype=np.float32)


class Client:
    """Any client; its coroutines are awaited on a loop of its own."""

    def __init__(self, kind: str, running: Running, **options: Any) -> None:
        self.kind = kind
        self.is_http = kind.startswith("http")
        self.module = MODULES[kind]
        self._loop = asyncio.new_event_loop()
        self._client: Any = self._loop.run_until_complete(
            self._make(running.http if self.is_http else running.grpc, options)
        )

    async def _make(self, url: str, options: dict[str, Any]) -> Any:
        # aiohttp's session wants a running loop.
        return self.module.InferenceServerClient(url, **options)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **options: Any) -> Any:
            found = method(*arguments, **options)
            return self._loop.run_until_complete(found) if inspect.isawaitable(found) else found

        return call

    def values(self, name: str, *arguments: Any, **options: Any) -> Any:
        """What a call gives, as JSON values over either transport."""
        if not self.is_http:
            options["as_json"] = True
        return getattr(self, name)(*arguments, **options)

    def image(self, images: np.ndarray = IMAGE, datatype: str = "FP32", **options: Any) -> Any:
        """The input ``image``."""
        tensor = self.module.InferInput("image", images.shape, datatype)
        tensor.set_data_from_numpy(images, **options)
        return tensor

    def output(self, name: str, **options: Any) -> Any:
        """An output that is wanted."""
        return self.module.InferRequestedOutput(name, **options)

    def shut(self) -> None:
        """Close the client and its loop."""
        self.close()
        self._loop.close()


@contextlib.contextmanager
def connected(kind: str, running: Running, **options: Any) -> Iterator[Client]:
    """A client that is closed at the end."""
    client = Client(kind, running, **options)
    try:
        yield client
    finally:
        client.shut()
