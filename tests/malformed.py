"""Requests of the protocol with something wrong in them, for hypothesis to draw."""

from __future__ import annotations

import contextlib
import functools
import operator
from typing import Any

from hypothesis import strategies as st

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)
EDGES = st.sampled_from(
    [
        -1,
        0,
        3,
        2**31,
        2**63,
        10**30,
        1e300,
        0.5,
        True,
        None,
        "",
        "FP32",
        "UINT8",
        "BYTES",
        "FP8",
        [],
        [[]],
        [-1],
        [10**9],
    ]
)
FIELDS: list[tuple[str | int, ...]] = [
    *[(key,) for key in ("id", "parameters", "inputs", "outputs")],
    *[("inputs", 0, key) for key in ("name", "datatype", "shape", "data", "parameters")],
    *[("inputs", 0, key, 0) for key in ("shape", "data")],
    *[("inputs", 0, "parameters", key) for key in ("binary_data_size", "shared_memory_region", "other")],
    *[("inputs", 1, key) for key in ("name", "datatype", "shape", "data")],
    *[("outputs", 0, key) for key in ("name", "parameters")],
    *[("outputs", 0, "parameters", key) for key in ("binary_data", "classification", "shared_memory_offset")],
    *[("parameters", key) for key in ("binary_data_output", "top_k")],
]


CHANGES = st.lists(st.tuples(st.sampled_from(FIELDS), EDGES | JSON), min_size=1, max_size=3)
RAW = st.just(b"") | st.binary(max_size=12)
HEADER_LENGTHS = st.sampled_from(["", "", "right", "0", "-1", "1e3", "9" * 30])


def changed(changes: list[tuple[tuple[str | int, ...], Any]]) -> dict[str, Any]:
    """A valid request in which the fields have other values; a field that is gone by then stays away."""
    request: Any = {
        "id": "1",
        "parameters": {"top_k": 2},
        "inputs": [
            {"name": "image", "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, 4], "parameters": {}},
            {"name": "task", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]},
        ],
        "outputs": [{"name": "logits", "parameters": {"binary_data": False}}],
    }
    for path, value in changes:
        with contextlib.suppress(LookupError, TypeError):
            functools.reduce(operator.getitem, path[:-1], request)[path[-1]] = value
    return request
