"""OpenTelemetry spans, if its API is installed: https://opentelemetry.io/docs/languages/python/

Spans are exported only if a program sets up a provider, as ``opentelemetry-instrument prompttune serve`` does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any


@functools.cache
def _packages() -> Any:
    """The modules ``trace``, ``context`` and ``propagate``; None where they are not installed."""
    if importlib.util.find_spec("opentelemetry") is None:
        return None
    from opentelemetry import context, propagate, trace

    return trace, context, propagate


def _api() -> Any:
    """The modules if a provider is set up; otherwise a span would only cost time."""
    packages = _packages()
    if packages is None or isinstance(packages[0].get_tracer_provider(), packages[0].ProxyTracerProvider):
        return None
    return packages


@contextlib.contextmanager
def span(name: str, **attributes: str | int) -> Iterator[None]:
    """Run the block as a child of the current span; record an error of the block in it."""
    api = _api()
    if api is None:
        yield
        return
    trace, _, _ = api
    named = {f"prompttune.{key}": value for key, value in attributes.items()}
    with trace.get_tracer("prompttune.serve").start_as_current_span(name, attributes=named):
        yield


@contextlib.contextmanager
def continued(headers: Mapping[str, str]) -> Iterator[None]:
    """Make the block's spans part of the trace that a caller's ``traceparent`` names, if it names one."""
    api = _api()
    if api is None:
        yield
        return
    _, context, propagate = api
    token = context.attach(propagate.extract(headers))
    try:
        yield
    finally:
        context.detach(token)
