"""TensorRT's log: failures are written there and not raised, so its errors are kept."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from prompttune.errors import EngineError
from prompttune.export.trt.library import TensorRT

if TYPE_CHECKING:
    import tensorrt as trt

_SHOWN = 3
"""Largest number of quoted errors: the first ones name the cause, later ones follow from them."""


class ErrorLog:
    """Keeps errors and drops the rest. TensorRT may call it from several threads."""

    def __init__(self, library: TensorRT) -> None:
        self._lock = threading.Lock()
        self._errors: list[str] = []
        self.logger = _logger(library, self._keep)

    def _keep(self, error: str) -> None:
        with self._lock:
            self._errors.append(" ".join(error.split()))

    def clear(self) -> None:
        """Forget what was kept: the next failure has other causes."""
        with self._lock:
            self._errors.clear()

    def failure(self, what: str, *more: str) -> EngineError:
        """The error to raise, with the failure and its reasons in one line. The kept errors are cleared.

        Args:
            what: the failure.
            more: reasons known from elsewhere, which come first.
        """
        with self._lock:
            reasons = list(dict.fromkeys([*(" ".join(one.split()) for one in more), *self._errors]))
            self._errors.clear()
        left = f" (and {len(reasons) - _SHOWN} more)" if len(reasons) > _SHOWN else ""
        said = "; ".join(reasons[:_SHOWN]) or "TensorRT gave no reason"
        return EngineError(f"{what}: {said}{left}")


@functools.cache
def error_log(library: TensorRT) -> ErrorLog:
    """The log of a library. One for the process: TensorRT ignores another while any object with the first one lives."""
    return ErrorLog(library)


def _logger(library: TensorRT, keep: Callable[[str], None]) -> trt.ILogger:
    if not TYPE_CHECKING:
        trt = library

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                keep(msg)

    return Logger()
