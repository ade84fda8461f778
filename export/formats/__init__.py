"""Formats of an engine's model file: one module a format, registered by name, imported on use."""

from prompttune.export.formats.base import FORMATS, BuildRequest, Built, ExportSettings, Format

__all__ = ["FORMATS", "BuildRequest", "Built", "ExportSettings", "Format"]
