"""Sources of inputs by name; a later one is asked first whether it opens an input."""

from __future__ import annotations

from prompttune.registry import Registry
from prompttune.serve.infer.sources.base import Source

_HERE = "prompttune.serve.infer.sources"

SOURCES: Registry[type[Source]] = Registry("input format", "prompttune.sources", base=Source)
SOURCES.add("images", f"{_HERE}.files:ImageFiles")
SOURCES.add("list", f"{_HERE}.files:ImageList")
SOURCES.add("table", f"{_HERE}.tables:TableSource")
SOURCES.add("shards", f"{_HERE}.shards:ShardSource")
SOURCES.add("video", f"{_HERE}.video:VideoSource")
SOURCES.add("stream", f"{_HERE}.live:LiveSource")
SOURCES.add("watch", f"{_HERE}.watch:WatchedFolder")
SOURCES.add("lines", f"{_HERE}.stdin:ListReader")
SOURCES.add("jsonl", f"{_HERE}.stdin:JsonReader")
