"""TensorRT's requirements for tensors that it gets by address."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prompttune.errors import EngineError

ALIGNMENT = 256
"""Alignment in bytes of addresses for TensorRT. torch aligns allocations to 512, slices to less."""


def check_tensors(tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuse tensors whose bytes TensorRT would read wrongly: it does not check the data at an address.

    Raises:
        EngineError: a dtype differs, a tensor has gaps, or its address is not aligned.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != dtypes[name]:
            raise EngineError(f"the input {name} is {tensor.dtype}, the engine takes {dtypes[name]}")
        if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
            raise EngineError(f"the input {name} must be contiguous and start at a multiple of {ALIGNMENT} bytes")
