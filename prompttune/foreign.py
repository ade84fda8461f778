"""Files of tensors from other software: read without running code, and with every claimed size checked."""

from __future__ import annotations

import argparse
import codecs
import pickle
import re
import reprlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from prompttune.errors import PrompttuneError, first_line

_ARRAY_TYPES = tuple(order + size for order in "<>" for size in ("f2", "f4", "f8"))
"""NumPy's type codes for arrays in a pickled file."""
_UNSUPPORTED_GLOBAL = re.compile(r"GLOBAL ([\w.]+) (?:was not|whose module)")
"""torch's message about a type that is not allowed."""


class _ArrayType:
    """Stand-in for ``numpy.dtype`` in a pickled file: NumPy's own accepts flags that can crash the process."""

    name: object = None
    order: object = None

    def __init__(self, name: object, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class PickledArray:
    """A NumPy array in a pickled file, as stored."""

    state: object = None

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.state = state

    def tensor(self) -> Tensor | None:
        """The array as a tensor; None if it does not hold floats."""
        match self.state:
            case (_, tuple(shape), _ArrayType(name=str(name), order=str(order)), by_column, bytes(data)):
                if order + name not in _ARRAY_TYPES:
                    return None
                try:
                    stored = np.frombuffer(data, np.dtype(order + name))
                    return torch.from_numpy(stored.reshape(shape, order="F" if by_column else "C").astype(name))
                except (TypeError, ValueError, OverflowError):  # the shape does not fit the number of values
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
"""Types allowed in a pickled file besides tensors and plain values."""


def read_foreign(path: Path, error: type[PrompttuneError]) -> Any:
    """Content of a foreign ``.safetensors`` or pickled file; code in it is never run.

    Tensors are returned as stored: call :func:`plain_tensors` before using one.

    Raises:
        error: the file cannot be read, or cannot be read without running code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_PLAIN):
            warnings.simplefilter("ignore")  # an error says more than torch's warning on the pickle protocol
            return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as problem:
        raise error(f"{path} is damaged: {first_line(problem)}") from None
    except (OSError, RuntimeError, MemoryError) as problem:
        raise error(f"cannot read {path}: {first_line(problem)}") from None
    except Exception as problem:  # a damaged pickle can make torch raise any error
        needed = _UNSUPPORTED_GLOBAL.search(str(problem)) if isinstance(problem, pickle.UnpicklingError) else None
        if needed is None:
            raise error(
                f"cannot read {path}: it is not a file of torch.save, is damaged, or holds more than tensors and plain "
                "values; give a state dict that torch.save wrote, or .safetensors"
            ) from None
        raise error(
            f"{path} holds more than tensors and plain values, {needed[1]}, so reading it could run code: it is "
            "refused; save its state dict alone, with torch.save or as .safetensors"
        ) from None


def read_state_dict(
    path: Path, wrappers: Iterable[str], error: type[PrompttuneError], *, arrays: bool = False
) -> dict[str, Tensor]:
    """The tensors of a foreign file; see :func:`read_foreign` and :func:`state_dict_of`."""
    return state_dict_of(read_foreign(path, error), path, wrappers, error, arrays=arrays)


def state_dict_of(
    loaded: object, path: Path, wrappers: Iterable[str], error: type[PrompttuneError], *, arrays: bool = False
) -> dict[str, Tensor]:
    """The tensors of a foreign state dict.

    Args:
        loaded: content of the file.
        path: the file.
        wrappers: keys under which training code stores the state dict.
        error: type of the errors.
        arrays: whether NumPy arrays count as tensors; otherwise they are left out, as other values are.

    Raises:
        error: the content is not a state dict of plain tensors.
    """
    state = plain_dict(loaded)
    if state is None:
        raise error(f"{path} holds no state dict but a {type(loaded).__name__}")
    for wrapper in wrappers:
        state = plain_dict(state.get(wrapper)) or state
    kinds = (Tensor, PickledArray) if arrays else Tensor
    found = {name: value for name, value in state.items() if isinstance(value, kinds)}
    return plain_tensors(found, path, error)


def plain_dict(value: object) -> dict[Any, Any] | None:
    """``value`` as a new dict; None if it is not a dict.

    A pickle can set attributes of an ``OrderedDict``, even those of its methods.
    """
    return dict(dict.items(value)) if isinstance(value, dict) else None


def plain_tensors(
    found: Mapping[Any, Tensor | PickledArray], path: Path, error: type[PrompttuneError]
) -> dict[str, Tensor]:
    """Tensors from a foreign file, without gradients and attributes, each backed by as many bytes as it claims.

    Raises:
        error: a name is not printable text, an array does not hold floats, or a tensor is sparse, quantised, not on the
            CPU, of a subclass, or larger than its stored bytes.
    """
    tensors = {}
    for name, value in found.items():
        if not isinstance(name, str) or not name.isprintable():
            key = reprlib.repr(name) if isinstance(name, str) else f"of type {type(name).__name__}"
            raise error(f"{path} holds a tensor under a key {key}, which is not a name; store a state dict")
        plain = _plain(value)
        if plain is None:
            raise error(f"{path}: {name} is not a plain tensor; store it dense, on the CPU, as floats")
        if plain.numel() * plain.element_size() > plain.untyped_storage().nbytes():
            raise error(f"{path}: {name} is {tuple(plain.shape)}, only partly stored; store it .contiguous()")
        tensors[name] = plain
    return tensors


def _plain(value: Tensor | PickledArray) -> Tensor | None:
    if isinstance(value, PickledArray):
        return value.tensor()
    ordinary = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_quantized
    if not ordinary or value.device.type != "cpu":
        return None
    return Tensor.detach(value)  # not value.detach(): a pickle can set attributes of a tensor too
