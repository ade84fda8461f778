"""Errors for the user: one clear line each, with the exit code of the command line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from errno import ENOSPC


class PrompttuneError(Exception):
    """Base of every error that prompttune raises on purpose. The command line prints it as one line."""

    exit_code = 1


class UsageError(PrompttuneError):
    """A name, an option or a setting is wrong; no work has been started."""

    exit_code = 2


class BackboneError(PrompttuneError):
    """A backbone cannot be built, or its weights cannot be found, read or matched."""


class CheckpointError(PrompttuneError):
    """A prompt checkpoint is missing, damaged or does not fit."""


class DataError(PrompttuneError):
    """A data set is missing, empty or too damaged to continue."""


class TrainingError(PrompttuneError):
    """Training cannot continue."""


class DivergedError(TrainingError):
    """The loss or a parameter is no longer finite.

    Args:
        what: the observation.
        advice: what to do about it, in terms of the command that started the run.
    """

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}; {advice}")
        self.what = what


class EngineError(PrompttuneError):
    """An engine folder, or a task in it, is missing, damaged or does not fit."""


class ParityError(PrompttuneError):
    """An engine's answers differ from PyTorch's."""


class MissingExtraError(PrompttuneError):
    """A library of an optional extra is not installed."""

    def __init__(self, package: str, extra: str, instead: str = "") -> None:
        hint = f"; {instead}" if instead else ""
        super().__init__(f"{package} is not installed: pip install 'prompttune[{extra}]'{hint}")


def first_line(problem: BaseException) -> str:
    """The first line of an error's text, or its type if it does not have any."""
    lines = str(problem).strip().splitlines()
    return lines[0].strip() if lines else type(problem).__name__


NO_MEMORY = "out of memory"
_NO_MEMORY_SIGNS = ("can't allocate memory", NO_MEMORY, "bad_alloc", "bad allocation", "failed to allocate memory")
"""Texts of libraries for exhausted memory, in lower case."""


def describe_failure(problem: BaseException) -> str:
    """One line about any error that ended a piece of work."""
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
"""Largest number of known names in a message."""


def some_names(names: Iterable[str]) -> str:
    """The first :data:`MOST_NAMES` of some names, and the number of the others; ``none`` for an empty list."""
    return shortened(list(names), MOST_NAMES) or "none"


def shortened(names: Sequence[str], limit: int = 5) -> str:
    """The first names, joined by commas, and the number of the others."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def choose(kind: str, name: object, known: Iterable[str]) -> str:
    """Return ``name`` if it is one of ``known``; else raise a :class:`UsageError` that names the nearest."""
    options = list(known)
    if isinstance(name, str) and name in options:
        return name
    # A number beside others is no misspelling.
    near = difflib.get_close_matches(str(name), options, n=3) if re.search("[a-z]", str(name), re.IGNORECASE) else []
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {some_names(options)}"
    raise UsageError(f"unknown {kind} {name!r}; {hint}")
