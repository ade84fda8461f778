"""Rows to write, and full disks."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from prompttune.serve.answers import Score
from prompttune.serve.infer.rows import InputAnswer, Row
from prompttune.serve.infer.sinks import Sink

VERSION = "0a1b2c"


def texts() -> st.SearchStrategy[str]:
    """Labels and names of any characters, quotes, separators and line ends among them."""
    return st.text(
        st.one_of(st.sampled_from("\r\n\t,;\"'=\\{}\0 €日𝛾"), st.characters(exclude_categories=["Cs"])), max_size=8
    )


def numbers() -> st.SearchStrategy[float]:
    return st.floats(0, 1) | st.sampled_from([1 / 3, 5e-324, 0.1 + 0.2])


@st.composite
def rows(draw: st.DrawFn, labelled: bool = False) -> Row:
    where: dict[str, Any] = {
        "source": draw(texts()),
        "task": draw(st.sampled_from(["birds", "digits", "7"])),
        "row": draw(st.none() | st.integers(0, 2**40)),
        "frame": draw(st.none() | st.integers(0, 2**40)),
        "timestamp": draw(st.none() | st.floats(0, 2e9)),
        "task_version": VERSION,
    }
    if labelled:
        where["target"] = draw(st.none() | texts().filter(bool))
        where["target_probability"] = draw(st.none() | numbers())
    if draw(st.booleans()):
        return Row(**where, error=draw(texts().filter(bool)))
    scores = tuple(Score(draw(texts()), draw(numbers())) for _ in range(draw(st.integers(1, 3))))
    return Row(**where, label=scores[0].label, probability=scores[0].probability, top_k=scores)


def answer(number: int, tasks: Sequence[str] = ("birds",), picture: Any = None) -> InputAnswer:
    """Input ``number`` with its rows; every fifth could not be read."""
    if number % 5 == 4:
        return InputAnswer(tuple(Row(f"{number}.png", task, VERSION, error="not an image") for task in tasks))
    share = (number % 7 + 1) / 9
    scores = (Score(f"Küste {number}", share), Score("other", 1 - share))
    return InputAnswer(
        tuple(
            Row(f"{number}.png", task, VERSION, label=scores[0][0], probability=share, top_k=scores) for task in tasks
        ),
        picture,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def write(sink: Sink, answers: Iterable[InputAnswer]) -> None:
    """A whole run of a sink."""
    for one in answers:
        sink.write(one)
    sink.finish()
    sink.close()


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes: a write stops in its middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
