"""Spans of a request, and the trace of the caller that they join."""

import pytest

from prompttune.serve import tracing
from tests.engines import exported
from tests.serving import noise, request, running, within

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="the OpenTelemetry SDK is not installed")


@pytest.fixture
def spans(monkeypatch):
    """A provider of the test's own, so that nothing is set for the process."""
    from opentelemetry import context, propagate
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_api", lambda: (provider, context, propagate))
    return exporter


def test_a_request_is_a_span_with_its_parts_below(spans):
    async def test():
        async with running(exported("sa2vp")) as service:
            with tracing.continued({"traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01"}):
                await service.infer(request("task0", noise(2)))

    within(60, test())
    named = {one.name: one for one in spans.get_finished_spans()}
    assert set(named) == {"infer", "decode", "batch"}
    assert {format(one.context.trace_id, "032x") for one in named.values()} == {"1" * 32}
    assert format(named["infer"].parent.span_id, "016x") == "2" * 16
    assert named["batch"].parent.span_id == named["infer"].context.span_id
    assert dict(named["infer"].attributes) == {"prompttune.model": "task0", "prompttune.rows": 2}


def test_without_the_api_nothing_happens(monkeypatch):
    monkeypatch.setattr(tracing, "_api", lambda: None)
    with tracing.continued({"traceparent": "x"}), tracing.span("infer", rows=1):
        pass
