"""Formats of an engine's model file: one module per format, registered by name, imported on use."""

from prompttune.export.formats.base import FORMATS, BuildRequest, Built, Format, Settings, find_format

__all__ = ["FORMATS", "BuildRequest", "Built", "Format", "Settings", "find_format"]
