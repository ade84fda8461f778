"""Former name of :mod:`prompttune.data`, for scripts that still import it."""

from prompttune.data import *  # noqa: F403
