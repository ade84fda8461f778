"""Outputs of inference: one file for each kind, registered here under its name."""

from __future__ import annotations

from prompttune.serve.infer.sinks.base import SINKS, Sink, SinkSettings

for _name, _part in {
    "jsonl": "text:JsonLines",
    "csv": "text:CsvRows",
    "parquet": "parquet:ParquetFolder",
    "video": "video:AnnotatedVideo",
    "overlays": "overlays:OverlayFolder",
}.items():
    SINKS.add(_name, f"{__name__}.{_part}")

__all__ = ["SINKS", "Sink", "SinkSettings"]
