"""A folder that new images arrive in."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from prompttune.data.files import Walk, is_hidden
from prompttune.errors import DataError, first_line
from prompttune.images import is_image
from prompttune.serve.infer.items import FilePayload, Item
from prompttune.serve.infer.libraries import library
from prompttune.serve.infer.settings import SourceSettings
from prompttune.serve.infer.sources.base import SourceContext, printable
from prompttune.serve.infer.sources.waiting import Unbounded

SETTLE_S = 0.5
STEP_MS = 250
"""Milliseconds between two checks of files that are still being written."""


class Signature(NamedTuple):
    """Time and size of a file, which tell one content from the next."""

    modified_ns: int
    size: int


@dataclass
class _SeenFile:
    signature: Signature
    since: float


class Arrivals:
    """Files that are complete and whose current content has not been given before.

    A file is complete once it is not empty, and its size and modification time have not changed for ``settle_s``
    seconds. If it changes later, it is given again.

    Args:
        settle_s: seconds without a change before a file is complete.
        clock: monotonic clock in seconds.
    """

    def __init__(self, settle_s: float = SETTLE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._settle_s = settle_s
        self._clock = clock
        self._given: dict[Path, Signature] = {}
        self._held: dict[Path, _SeenFile] = {}

    def note(self, path: Path, age_s: float = 0.0) -> None:
        """Record an event for a file, or a found file that has not changed for ``age_s`` seconds."""
        signature = _signature(path)
        if signature is None or signature == self._given.get(path):
            self._held.pop(path, None)
            return
        held = self._held.get(path)
        if held is None or held.signature != signature:
            self._held[path] = _SeenFile(signature, self._clock() - min(self._settle_s, age_s))

    def pass_over(self, path: Path) -> None:
        """Mark a file's current content as given."""
        if (signature := _signature(path)) is not None:
            self._given[path] = signature

    def complete(self) -> Iterator[Path]:
        """Files that have become complete, in the order of their arrival."""
        for path in list(self._held):
            self.note(path)
            held = self._held.get(path)
            if held is None:
                continue
            if held.signature.size and self._clock() - held.since >= self._settle_s:
                del self._held[path]
                self._given[path] = held.signature
                yield path


class WatchedFolder(Unbounded):
    """The images in a folder and its subfolders, and then each new image once it is completely written.

    The existing images come first, sorted, then new ones in the order of their arrival. ``source`` is the folder as
    given plus the path below it. See :class:`Arrivals` for when a file is complete; an image that changes is given
    again. Hidden files are left out, such as those that a copy is written to before it gets its name.

    Kernel events do not cross network file systems; ``WATCHFILES_FORCE_POLLING=true`` polls the folder instead.

    Args:
        folder: folder to watch.
        done: tells whether an earlier run has answered an existing image in its current state.
        limit: largest number of items.
        buffer: largest number of waiting items.
        settle_s: see :class:`Arrivals`.

    Raises:
        DataError: the folder does not exist.
        MissingExtraError: watchfiles is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        done: Callable[[Item], bool] = lambda _: False,
        limit: int | None = None,
        buffer: int = 64,
        settle_s: float = SETTLE_S,
    ) -> None:
        super().__init__(buffer, "none", limit)
        self._watch = library("watchfiles", "stream", "or give the folder without watching it").watch
        self._folder = Path(folder)
        self._root = Path(os.path.realpath(folder))
        if not self._root.is_dir():
            raise DataError(f"no folder {folder} to watch")
        self._done = done
        self._arrivals = Arrivals(settle_s)
        self._skipped = 0

    @classmethod
    def takes(cls, name: str, settings: SourceSettings) -> bool:  # noqa: ARG003
        """See :class:`Source`."""
        return settings.watch

    @classmethod
    def open(cls, name: str, context: SourceContext) -> WatchedFolder:
        """See :class:`Source`."""
        return cls(name, done=context.done, limit=context.settings.limit)

    def counts(self) -> Mapping[str, int]:
        """``skipped``: existing images that were answered before; ``dropped``: images that were read and dropped."""
        return {"skipped": self._skipped, "dropped": self._waiting.dropped}

    def _read(self) -> None:
        try:
            self._first_look()
            self._give()
            self._follow()
        except OSError as problem:  # such as the kernel's limit on watches
            raise DataError(f"cannot watch {self._folder}: {first_line(problem)}") from problem

    def _first_look(self) -> None:
        now = time.time()
        found = Walk(self._root, refuse=_leave_out)
        found.warn()
        for path in found.paths:
            if self._stopping.is_set():
                return
            done = self._done(self._item(path))
            self._skipped += done
            if done:
                self._arrivals.pass_over(path)
            elif (signature := _signature(path)) is not None:
                self._arrivals.note(path, max(0.0, now - signature.modified_ns / 1e9))

    def _follow(self) -> None:
        changes = self._watch(
            self._root,
            watch_filter=None,
            stop_event=self._stopping,
            debounce=STEP_MS,
            rust_timeout=STEP_MS,
            yield_on_timeout=True,
            raise_interrupt=False,
        )
        watching = False
        for changed in changes:
            if not self._root.is_dir():
                raise DataError(f"the watched folder {self._folder} is gone")
            # Files from before the watch started, and those in a new folder before it was watched, cause no event.
            found = [path for _, path in changed] if watching else [self._root]
            watching = True
            for path in map(Path, found):
                if any(map(is_hidden, path.relative_to(self._root).parts)):
                    continue
                below = Walk(path, refuse=_leave_out).paths if path.is_dir() else [path] * is_image(path.name)
                for image in below:
                    self._arrivals.note(image)
            self._give()

    def _give(self) -> None:
        for path in self._arrivals.complete():
            if self._stopping.is_set():
                return
            self._waiting.put(self._item(path))

    def _item(self, path: Path) -> Item:
        return Item(printable(str(self._folder / path.relative_to(self._root))), FilePayload(path))


def _leave_out(problem: OSError) -> None:
    """Ignore the error: the folder may be gone, or closed to this user until its owner opens it."""


def _signature(path: Path) -> Signature | None:
    """The signature of a file; None if it does not exist."""
    with contextlib.suppress(OSError):
        found = path.stat()
        if stat.S_ISREG(found.st_mode):
            return Signature(found.st_mtime_ns, found.st_size)
    return None
