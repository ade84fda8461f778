"""TensorRT's log: failures are written there and not raised, so its errors are kept."""

from __future__ import annotations

import threading

import tensorrt as trt

from prompttune.errors import EngineError

_SHOWN = 3
"""Largest number of quoted errors: the first ones name the cause, later ones follow from them."""


class ErrorLog(trt.ILogger):
    """Keeps errors and drops the rest. TensorRT may call it from several threads."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self._lock = threading.Lock()
        self._errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """See TensorRT's ``ILogger.log``."""
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            with self._lock:
                self._errors.append(" ".join(msg.split()))

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
