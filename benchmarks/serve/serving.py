"""A server in a process of its own, and clients in another, as the benchmarks of serving share them."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

import prompttune as pt
from benchmarks.common import Model
from benchmarks.engines import CONFIGS, draw_task
from prompttune.serve.memory import resident_bytes

RESULTS = Path(__file__).parent / "results"
READY_S, LEAVE_S = 120, 60
TINY = Model("test_vit", 160, "random")
SMALL = Model("vit_small_patch14_dinov2", 224, "random")
"""ViT-S/14; what its numbers are changes no speed."""
MODELS = {"tiny": TINY, "vit-s": SMALL}


def make_engine(
    folder: Path, model: Model, tasks: int, classes: int = 10, bank_precision: str = "fp32", method: str = "sa2vp"
) -> Path:
    """An engine with ``tasks`` drawn tasks."""
    backbone = model.load()
    checkpoint = folder / "checkpoint"
    pt.PromptModel(backbone, CONFIGS[method], num_classes=classes).save(checkpoint)
    engine = folder / "engine"
    click.echo(f"exporting {model.backbone} at {model.image_size}", err=True)
    settings = pt.ExportSettings(bank_precision=bank_precision)
    exported = pt.export_engine({"task0": checkpoint}, engine, format=settings, parity=False)
    like = exported.read_task("task0")
    for number in range(tasks):
        exported.write_task(f"task{number}", draw_task(like, number), replace=number == 0)
    return engine


@dataclass
class Running:
    """A server that listens."""

    process: subprocess.Popen[str]
    http: str
    grpc: str
    lines: list[str] = field(default_factory=list)

    def get(self, path: str) -> Any:
        """JSON of a GET."""
        with urllib.request.urlopen(self.http + path, timeout=30) as answer:
            return json.load(answer)

    def status(self) -> dict[str, Any]:
        """What ``/status`` says."""
        found: dict[str, Any] = self.get("/status")
        return found

    def counted(self, name: str) -> float:
        """A metric without labels."""
        with urllib.request.urlopen(self.http + "/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    def worker_pids(self) -> list[int]:
        """Process ids of the engine's workers, by what the kernel says of the children."""
        return [pid for pid in _children(self.process.pid) if "prompttune.serve.workers" in _command(pid)]

    def resident_bytes(self) -> int:
        """Resident set of the server and its workers; pages that they share count twice."""
        return sum(resident_bytes(pid) or 0 for pid in (self.process.pid, *_children(self.process.pid)))


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in tasks.read_text().split():
            found += [int(child), *_children(int(child))]
    return found


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


@contextmanager
def launched(engine: Path, *options: str, log: Path | None = None) -> Iterator[Running]:
    """``prompttune serve`` on free ports, ready; stopped with SIGTERM at the end."""
    command = [sys.executable, "-m", "prompttune.cli.main", "serve", str(engine)]
    command += ["--http-port", "0", "--grpc-port", "0", "--log-level", "warning", *options]
    with (log or Path(os.devnull)).open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            found = re.search(r"(https?://[^\s,;]+)(?:, gRPC ([^\s;]+))?", first)
            if found is None:
                raise click.ClickException(f"the server did not start: {first.strip() or 'see its log'}")
            running = Running(process, found[1], found[2] or "")
            wait_ready(running)
            yield running
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(LEAVE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_ready(running: Running) -> None:
    """Until the server says that it is."""
    until = time.monotonic() + READY_S
    while time.monotonic() < until:
        with suppress(OSError):
            urllib.request.urlopen(running.http + "/v2/health/ready", timeout=5).close()
            return
        if running.process.poll() is not None:
            raise click.ClickException("the server ended while it started")
        time.sleep(0.1)
    raise click.ClickException("the server does not become ready")


# ------------------------------------------------------------------------------------------------------------ clients


@dataclass(frozen=True)
class Load:
    """What clients ask for, each one request at a time."""

    grpc: str
    seconds: float
    clients: int
    rows: int
    """Images of a request."""
    image_size: int
    tasks: Sequence[str]
    zipf: float = 0.0
    """Exponent of the tasks' popularity; 0 asks for all alike."""
    seed: int = 0


@dataclass(frozen=True)
class Seen:
    """What clients saw."""

    milliseconds: Sequence[float]
    """Of each request that was answered."""
    rows: int
    errors: Mapping[str, int]
    """Status → requests."""
    seconds: float
    """From the first request to the last answer."""

    def percentile(self, share: float) -> float:
        """Milliseconds that ``share`` per cent of the requests did not exceed."""
        return float(np.percentile(self.milliseconds, share))

    @property
    def rows_per_s(self) -> float:
        """Images answered a second."""
        return self.rows / self.seconds


def drive(load: Load) -> Seen:
    """Run the clients in a process of their own, so that they share no interpreter with what is measured."""
    values = json.dumps({**load.__dict__, "tasks": list(load.tasks)})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serve.serving"],
        input=values,
        capture_output=True,
        text=True,
        timeout=load.seconds + 120,
        check=False,
    )
    if done.returncode:
        raise click.ClickException(f"the clients failed: {done.stderr.strip().splitlines()[-1:]}")
    return Seen(**json.loads(done.stdout))


def popularity(tasks: int, exponent: float) -> np.ndarray:
    """Chance of each task, the first the most popular."""
    weights = 1.0 / np.arange(1, tasks + 1) ** exponent
    return weights / weights.sum()


_INFER = "/inference.GRPCInferenceService/ModelInfer"


async def _run(load: Load) -> Seen:
    """Requests are serialised once and sent as bytes: what a client spends on them, the server's machine has less."""
    import grpc
    from tritonclient.grpc import service_pb2

    chance = np.random.default_rng(load.seed)
    image = chance.standard_normal((load.rows, 3, load.image_size, load.image_size), dtype=np.float32)
    order = chance.choice(len(load.tasks), size=200_000, p=popularity(len(load.tasks), load.zipf))

    @functools.cache
    def request(task: str) -> bytes:
        tensor = service_pb2.ModelInferRequest.InferInputTensor(name="image", datatype="FP32", shape=image.shape)
        output = service_pb2.ModelInferRequest.InferRequestedOutputTensor(name="logits")
        message = service_pb2.ModelInferRequest(
            model_name=task, inputs=[tensor], outputs=[output], raw_input_contents=[image.tobytes()]
        )
        return message.SerializeToString()

    took: list[float] = []
    errors: dict[str, int] = {}
    asked = 0
    async with grpc.aio.insecure_channel(load.grpc, options=[("grpc.max_send_message_length", -1)]) as channel:
        infer = channel.unary_unary(_INFER, response_deserializer=service_pb2.ModelInferResponse.FromString)
        for task in load.tasks if load.clients > len(load.tasks) else ():
            request(task)
        began = time.perf_counter()
        until = began + load.seconds

        async def ask() -> None:
            nonlocal asked
            while time.perf_counter() < until:
                task = load.tasks[order[asked % len(order)]]
                asked += 1
                start = time.perf_counter()
                try:
                    answer = await infer(request(task))
                except grpc.aio.AioRpcError as problem:
                    errors[problem.code().name] = errors.get(problem.code().name, 0) + 1
                    await asyncio.sleep(0.05)
                else:
                    took.append((time.perf_counter() - start) * 1000)
                    assert answer.outputs[0].shape[0] == load.rows

        await asyncio.gather(*(ask() for _ in range(load.clients)))
        seconds = time.perf_counter() - began
    return Seen(took, len(took) * load.rows, errors, seconds)


if __name__ == "__main__":
    json.dump(asyncio.run(_run(Load(**json.load(sys.stdin)))).__dict__, sys.stdout)
