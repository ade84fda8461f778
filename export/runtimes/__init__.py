"""Runtimes: what executes an engine's model file, for parity and for serving alike."""

from prompttune.export.runtimes.base import Array, Runtime, RuntimeOptions, StateRunner, open_runtime

__all__ = ["Array", "Runtime", "RuntimeOptions", "StateRunner", "open_runtime"]
