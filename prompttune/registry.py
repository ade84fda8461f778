"""The one way in which an extension is added: a registry of named parts.

Methods, backbones, task types, sources, sinks, formats, runtimes and layouts of released checkpoints each have one::

    FORMATS: Registry[type[Format]] = Registry("format", "prompttune.formats")
    FORMATS.add("onnx", "prompttune.export.formats.onnx:OnnxFormat")  # imported at the first FORMATS["onnx"]
    FORMATS.add("mine", MineFormat)

``FORMATS["mine"]`` is the part; an unknown name raises an error that names the known ones. A registry is a mapping, so
it also serves as the ``choices`` of a setting. Other packages add parts through entry points of the registry's group::

    [project.entry-points."prompttune.formats"]
    mine = "my_package:MineFormat"
"""

from __future__ import annotations

import functools
import importlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any, Generic, TypeVar, cast

from prompttune.errors import PrompttuneError, UsageError, choose, describe_failure

Part = TypeVar("Part")
logger = logging.getLogger("prompttune")


class Registry(Mapping[str, Part], Generic[Part]):
    """Parts by name, in the order of their registration.

    Names are listed without importing their parts. Entry points are loaded at the first lookup; one that fails is
    logged as a warning, and the others are still loaded.

    Args:
        kind: description of the parts in errors, such as ``format``.
        group: group of the entry points, such as ``prompttune.formats``.
        check: raises :class:`UsageError` for a name or an object that cannot be registered.
        base: class of which every part is a subclass.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        check: Callable[[str, Any], object] = lambda _name, _part: None,
        base: type[Any] | None = None,
    ) -> None:
        self.kind, self.group = kind, group
        self._check, self._base = check, base
        self._parts: dict[str, Part | str] = {}
        self._lock = threading.RLock()
        self._loaded = False

    def add(self, name: str, part: Part | str) -> None:
        """Add a part, or ``module:attribute`` to import at its first use.

        A part that was redefined under the same module and name, as in a notebook, replaces the old one.

        Raises:
            UsageError: the name is taken by another part, or the part is not one of this kind.
        """
        if not isinstance(part, str):
            self._checked(name, part)
        known = self._parts.get(name)
        if known is not None and _origin(known) != _origin(part):
            taken = f"a {self.kind} named {name!r} is registered already, by {_origin(known)}"
            raise UsageError(f"{taken}: give {_origin(part)} another name")
        self._parts[name] = part

    def registered(self) -> dict[str, Part]:
        """The parts so far, without those of entry points that are not loaded yet."""
        return {name: self._imported(name) for name in list(self._parts)}  # an import may register more of them

    def _imported(self, name: str) -> Part:
        part = self._parts[name]
        if isinstance(part, str):
            module, _, attribute = part.partition(":")
            try:
                made: Any = getattr(importlib.import_module(module), attribute)
            except PrompttuneError:
                raise
            except (Exception, SystemExit) as problem:  # any error of another package
                where = f"the {self.kind} {name} cannot be imported from {part}"
                raise UsageError(f"{where}: {describe_failure(problem)}") from problem
            self._parts[name] = made  # first, because the check may look at every part
            try:
                self._checked(name, made)
            except UsageError:
                self._parts[name] = part
                raise
        return cast(Part, self._parts[name])

    def _checked(self, name: str, part: Any) -> None:
        if self._base is not None and not (isinstance(part, type) and issubclass(part, self._base)):
            raise UsageError(f"the {self.kind} {name!r} must be a subclass of {self._base.__name__}, not {part!r}")
        self._check(name, part)

    def _all(self) -> dict[str, Part | str]:
        with self._lock:
            if not self._loaded:
                self._loaded = True  # set first, because a loaded package may look up names itself
                for entry in sorted(metadata.entry_points(group=self.group)):
                    self._load(entry)
        return self._parts

    def _load(self, entry: metadata.EntryPoint) -> None:
        try:
            self.add(entry.name, entry.load())
        except (Exception, SystemExit) as problem:  # any error of another package; the others are still loaded
            package = entry.dist.name if entry.dist else "?"
            found = (self.kind, entry.name, package, entry.value, describe_failure(problem))
            logger.warning("the %s %s of the package %s (%s) is left out: %s", *found)

    def __getitem__(self, name: str) -> Part:
        """The part of this name; raises :class:`UsageError` for one that is unknown or cannot be imported."""
        return self._imported(choose(self.kind, name, self._all()))

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._all()))

    def __len__(self) -> int:
        return len(self._all())


def _origin(part: object) -> str:
    """Module and name of a part: those of its class for an instance, with the arguments for a partial function."""
    if isinstance(part, str):
        return part.replace(":", ".")
    if isinstance(part, functools.partial):
        given = [*map(repr, part.args), *(f"{name}={value!r}" for name, value in part.keywords.items())]
        return f"{_origin(part.func)}({', '.join(given)})"
    named: Any = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}.{named.__qualname__}"
