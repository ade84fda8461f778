"""Sinks: destinations of the rows."""
