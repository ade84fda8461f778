"""Between NumPy and torch: arrays of bank precisions as tensors, on the host and on a device."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def as_torch(array: NDArray[Any]) -> Tensor:
    """The same values as a tensor on the host; torch shares NumPy's memory unless the array may not be written to.

    torch does not know ml_dtypes' bfloat16, so such an array goes over as 16-bit integers and is read anew there.
    """
    whole = np.ascontiguousarray(array)
    if not whole.flags.writeable:
        whole = whole.copy()
    if whole.dtype == _BFLOAT16:
        return torch.from_numpy(whole.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(whole)


def place_rows(rows: NDArray[Any], device: torch.device) -> Tensor:
    """A bank tensor [T, ...] on the device, there when this returns."""
    placed = as_torch(rows).to(device)
    torch.cuda.current_stream(device).synchronize()
    return placed


def update_row(placed: Tensor, rows: NDArray[Any], row: int) -> None:
    """Copy one row of the host's bank over a placed one, there when this returns; other rows are not touched."""
    with torch.cuda.device(placed.device):
        placed[row : row + 1].copy_(as_torch(rows[row : row + 1]))
        # The stream alone: waiting for the whole device is an error while another thread captures a CUDA graph.
        torch.cuda.current_stream().synchronize()
