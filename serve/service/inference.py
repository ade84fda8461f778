"""The path of an inference request: check, admit, decode, batch, write the answer."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from numpy.typing import NDArray

from prompttune.errors import PrompttuneError
from prompttune.export.folder import TaskRecord
from prompttune.export.runtimes import Array
from prompttune.images.preprocess import Preprocess
from prompttune.serve.batching.admission import Admission
from prompttune.serve.batching.batcher import JobResult
from prompttune.serve.batching.replica import DeviceReplica
from prompttune.serve.limits import Limits
from prompttune.serve.messages import (
    PANEL,
    SEVERAL,
    DeadlineError,
    InferRequest,
    InferResponse,
    NotFoundError,
    ServeError,
    UnavailableError,
    shown,
)
from prompttune.serve.service.images import Decoder
from prompttune.serve.service.metrics import Metrics
from prompttune.serve.service.models import READY, Model
from prompttune.serve.service.repository import Repository
from prompttune.serve.service.tensors import RowImage, Rows, read_rows, write_outputs
from prompttune.serve.tracing import span
from prompttune.serve.workers import Key, VersionGoneError, WorkerDiedError
from prompttune.serve.workers.waiting import gathered
from prompttune.task_types import TaskType

LEAST_URGENT = sys.maxsize
"""Internal priority of a request with the default priority 0."""
READ_INLINE_BYTES = 2**20
"""Largest request in bytes that is checked on the event loop; a thread costs more than it saves below this."""
ATTEMPTS = 5
"""Attempts for a request whose task changes, or whose worker ends before it took any of the rows."""


@dataclass(frozen=True)
class _Answered:
    """The rows of one task in a request."""

    record: TaskRecord
    number: int
    outcome: JobResult


_Decoded = dict[tuple[Preprocess, int], Array]
"""Images of a request, by transform and number."""


@dataclass(frozen=True)
class Inference:
    """Answers requests. Call every method on the event loop."""

    repository: Repository
    replicas: Sequence[DeviceReplica]
    decoder: Decoder
    admission: Admission
    limits: Limits
    image_size: int
    """Side of the engine's square input, in pixels."""
    metrics: Metrics
    task_type: TaskType
    several: Mapping[str, Model] = field(default_factory=lambda: {name: Model(name, number=1) for name in SEVERAL})
    """The models for several tasks, with the statistics of their requests."""

    async def infer(self, request: InferRequest, timeout_s: float) -> InferResponse:
        """Answer a request within ``timeout_s`` or the request's own timeout, whichever is shorter.

        Raises:
            ServeError: the request cannot be answered.
        """
        began = time.monotonic()
        status = "ok"
        tasks = {request.model}
        count = 0
        try:
            rows = await self._read(request)
            tasks, count = set(rows.tasks), len(rows.tasks)
            timeouts = (timeout_s, request.timeout_s, rows.timeout_s)
            async with asyncio.timeout(min(one for one in timeouts if one is not None)):
                with self.admission.inside(rows.tasks), span("infer", model=request.model, rows=count):
                    return await self._answer(request, rows)
        except TimeoutError:
            status = "deadline"
            raise DeadlineError("deadline exceeded: the request was not answered in time") from None
        except ServeError as problem:
            status = problem.grpc_status.lower()
            raise
        except asyncio.CancelledError:
            status = "cancelled"
            raise
        except PrompttuneError as problem:
            status = "internal"
            raise ServeError(str(problem)) from None
        finally:
            seconds = time.monotonic() - began
            # An unknown name does not get a counter.
            models = [self.repository.models[name] for name in tasks if name in self.repository.models]
            self.metrics.request([model.name for model in models], count, seconds, status)
            for model in [*models, self.several[request.model]] if request.model in SEVERAL else models:
                model.count_request(seconds, status != "ok")

    def model(self, name: str, version: str) -> Model:
        """One of :attr:`several`, whose only version is 1; raises :class:`NotFoundError` for another version."""
        model = self.several[name]
        if not model.named(version):
            raise NotFoundError(f"the model {name!r} has the version {model.number}, not {shown(version)}")
        return model

    async def _read(self, request: InferRequest) -> Rows:
        """Check a request; a large one in a thread, since decoding base64 and checking values take a while."""
        models = self.repository.models.values() if request.model == PANEL else ()
        served = sorted(model.name for model in models if model.state == READY)
        arguments = (request, self.limits, self.image_size, served, self.admission.most)
        if sum(_bytes(tensor.data) for tensor in request.inputs) <= READ_INLINE_BYTES:
            return read_rows(*arguments)
        return await asyncio.to_thread(read_rows, *arguments)

    async def _answer(self, request: InferRequest, rows: Rows) -> InferResponse:
        places: dict[str, list[int]] = {}
        for place, task in enumerate(rows.tasks):
            places.setdefault(task, []).append(place)
        several = self.model(request.model, request.version) if request.model in SEVERAL else None
        version = "" if several else request.version
        records = {task: self.repository.model(task).current(version) for task in places}
        replica = None
        if request.model == PANEL:  # its rows share their images on one device
            replica = least_busy(self.replicas, *(Key(task, record.version) for task, record in records.items()))
        began = time.monotonic()
        decoded: _Decoded = {}
        wanted = zip(rows.tasks, rows.payloads, strict=True)
        with span("decode", rows=len(rows.tasks)):
            await self._decode({(records[task].preprocess, one.row): one for task, one in wanted}, decoded)
        decode_s = time.monotonic() - began
        answers = await gathered(
            self._answer_task(task, version, [rows.payloads[place] for place in own], rows.priority, decoded, replica)
            for task, own in places.items()
        )
        answered = dict(zip(places, answers, strict=True))
        logits: list[Array] = [None] * len(rows.tasks)  # type: ignore[list-item]
        for task, one in answered.items():
            for place, row in zip(places[task], one.outcome.logits, strict=True):
                logits[place] = row[: len(one.record.labels)]
        began = time.monotonic()
        outputs = write_outputs(rows, logits, [answered[task].record for task in rows.tasks], self.task_type)
        write_s = time.monotonic() - began
        self.metrics.decoded(decode_s)
        for task, one in answered.items():
            self.repository.models[task].count(one.outcome, len(places[task]), decode_s, write_s)
            self.metrics.answer(task, len(places[task]), one.outcome.queue_s)
        if several is None:
            one = answered[request.model]
            parameters = {"task_version": one.record.version}
            return InferResponse(request.model, str(one.number), request.id, outputs, parameters)
        together = _together([one.outcome for one in answered.values()])
        several.count(together, len(rows.tasks), decode_s, write_s)
        stages = {"decode_ms": decode_s, "queue_ms": together.queue_s, "infer_ms": together.infer_s}
        milliseconds = {name: 1000 * seconds for name, seconds in stages.items()}
        return InferResponse(
            several.name, str(several.number), request.id, outputs, milliseconds if request.model == PANEL else {}
        )

    async def _answer_task(
        self,
        name: str,
        version: str,
        payloads: Sequence[RowImage],
        priority: int,
        decoded: _Decoded,
        replica: DeviceReplica | None,
    ) -> _Answered:
        """Answer the rows of one task, all of them with one version, on ``replica`` if it is given and stays up."""
        for _ in range(ATTEMPTS):
            model = self.repository.model(name)
            record, number = model.current(version), model.number
            wanted = {(record.preprocess, one.row): one for one in payloads}
            await self._decode(wanted, decoded)
            images = [decoded[record.preprocess, one.row] for one in payloads]
            key = Key(name, record.version)
            chosen = replica or least_busy(self.replicas, key)
            try:
                with span("batch", task=name, version=record.version):
                    outcome = await chosen.answer(key, record.folder, images, priority or LEAST_URGENT)
            except VersionGoneError:
                await self.repository.look_again(name)
            except WorkerDiedError:
                replica = None
            else:
                return _Answered(record, number, outcome)
        raise UnavailableError(f"the task {name!r} is changing, or its worker does not stay up: try again")

    async def _decode(self, wanted: Mapping[tuple[Preprocess, int], RowImage], decoded: _Decoded) -> None:
        """Add the images that are wanted and missing; the tasks of an image get the same array, which they share."""
        missing = {at: one for at, one in wanted.items() if at not in decoded}
        if all(one.normalised for one in missing.values()):  # the fast path: no asyncio task per row
            decoded.update((at, cast(Array, one.data)) for at, one in missing.items())
        else:
            images = await gathered(self.decoder.prepare(at[0], one) for at, one in missing.items())
            decoded.update(zip(missing, images, strict=True))


def _together(outcomes: Sequence[JobResult]) -> JobResult:
    """Combine the outcomes of a request's tasks; they may have shared batches."""
    return JobResult(
        [row for one in outcomes for row in one.logits],
        queue_s=max(one.queue_s for one in outcomes),
        infer_s=max(one.infer_s for one in outcomes),
        batches=list(dict.fromkeys(batch for one in outcomes for batch in one.batches)),
    )


def least_busy(replicas: Sequence[DeviceReplica], *keys: Key) -> DeviceReplica:
    """The device with the shortest queue; having to load a state counts as one more batch."""

    def load(replica: DeviceReplica) -> tuple[bool, int]:
        waits = replica.queued_rows + replica.running_rows
        missing = sum(not replica.holds(key) for key in keys)
        return (not replica.ready, waits + missing * replica.settings.max_batch)

    return min(replicas, key=load)


def _bytes(data: NDArray[Any]) -> int:
    return sum(map(len, data.flat)) if data.dtype == object else data.nbytes
