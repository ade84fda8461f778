"""Runtimes, which execute an engine's model file for parity and serving."""

from prompttune.export.runtimes.base import Array, Runtime, RuntimeOptions, StateRunner
from prompttune.export.runtimes.opening import RUNTIMES, open_checked, open_runtime

__all__ = ["RUNTIMES", "Array", "Runtime", "RuntimeOptions", "StateRunner", "open_checked", "open_runtime"]
