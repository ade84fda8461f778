"""Services over small engines, started and stopped within a test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import numpy as np

from prompttune.serve.messages import InferRequest, InputTensor, bytes_array
from prompttune.serve.service.assembly import EngineSettings, make_service
from prompttune.serve.service.service import ServiceSettings
from tests.engines import SIZE


@contextlib.asynccontextmanager
async def running(engine, service=None, **settings):
    """A started service; its engine in this process unless ``in_process`` says otherwise."""
    settings = {"in_process": True, "max_batch": 4, **settings}
    one = make_service(EngineSettings(engine, **settings), service or ServiceSettings())
    try:
        await one.start()
        yield one
    finally:
        await one.close()


def within(seconds, test):
    """Run a coroutine, bounded in time."""

    async def run():
        async with asyncio.timeout(seconds):
            await test

    asyncio.run(run())


def pause(pid):
    """Stop a process as SIGSTOP does, and return when none of its threads runs any more."""
    os.kill(pid, signal.SIGSTOP)
    while any(") T" not in one.read_text() for one in Path(f"/proc/{pid}/task").glob("*/stat")):
        time.sleep(0.001)


def noise(rows, seed=0):
    """Normalised float32 [rows, 3, S, S]."""
    return np.random.default_rng(seed).standard_normal((rows, 3, SIZE, SIZE)).astype(np.float32)


def request(model, images, tasks=None, **parameters):
    inputs = [InputTensor("image", {"float32": "FP32", "uint8": "UINT8"}.get(str(images.dtype), "BYTES"), images)]
    if tasks is not None:
        inputs.append(InputTensor("task", "BYTES", bytes_array(tasks)))
    return InferRequest(model, inputs, parameters=parameters)


def outputs(response):
    return {output.name: output.data for output in response.outputs}
