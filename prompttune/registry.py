"""Registries of named parts, some of which other packages provide through entry points."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any, Generic, TypeVar

from prompttune.errors import UsageError, describe_failure

Part = TypeVar("Part")
logger = logging.getLogger("prompttune")


class Registry(Mapping[str, Part], Generic[Part]):
    """Parts by name, in the order of their registration.

    Entry points are loaded at the first lookup of a name. An entry point that fails is logged as a warning; the others
    are still loaded.

    Args:
        kind: description of the parts.
        group: group of the entry points.
        register: called with the name and the object of an entry point; adds the part.
    """

    def __init__(self, kind: str, group: str, register: Callable[[str, Any], object]) -> None:
        self.kind, self.group = kind, group
        self._register = register
        self._parts: dict[str, Part] = {}
        self._lock = threading.RLock()
        self._loaded = False

    def add(self, name: str, part: Part) -> None:
        """Add a part; a part that was redefined under the same module and name replaces the old one.

        Raises:
            UsageError: the name is taken by another part.
        """
        known = self._parts.get(name)
        if known is not None and _origin(known) != _origin(part):
            taken = f"a {self.kind} named {name!r} is registered already, by {_origin(known)}"
            raise UsageError(f"{taken}: give {_origin(part)} another name")
        self._parts[name] = part

    def registered(self) -> dict[str, Part]:
        """The parts so far, without those of entry points that are not loaded yet."""
        return dict(self._parts)

    def _all(self) -> dict[str, Part]:
        with self._lock:
            if not self._loaded:
                self._loaded = True  # set first, because a loaded package may look up names itself
                for entry in sorted(metadata.entry_points(group=self.group)):
                    self._load(entry)
        return self._parts

    def _load(self, entry: metadata.EntryPoint) -> None:
        try:
            self._register(entry.name, entry.load())
        except (Exception, SystemExit) as problem:  # any error of another package; the others are still loaded
            package = entry.dist.name if entry.dist else "?"
            found = (self.kind, entry.name, package, entry.value, describe_failure(problem))
            logger.warning("the %s %s of the package %s (%s) is left out: %s", *found)

    def __getitem__(self, name: str) -> Part:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._all()))

    def __len__(self) -> int:
        return len(self._all())


def _origin(part: object) -> str:
    name = getattr(part, "__qualname__", None)
    return repr(part) if name is None else f"{getattr(part, '__module__', '?')}.{name}"
