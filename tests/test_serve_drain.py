"""A server that is told to stop: what it still answers, what it refuses, and when it is gone."""

import asyncio
import http.client
import json
import logging
import socket
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.utils import InferenceServerException

from prompttune.serve.protocol.server import Server, ServerSettings
from prompttune.serve.service.assembly import EngineSettings
from tests.engines import exported
from tests.serving import noise, within

DRAIN_S = 0.8
LOOPBACKS = ("127.0.0.1", "::1")[: 2 if socket.has_ipv6 and Path("/proc/net/if_inet6").exists() else 1]
INFER = "/v2/models/task0/infer"
BODY = json.dumps(
    {
        "inputs": [
            {"name": "image", "datatype": "FP32", "shape": list(noise(1).shape), "data": noise(1).ravel().tolist()}
        ]
    }
)


class Asking:
    """A server whose batches never leave by themselves, and what its clients were told."""

    def __init__(self, server, addresses):
        self.server, self.grpc = server, addresses.grpc
        self.address = addresses.http.removeprefix("http://")

    def ask(self, method, path, body=None, connection=None):
        connection = connection or http.client.HTTPConnection(self.address, timeout=60)
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read(), time.monotonic()

    def unfinished(self):
        """A body that never comes to its end."""
        connection = http.client.HTTPConnection(self.address, timeout=60)
        connection.putrequest("POST", INFER)
        connection.putheader("Content-Length", "1000")
        connection.endheaders()
        connection.send(b"{")
        return connection.getresponse().status, time.monotonic()

    async def infer(self):
        image = triton.InferInput("image", list(noise(1).shape), "FP32")
        image.set_data_from_numpy(noise(1))
        async with triton.InferenceServerClient(self.grpc) as client:
            return await client.infer("task0", [image])

    async def refused(self):
        with pytest.raises(InferenceServerException) as caught:
            await self.infer()
        return caught.value.status(), time.monotonic()

    async def stream(self, *messages):
        """What a stream that stays open hears."""

        async def requests():
            for one in messages:
                yield one
            await asyncio.sleep(30)

        heard = []
        async with triton.InferenceServerClient(self.grpc) as client:
            try:
                async for _, error in client.stream_infer(requests()):
                    heard.append(str(error))
            except grpc.aio.AioRpcError as problem:
                return heard, str(problem.code()), time.monotonic()
        raise AssertionError("the stream ended well")

    async def queued(self, rows):
        """Return when so many rows wait for a batch."""
        while json.loads((await asyncio.to_thread(self.ask, "GET", "/status"))[2])["load"]["queued_rows"] < rows:
            await asyncio.sleep(0.01)

    async def health(self):
        """Every status until the server ends the watch."""
        async with grpc.aio.insecure_channel(self.grpc) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="task0"))
            return [health_pb2.HealthCheckResponse.ServingStatus.Name(one.status) async for one in watch]


def leaving(test, max_delay_s=60.0):
    """Run a test with a server, which it tells to stop; the seconds from then until its end."""

    folder = exported("sa2vp")

    async def run():
        engine = EngineSettings(folder, in_process=True, max_batch=8, max_delay_s=max_delay_s)
        settings = ServerSettings(engine, host="localhost", http_port=0, grpc_port=0, drain_s=DRAIN_S)
        listening, ready = asyncio.Future(), asyncio.Event()
        server = Server(settings, listening.set_result, ready.set)
        running = asyncio.create_task(server.run(signals=False))
        await ready.wait()
        asking = asyncio.create_task(test(Asking(server, listening.result())))
        await asyncio.wait([asking, running], return_when=asyncio.FIRST_COMPLETED)
        server.stop()
        await asking
        await running

    within(60, run())


def test_when_the_time_is_over_both_transports_say_so_together(caplog):
    image = triton.InferInput("image", list(noise(1).shape), "FP32")
    image.set_data_from_numpy(noise(1))

    async def test(one):
        waiting = [
            asyncio.create_task(work)
            for work in (
                asyncio.to_thread(one.ask, "POST", INFER, BODY),
                asyncio.to_thread(one.unfinished),
                one.refused(),
                one.stream({"model_name": "task0", "inputs": [image]}),
                one.health(),
            )
        ]
        kept = http.client.HTTPConnection(one.address, timeout=60)
        assert (await asyncio.to_thread(one.ask, "GET", "/v2/health/ready", None, kept))[0] == 200
        await one.queued(3)
        await asyncio.sleep(0.3)  # the unfinished body and the watch are in no queue
        one.server.stop()
        stopped = time.monotonic()
        status, headers, body, _ = await asyncio.to_thread(one.ask, "POST", INFER, BODY, kept)
        assert (status, headers["Connection"], headers["Retry-After"]) == (503, "close", "1")
        assert "shutting down" in json.loads(body)["error"]
        assert (await asyncio.to_thread(one.ask, "GET", "/v2/health/live"))[0] == 200
        assert (await asyncio.to_thread(one.ask, "HEAD", "/v2/health/ready"))[0] == 503
        over_http, unfinished, over_grpc, stream, health = await asyncio.gather(*waiting)
        assert (over_http[0], over_http[1]["Retry-After"]) == (503, "1")
        assert over_http[1]["Content-Type"] == "application/json"
        assert "shutting down" in json.loads(over_http[2])["error"]
        assert unfinished[0] == 503
        assert over_grpc[0] == stream[1] == "StatusCode.UNAVAILABLE"
        assert "shutting down" in stream[0][0]
        for at in (over_http[-1], unfinished[-1], over_grpc[-1], stream[-1]):
            assert DRAIN_S - 0.1 < at - stopped < DRAIN_S + 1
        assert health == ["SERVING", "NOT_SERVING"]

    exported("sa2vp")  # its own lines do not count
    caplog.clear()
    with caplog.at_level(logging.INFO):
        leaving(test)
    assert not [one for one in caplog.records if one.exc_info or one.levelno >= logging.ERROR]
    [line] = [one for one in caplog.records if "answered with 503" in one.message]
    assert line.requests == 4


def test_what_can_be_answered_in_time_is(caplog):
    async def test(one):
        waiting = asyncio.create_task(one.infer())
        await one.queued(1)
        one.server.stop()
        answer = await waiting
        assert np.isfinite(answer.as_numpy("logits")).all()

    leaving(test, max_delay_s=0.7)
    assert "answered with 503" not in caplog.text


def test_localhost_is_the_same_for_both_transports():
    async def test(one):
        _, _, port = one.address.rpartition(":")
        for host in LOOPBACKS:
            connection = http.client.HTTPConnection(host, int(port), timeout=60)
            heard = await asyncio.to_thread(one.ask, "GET", "/v2/health/live", None, connection)
            assert heard[0] == 200
            shown = f"[{host}]" if ":" in host else host
            async with triton.InferenceServerClient(f"{shown}:{one.grpc.rpartition(':')[2]}") as client:
                assert await client.is_server_ready()

    leaving(test)
