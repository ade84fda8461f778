"""Optional libraries, imported where they are used; each caller names an alternative for the error message."""

from __future__ import annotations

from typing import Any

from prompttune.errors import MissingExtraError


def pyav(instead: str) -> Any:
    """The module ``av``.

    Raises:
        MissingExtraError: PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise MissingExtraError("av", "stream", instead) from None
    return av


def pyarrow(instead: str) -> Any:
    """The module ``pyarrow``, with its Parquet part.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "tables", instead) from None
    return pyarrow


def watchfiles(instead: str) -> Any:
    """The module ``watchfiles``.

    Raises:
        MissingExtraError: watchfiles is not installed.
    """
    try:
        import watchfiles
    except ImportError:
        raise MissingExtraError("watchfiles", "stream", instead) from None
    return watchfiles
