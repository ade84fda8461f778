"""The one walk through a folder of images: what is hidden, where links lead, and the order that files come in."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from prompttune.errors import DataError
from prompttune.images import is_image

HIDDEN = "."


class Walk:
    """The images at any depth below a folder, each file once.

    Hidden files and folders are skipped. A symbolic link is followed where it brings something new: one to a folder
    above it, or to a file or a folder that has been found already, gives nothing. Everything without links is found
    first, so a link takes no file away from the folder that holds it. A link that leads nowhere counts as a file, which
    cannot be read.

    Args:
        root: the folder.
        refuse: called for each folder that may not be entered; None raises :class:`DataError`, which names it.

    Attributes:
        images: paths relative to the root, with forward slashes, in the order of the names of their components.
        folders: the folders below the root in that order, relative to it, links to folders among them.
    """

    def __init__(self, root: Path, refuse: Callable[[OSError], None] | None = None) -> None:
        self.root = root
        self.images: list[str] = []
        self.folders: list[str] = []
        self._refuse = refuse or _refuse
        self._links: list[str] = []
        self._files: set[tuple[int, int]] = set()
        """Device and inode, which tell a file from every other one."""
        self._entered = {_identity(above.stat()) for above in root.resolve().parents}
        self._enter("")
        while self._links:
            links, self._links = sorted(self._links, key=components), []
            for link in links:
                self._follow(link)
        self.images.sort(key=components)
        self.folders.sort(key=components)

    @property
    def paths(self) -> list[Path]:
        """The images, with the root in front."""
        return [self.root / name for name in self.images]

    def _enter(self, start: str) -> None:
        """Find what lies below a folder without a link in between."""
        waiting = [start]
        while waiting:
            folder = waiting.pop()
            place = self.root / folder
            try:
                status = place.stat()
                if _identity(status) in self._entered:
                    continue
                self._entered.add(_identity(status))
                with os.scandir(place) as entries:
                    visible = [entry for entry in entries if not entry.name.startswith(HIDDEN)]
            except OSError as problem:
                self._refuse(problem)
                continue
            for entry in visible:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_symlink():
                    self._links.append(name)
                elif entry.is_dir(follow_symlinks=False):
                    self.folders.append(name)
                    waiting.append(name)
                elif is_image(entry.name) and entry.is_file(follow_symlinks=False):
                    self.images.append(name)
                    self._files.add((status.st_dev, entry.inode()))

    def _follow(self, name: str) -> None:
        link = self.root / name
        try:
            status = link.stat()
            target, holder = link.resolve(), link.parent.resolve()
        except (OSError, RuntimeError):  # it leads nowhere, or in a circle
            if is_image(link.name):
                self.images.append(name)
            return
        if stat.S_ISDIR(status.st_mode):
            self.folders.append(name)
            if not holder.is_relative_to(target):
                self._enter(name)
        elif is_image(link.name) and stat.S_ISREG(status.st_mode) and _identity(status) not in self._files:
            self._files.add(_identity(status))
            self.images.append(name)


def components(path: str) -> list[str]:
    """Names of a relative path, by which files are sorted: ``a/z.png`` comes before ``a.png``."""
    return path.split("/")


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _refuse(problem: OSError) -> None:
    """A folder that may not be entered would otherwise be left out without a word."""
    raise DataError(f"cannot read the folder {problem.filename}: {problem.strerror}")
