"""What runs on the nodes of a cluster: tasks that decode and actors that answer."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from prompttune.errors import EngineError, PrompttuneError, first_line
from prompttune.export.folder import EngineFolder
from prompttune.serve.decode_threads import hold_to_one_thread
from prompttune.serve.engine import Engine
from prompttune.serve.infer.answering import Buffers, answers_of, assemble, open_engine, score
from prompttune.serve.infer.decoding import Decoded, decode
from prompttune.serve.infer.items import Item
from prompttune.serve.infer.rows import InputAnswer
from prompttune.serve.infer.work import Work, facts_of


def decode_parcel(parcel: Sequence[Sequence[Item]], work: Work, folder: Path) -> list[list[Decoded]]:
    """Decode the images of a parcel's chunks.

    Args:
        parcel: the chunks.
        work: settings of the job.
        folder: the driver's working folder, which relative paths start from.
    """
    with contextlib.suppress(OSError):  # without the folder, rows report relative paths as missing
        os.chdir(folder)
    hold_to_one_thread()  # the same as in a local run's decoding threads
    return [[decode(item, work) for item in chunk] for chunk in parcel]


class EngineActor:
    """An engine in its own process.

    Args:
        work: settings of the job.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._buffers = Buffers(work)
        self._engine: Engine | str  # the engine, or why it cannot be opened
        try:
            self._engine = _checked_engine(work)
        except PrompttuneError as problem:
            self._engine = f"node {socket.gethostname()}: {first_line(problem)}"

    def opened(self) -> str | None:
        """The reason why the engine cannot be opened; None if it is open."""
        return self._engine if isinstance(self._engine, str) else None

    def answer(self, parcel: Sequence[Sequence[Decoded]]) -> list[list[InputAnswer]] | str:
        """The answers of each chunk; or the error of the engine, which the driver reports without Ray's traceback."""
        engine = self._engine
        if isinstance(engine, str):
            return engine
        try:
            return [self._answers(engine, chunk) for chunk in parcel]
        except PrompttuneError as problem:
            return first_line(problem)

    def _answers(self, engine: Engine, chunk: Sequence[Decoded]) -> list[InputAnswer]:
        logits = score(engine, assemble(chunk, self._work, self._buffers), self._buffers)
        return answers_of(chunk, logits, self._work)


def _checked_engine(work: Work) -> Engine:
    if not work.engine.is_dir():
        raise EngineError(f"no engine at {work.engine}: its folder must be on storage that every node sees")
    found = {name: facts.version for name, facts in facts_of(EngineFolder(work.engine), list(work.known)).items()}
    if found != {name: facts.version for name, facts in work.known.items()}:
        raise EngineError(f"the engine at {work.engine} differs from the one on the machine that started the job")
    return open_engine(work)
