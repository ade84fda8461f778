"""Between the protocol's tensors and rows: requests are checked and read, outputs are written."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prompttune.export.runtimes import Array
from prompttune.serve.limits import TOP_K, Limits
from prompttune.serve.messages import (
    MIXED,
    PANEL,
    BadRequestError,
    InferRequest,
    InputTensor,
    NotFoundError,
    OutputTensor,
    Parameters,
    RequestedOutput,
    ServeError,
    TooLargeError,
    shown,
)
from prompttune.serve.service.outputs import BRIEF, OUTPUTS, RANKED, Answers, Record
from prompttune.task_types import TaskType

IMAGE, TASK, TASKS = "image", "task", "tasks"
LARGEST_NUMBER = 2**63 - 1
"""Largest value of a parameter: the widest integer that JSON and gRPC both carry."""
LONGEST_NAME = 255
"""Longest task name, in bytes: the limit of a folder name."""


@dataclass(frozen=True)
class RowImage:
    """The image of one row, as sent in the request."""

    row: int
    """Number of the image in the request, counted from 0."""
    data: bytes | NDArray[np.uint8] | Array
    """A JPEG, PNG or WebP file, raw RGB uint8 [H, W, 3], or normalised float32 [3, S, S]."""

    @property
    def normalised(self) -> bool:
        """Whether the image needs no decoding."""
        return isinstance(self.data, np.ndarray) and self.data.dtype == np.float32


@dataclass(frozen=True)
class Rows:
    """A checked request, row by row."""

    payloads: Sequence[RowImage]
    """Image of each row: views of the request's memory."""
    tasks: Sequence[str]
    """Task name of each row; the task may not exist."""
    top_k: int
    priority: int
    """Priority: 0 is the default, 1 is the most urgent."""
    timeout_s: float | None
    """The ``timeout`` parameter in seconds; None without one."""
    outputs: Sequence[RequestedOutput]
    """Requested outputs, in order."""
    asked: int | None = None
    """Number K of rows of each image, one after the other, which become an axis of the outputs; None for no axis."""


def read_rows(
    request: InferRequest, limits: Limits, image_size: int, served: Sequence[str] = (), most: int = LARGEST_NUMBER
) -> Rows:
    """Check a request and split it into rows. Task names are not looked up.

    Args:
        request: a request for one task, for :data:`MIXED` or for :data:`PANEL`.
        limits: limits of a request.
        image_size: side S of the engine's square input, in pixels.
        served: tasks that a panel without names asks.
        most: largest number of rows of a panel.

    Raises:
        BadRequestError: a name, datatype, shape, value or parameter does not fit; the message names it.
        TooLargeError: the request exceeds the limit of rows, of bytes per image or of pixels per image.
    """
    inputs = _inputs(request)
    payloads = _payloads(inputs[IMAGE], limits, image_size)
    tasks, asked = [request.model] * len(payloads), None
    if request.model == PANEL:
        tasks = _panel(inputs.get(TASKS), len(payloads), served, most)
        asked = len(tasks) // len(payloads)
        payloads = [payload for payload in payloads for _ in range(asked)]
    elif TASK in inputs:
        tasks = _tasks(inputs[TASK], len(payloads))
    timeout = _integer(request.parameters, "timeout", default=0, least=0)
    return Rows(
        payloads,
        tasks,
        top_k=_integer(request.parameters, "top_k", default=TOP_K, least=1),
        priority=_integer(request.parameters, "priority", default=0, least=0),
        timeout_s=timeout / 1e6 if timeout else None,
        outputs=_outputs(request.outputs, BRIEF if request.model == PANEL else tuple(OUTPUTS)),
        asked=asked,
    )


def write_outputs(
    rows: Rows, logits: Sequence[Array], records: Sequence[Record], task_type: TaskType
) -> list[OutputTensor]:
    """Turn logits into the requested outputs.

    Args:
        rows: the request.
        logits: float32 [C] for each row, C the task's own classes.
        records: record of each row's task, of the version that answered.
        task_type: type of the tasks.

    Raises:
        BadRequestError: a normalised image made the engine overflow.
        ServeError: another row's logits are not finite.
    """
    for payload, task, row in zip(rows.payloads, rows.tasks, logits, strict=True):
        if not np.isfinite(row).all():
            if payload.normalised:
                raise BadRequestError(f"image of row {payload.row} is out of range: it needs a normalised image")
            raise ServeError(f"the task {task!r} gave logits that are not finite")
    answers = Answers(logits, rows.tasks, records, rows.top_k, task_type)
    tensors = [answers.tensor(output) for output in rows.outputs]
    if rows.asked is None:
        return tensors
    return [replace(one, data=one.data.reshape(-1, rows.asked, *one.data.shape[1:])) for one in tensors]


def _inputs(request: InferRequest) -> Mapping[str, InputTensor]:
    wanted = {MIXED: (IMAGE, TASK), PANEL: (IMAGE, TASKS)}.get(request.model, (IMAGE,))
    needs = f"model {shown(request.model)} takes {' and '.join(wanted)}"
    found: dict[str, InputTensor] = {}
    for tensor in request.inputs:
        if tensor.name not in wanted:
            raise BadRequestError(f"unknown input {shown(tensor.name)}; {needs}")
        if tensor.name in found:
            raise BadRequestError(f"the input {tensor.name} is given twice")
        found[tensor.name] = tensor
    missing = [name for name in wanted if name not in (*found, TASKS)]
    if missing:
        raise BadRequestError(f"the input {missing[0]} is missing; {needs}")
    return found


def _payloads(tensor: InputTensor, limits: Limits, image_size: int) -> list[RowImage]:
    if tensor.datatype not in _FORMS:
        raise BadRequestError(f"image must be {', '.join(_FORMS)}, not {shown(tensor.datatype)}")
    shape, read = _FORMS[tensor.datatype]
    _check_shape(tensor, [image_size if size == "S" else size for size in shape])
    if not len(tensor.data):
        raise BadRequestError("the request has no images")
    if len(tensor.data) > limits.rows:
        raise TooLargeError(f"{len(tensor.data)} images in one request, the limit is {limits.rows}")
    return [RowImage(row, data) for row, data in enumerate(read(tensor, limits))]


def _normalised(tensor: InputTensor) -> Sequence[Array]:
    with np.errstate(over="ignore", invalid="ignore"):
        # One inf or NaN makes the sum non-finite, and no second array is needed; only a large sum needs a second check.
        finite = np.isfinite(tensor.data.sum()) or np.isfinite(tensor.data).all()
    if not finite:
        raise BadRequestError("image holds values that are not finite")
    return list(tensor.data)


def _raw(tensor: InputTensor, limits: Limits) -> Sequence[NDArray[np.uint8]]:
    height, width = tensor.data.shape[1:3]
    if not height or not width:
        raise BadRequestError(f"images of {height} x {width} pixels are empty")
    if height * width > limits.pixels:
        raise TooLargeError(f"images of {width} x {height} pixels, the limit is {limits.pixels}")
    return list(tensor.data)


def _encoded(tensor: InputTensor, limits: Limits) -> Sequence[bytes]:
    files = [_from_base64(text, row) for row, text in enumerate(tensor.data)] if tensor.text else list(tensor.data)
    for row, file in enumerate(files):
        if len(file) > limits.image_bytes:
            raise TooLargeError(f"image of row {row} has {len(file)} bytes, the limit is {limits.image_bytes}")
    return files


_Shape = Sequence[str | int]

_FORMS: Mapping[str, tuple[_Shape, Callable[[InputTensor, Limits], Sequence[Any]]]] = {
    "FP32": (("N", 3, "S", "S"), lambda tensor, _: _normalised(tensor)),
    "UINT8": (("N", "H", "W", 3), _raw),
    "BYTES": (("N",), _encoded),
}
"""Datatypes of ``image``: shape (S is the side of the engine's input) and how the rows are read."""


def _from_base64(text: bytes, row: int) -> bytes:
    if text[:5].lower() == b"data:":
        header, comma, text = text.partition(b",")
        if not comma or not header.lower().endswith(b";base64"):
            raise BadRequestError(f"image of row {row} is a data: URL without ;base64,")
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as problem:
        raise BadRequestError(f"image of row {row} is not base64: {problem}") from None


def _tasks(tensor: InputTensor, rows: int) -> list[str]:
    if tensor.datatype != "BYTES":
        raise BadRequestError(f"task must be BYTES, not {shown(tensor.datatype)}")
    if tensor.data.shape[1:] != (1,):  # Triton's tools send a column
        _check_shape(tensor, ("N",))
    if len(tensor.data) != rows:
        raise BadRequestError(f"{rows} images but {len(tensor.data)} tasks: name one for each image")
    return [_task(name, row) for row, name in enumerate(tensor.data.ravel())]


def _panel(tensor: InputTensor | None, images: int, served: Sequence[str], most: int) -> list[str]:
    """The tasks of each image, one image after the other: [K] names for all images, [N, K] for each, else all tasks."""
    names: Sequence[str] = served
    if tensor is not None:
        if tensor.datatype != "BYTES":
            raise BadRequestError(f"tasks must be BYTES, not {shown(tensor.datatype)}")
        if tensor.data.ndim != 1 and tensor.data.shape[:-1] != (images,):
            raise BadRequestError(f"tasks must be [K] or [{images}, K], not {list(tensor.data.shape)}")
        names = [_task(name, row) for row, name in enumerate(tensor.data.ravel())] or served
    if not names:
        raise NotFoundError("the server holds no task that could answer")
    each = tensor is not None and tensor.data.ndim == 2 and tensor.data.size > 0
    if (rows := len(names) if each else images * len(names)) > most:
        raise TooLargeError(
            f"{rows} answers in one request, the limit is {most}: send fewer images or name fewer tasks"
        )
    return list(names) if each else list(names) * images


def _task(name: bytes, row: int) -> str:
    if len(name) > LONGEST_NAME:
        raise BadRequestError(f"task of row {row} has {len(name)} bytes; names have at most {LONGEST_NAME}")
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise BadRequestError(f"task of row {row} is not UTF-8") from None


def _check_shape(tensor: InputTensor, wanted: _Shape) -> None:
    """Check a shape; a letter in ``wanted`` stands for any size."""
    shape = tensor.data.shape
    fits = len(shape) == len(wanted) and all(
        isinstance(one, str) or size == one for size, one in zip(shape, wanted, strict=True)
    )
    if not fits:
        must = ", ".join(map(str, wanted))
        raise BadRequestError(f"{tensor.name} of {tensor.datatype} must be [{must}], not {list(shape)}")


def _integer(parameters: Parameters, name: str, *, default: int, least: int) -> int:
    value = parameters.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRequestError(f"the parameter {name} must be a whole number, not {shown(value)}")
    if not least <= value <= LARGEST_NUMBER:
        raise BadRequestError(f"the parameter {name} must be at least {least} and below 2^63")
    return value


def _outputs(requested: Sequence[RequestedOutput], default: Sequence[str]) -> Sequence[RequestedOutput]:
    seen: set[str] = set()
    for output in requested:
        if output.name not in OUTPUTS:
            raise BadRequestError(f"unknown output {shown(output.name)}; known: {', '.join(OUTPUTS)}")
        if output.name in seen:
            raise BadRequestError(f"the output {output.name} is requested twice")
        if output.classification < 0:
            raise BadRequestError(f"classification of {output.name} must be at least 1, not {output.classification}")
        if output.classification and output.name not in RANKED:
            raise BadRequestError(f"classification works for {' and '.join(RANKED)}, not for {output.name}")
        seen.add(output.name)
    return requested or [RequestedOutput(name) for name in default]
