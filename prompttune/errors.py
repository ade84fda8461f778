"""Errors that reach a user: one clear line each, and the exit code of the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from errno import ENOSPC


class PrompttuneError(Exception):
    """Base of every error that prompttune raises on purpose. The command line prints it as one line."""

    exit_code = 1


class UsageError(PrompttuneError):
    """A name, an option or a setting is wrong; nothing has been started."""

    exit_code = 2


class BackboneError(PrompttuneError):
    """A backbone cannot be built, or its weights cannot be found, read or matched."""


class CheckpointError(PrompttuneError):
    """A prompt checkpoint is missing, damaged or does not fit."""


class DataError(PrompttuneError):
    """A data set is missing, empty or too damaged to go on."""


class TrainingError(PrompttuneError):
    """Training cannot go on."""


class DivergedError(TrainingError):
    """The loss or a parameter is no longer finite.

    Args:
        what: what was seen.
        advice: what to do about it where the run was started.
    """

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}; {advice}")
        self.what = what


class EngineError(PrompttuneError):
    """An engine folder, or a task in it, is missing, damaged or does not fit."""


class ParityError(PrompttuneError):
    """An engine does not answer as PyTorch does."""


class MissingExtraError(PrompttuneError):
    """A library that belongs to an optional extra is not installed."""

    def __init__(self, package: str, extra: str, instead: str = "") -> None:
        hint = f"; {instead}" if instead else ""
        super().__init__(f"{package} is not installed: pip install 'prompttune[{extra}]'{hint}")


def first_line(problem: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    lines = str(problem).strip().splitlines()
    return lines[0].strip() if lines else type(problem).__name__


NO_MEMORY = "out of memory"
_NO_MEMORY_SIGNS = ("can't allocate memory", NO_MEMORY, "bad_alloc", "bad allocation", "failed to allocate memory")
"""How libraries tell that memory ran out, in small letters."""


def describe_failure(problem: BaseException) -> str:
    """One line for whatever ended a piece of work."""
    text = " ".join(str(problem).split())
    if isinstance(problem, PrompttuneError):
        return text
    if isinstance(problem, MemoryError) or any(sign in text.lower() for sign in _NO_MEMORY_SIGNS):
        return f"{NO_MEMORY}; use smaller batches, fewer workers or threads, or a smaller image size ({text[:200]})"
    if isinstance(problem, OSError) and problem.strerror:
        where = f": {problem.filename}" if problem.filename else ""
        advice = "; free some space and start again, with --resume where there is a run" * (problem.errno == ENOSPC)
        return f"{problem.strerror}{where}{advice}"
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__


MOST_NAMES = 40
"""So many names of what is known are told at most."""


def some_names(names: Iterable[str]) -> str:
    """The first :data:`MOST_NAMES` of some names, and how many more there are; ``none`` of none."""
    return shortened(list(names), MOST_NAMES) or "none"


def shortened(names: Sequence[str], limit: int = 5) -> str:
    """Names joined by commas, the first few of many."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def choose(kind: str, name: object, known: Iterable[str]) -> str:
    """Return ``name`` if it is one of ``known``, else raise a :class:`UsageError` that names the nearest."""
    options = list(known)
    if isinstance(name, str) and name in options:
        return name
    near = difflib.get_close_matches(str(name), options, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {some_names(options)}"
    raise UsageError(f"unknown {kind} {name!r}; {hint}")
