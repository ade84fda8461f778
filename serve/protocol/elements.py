"""Conversion and checks of tensors, as raw bytes or as lists of values."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor, triton_to_np_dtype

from prompttune.serve.limits import Limits
from prompttune.serve.messages import BadRequestError, OutputTensor, TooLargeError, bytes_array, shown

BYTES = "BYTES"
MAX_DIMENSIONS = 8


def numpy_type(name: str, datatype: object) -> np.dtype[Any]:
    """NumPy's dtype of a protocol datatype; raises :class:`BadRequestError` for an unknown one."""
    found = triton_to_np_dtype(datatype)
    if found is None:
        raise BadRequestError(f"input {shown(name)} has the unknown datatype {shown(datatype)}")
    dtype: np.dtype[Any] = np.dtype(found)
    return dtype


def check_shape(name: str, shape: Sequence[int], dtype: np.dtype[Any], limits: Limits) -> tuple[int, ...]:
    """The shape, checked against the limits of a request.

    Raises:
        BadRequestError: a dimension is negative, or there are too many dimensions.
        TooLargeError: the tensor exceeds the limit of a whole request.
    """
    where = f"input {shown(name)}"
    if len(shape) > MAX_DIMENSIONS:
        raise BadRequestError(f"{where} has {len(shape)} dimensions, the limit is {MAX_DIMENSIONS}")
    if any(size < 0 for size in shape):
        raise BadRequestError(f"{where} has the dimension {min(shape)}: it must be at least 0")
    # An empty dimension must not hide a huge one, which NumPy cannot create.
    elements = math.prod(max(size, 1) for size in shape)
    if dtype.hasobject and elements > limits.rows:
        raise TooLargeError(f"{where} has {elements} elements, the limit is {limits.rows} strings")
    if elements * dtype.itemsize > limits.body_bytes:
        raise TooLargeError(f"{where} would hold {elements * dtype.itemsize} bytes, over {limits.body_bytes}")
    return tuple(shape)


def from_raw(name: str, dtype: np.dtype[Any], shape: tuple[int, ...], raw: bytes | memoryview) -> NDArray[Any]:
    """A tensor from its little-endian bytes: a view of ``raw``, but a copy for strings.

    Raises:
        BadRequestError: the size does not fit the shape, or a string extends past the end.
    """
    where = f"input {shown(name)}"
    elements = math.prod(shape)
    if dtype.hasobject:
        return _strings_from_raw(where, shape, raw)
    if len(raw) != elements * dtype.itemsize:
        raise BadRequestError(
            f"{where} has {len(raw)} bytes, its shape {list(shape)} needs {elements * dtype.itemsize}"
        )
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def _strings_from_raw(where: str, shape: tuple[int, ...], raw: bytes | memoryview) -> NDArray[Any]:
    try:
        found = deserialize_bytes_tensor(raw)
    except struct.error:
        raise BadRequestError(f"{where} is cut off: a string's length runs past the end of its bytes") from None
    if len(found) != math.prod(shape):
        raise BadRequestError(f"{where} holds {len(found)} strings, its shape {list(shape)} needs {math.prod(shape)}")
    return bytes_array(found, shape)


def flatten(name: str, values: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """Values in row-major order, from a flat list or from one nested like the shape.

    Raises:
        BadRequestError: the nesting or the number of values does not fit the shape.
    """
    where = f"input {shown(name)}"
    nested: list[int] = []
    flat = values
    while flat and isinstance(flat[0], list):
        lengths = {len(one) if isinstance(one, list) else -1 for one in flat}
        if len(lengths) > 1 or len(nested) >= MAX_DIMENSIONS:
            raise BadRequestError(f"{where} has uneven data: every list of one depth must be of one length")
        nested.append(lengths.pop())
        flat = list(chain.from_iterable(flat))
    if nested and (len(values), *nested) != shape:
        raise BadRequestError(f"{where} has data of shape {[len(values), *nested]}, its shape says {list(shape)}")
    if len(flat) != math.prod(shape):
        raise BadRequestError(f"{where} has {len(flat)} values, its shape {list(shape)} needs {math.prod(shape)}")
    return flat


def numbers(name: str, datatype: str, dtype: np.dtype[Any], flat: Sequence[Any]) -> NDArray[Any]:
    """A flat tensor from Python numbers, which must all fit the datatype.

    Raises:
        BadRequestError: a value has another type, or is out of the datatype's range.
    """
    where = f"input {shown(name)}"
    allowed = _PYTHON_TYPES.get(dtype.kind, _REAL)
    for other in set(map(type, flat)) - allowed:
        raise BadRequestError(f"{where} holds a {_JSON_NAMES.get(other, other.__name__)}, which is not {datatype}")
    if dtype.kind in "iu" and flat:
        range_ = np.iinfo(dtype)
        if min(flat) < range_.min or max(flat) > range_.max:
            raise BadRequestError(f"{where} holds a number outside {datatype}: {range_.min} to {range_.max}")
    with np.errstate(over="ignore"):
        array = np.array(flat, dtype=dtype)
    if allowed is _REAL and not np.isfinite(array).all():
        raise BadRequestError(f"{where} holds a number that {datatype} cannot hold, or that is not finite")
    return array


_REAL: set[type] = {int, float}
_PYTHON_TYPES: dict[str, set[type]] = {"b": {bool}, "i": {int}, "u": {int}}
_JSON_NAMES = {type(None): "null", dict: "JSON object", list: "list", str: "string", bool: "boolean"}


def to_raw(tensor: OutputTensor) -> bytes:
    """The bytes of an output; each string follows its length."""
    if tensor.datatype == BYTES:
        return b"" if tensor.data.size == 0 else bytes(serialize_byte_tensor(tensor.data).item())
    return tensor.data.tobytes()
