"""Files of tensors that somebody else wrote: read without running code, and believed only as far as they are stored."""

from __future__ import annotations

import argparse
import codecs
import pickle
import re
import reprlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from prompttune.errors import PrompttuneError, first_line

_ARRAY_TYPES = tuple(order + size for order in "<>" for size in ("f2", "f4", "f8"))
"""NumPy's codes of what an array in a pickled file may hold."""
_UNSUPPORTED_GLOBAL = re.compile(r"GLOBAL ([\w.]+) (?:was not|whose module)")
"""How torch names what a file asks for beyond that."""


class _ArrayType:
    """``numpy.dtype`` in a pickled file. NumPy's own would take flags from there that break the process."""

    name: object = None
    order: object = None

    def __init__(self, name: object, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class PickledArray:
    """A NumPy array in a pickled file, as it is stored."""

    state: object = None

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.state = state

    def tensor(self) -> Tensor | None:
        """Its numbers, or None where it holds no floats."""
        match self.state:
            case (_, tuple(shape), _ArrayType(name=str(name), order=str(order)), by_column, bytes(data)):
                if order + name not in _ARRAY_TYPES:
                    return None
                try:
                    stored = np.frombuffer(data, np.dtype(order + name))
                    return torch.from_numpy(stored.reshape(shape, order="F" if by_column else "C").astype(name))
                except (TypeError, ValueError, OverflowError):  # a shape of other numbers than there are
                    return None
        return None


_PLAIN: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    # MAE, DeiT and SA²VP store their command line's arguments; a Namespace holds no code.
    argparse.Namespace,
    # VPT stores prompts as NumPy arrays.
    *[(PickledArray, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")],
    (PickledArray, "numpy.ndarray"),
    (_ArrayType, "numpy.dtype"),
    codecs.encode,
]
"""What may stand in a pickled file besides tensors and plain values."""


def read_foreign(path: Path, error: type[PrompttuneError]) -> Any:
    """What somebody else's ``.safetensors`` or pickled file holds; no code in it is run.

    Tensors come as they are stored: see :func:`plain_tensors` before one is used.

    Raises:
        error: it cannot be read, or not without running code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_PLAIN):
            warnings.simplefilter("ignore")  # torch's on the pickle protocol stands beside an error that says more
            return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as problem:
        raise error(f"{path} is damaged: {first_line(problem)}") from None
    except (OSError, RuntimeError, MemoryError) as problem:
        raise error(f"cannot read {path}: {first_line(problem)}") from None
    except Exception as problem:  # torch runs the pickle's instructions unchecked: a damaged one raises anything
        needed = _UNSUPPORTED_GLOBAL.search(str(problem)) if isinstance(problem, pickle.UnpicklingError) else None
        if needed is None:
            raise error(
                f"cannot read {path}: it is no file of torch.save, is damaged, or holds more than tensors and plain "
                "values; give a state dict that torch.save wrote, or .safetensors"
            ) from None
        raise error(
            f"{path} holds more than tensors and plain values, {needed[1]}, so reading it could run code: it is "
            "refused; save its state dict alone, with torch.save or as .safetensors"
        ) from None


def plain_dict(value: object) -> dict[Any, Any] | None:
    """``value`` as a dict of its own, None where it is none.

    A pickle can set attributes of an ``OrderedDict``, its methods' names among them.
    """
    return dict(dict.items(value)) if isinstance(value, dict) else None


def plain_tensors(
    found: Mapping[Any, Tensor | PickledArray], path: Path, error: type[PrompttuneError]
) -> dict[str, Tensor]:
    """Tensors out of a foreign file, without gradients and attributes, each backed by as many bytes as it claims.

    Raises:
        error: a name is not printable text, an array holds no floats, or a tensor is sparse, quantised, not on the
            CPU, of a class of its own or larger than what is stored of it.
    """
    tensors = {}
    for name, value in found.items():
        if not isinstance(name, str) or not name.isprintable():
            key = reprlib.repr(name) if isinstance(name, str) else f"of type {type(name).__name__}"
            raise error(f"{path} holds a tensor under a key {key}, which is no name; store a state dict")
        plain = _plain(value)
        if plain is None:
            raise error(f"{path}: {name} is no plain tensor; store it dense, on the CPU, as floats")
        if plain.numel() * plain.element_size() > plain.untyped_storage().nbytes():
            raise error(f"{path}: {name} is {tuple(plain.shape)}, of which a part is stored; store it .contiguous()")
        tensors[name] = plain
    return tensors


def _plain(value: Tensor | PickledArray) -> Tensor | None:
    if isinstance(value, PickledArray):
        return value.tensor()
    ordinary = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_quantized
    if not ordinary or value.device.type != "cpu":
        return None
    return Tensor.detach(value)  # not value.detach(): a pickle can set attributes of a tensor too
