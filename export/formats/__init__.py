"""Formats: what an engine's model file can be. One file a format, registered by name, imported when asked for."""

from prompttune.export.formats.base import FORMATS, BuildRequest, Built, Format, Settings, find_format

__all__ = ["FORMATS", "BuildRequest", "Built", "Format", "Settings", "find_format"]
