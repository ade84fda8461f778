"""A job of inference on a Ray cluster: the same rows as in a local run, in the same order."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Sequence

from prompttune.errors import MissingExtraError
from prompttune.serve.infer.items import Item
from prompttune.serve.infer.rows import InputAnswer
from prompttune.serve.infer.settings import RaySettings
from prompttune.serve.infer.work import Work

__all__ = ["RaySettings", "run_on_ray"]


def run_on_ray(
    chunks: Iterable[Sequence[Item]], work: Work, settings: RaySettings | None = None
) -> Iterator[list[InputAnswer]]:
    """Answer every chunk, in the order of the chunks; each input is answered once, even if nodes are lost.

    The caller's thread lists chunks, at most ``settings.window`` parcels ahead of the answers. Ray decodes them in
    tasks and answers them in actors with one engine each. Workers open payloads and the engine's folder under the same
    paths as this process: both must be on storage that every node can read. Closing the iterator ends the job and its
    actors. Ray is shut down at the end if it was not already running in this process.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: the cluster cannot be reached or does not have enough room.
        EngineError: the engine cannot be opened on a node, or fails.
        DataError: the job cannot continue for another reason.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("ray", "ray", "without it prompttune infer runs on one machine")
    from prompttune.serve.infer.cluster.job import run

    return run(chunks, work, settings or RaySettings())
