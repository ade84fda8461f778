"""Finding images in folders: which files are hidden, where links lead, and the order of the files."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import logging
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from prompttune.errors import DataError, UsageError
from prompttune.images import is_image, is_unread_image, unread_remedy

logger = logging.getLogger("prompttune")

SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"})
"""Folders that systems and archives create; they count as hidden."""
NO_URLS = "prompttune reads no URLs: download it first"
_DRIVE = re.compile("[A-Za-z]:/")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


class Walk:
    """The images at any depth below a folder, each file once.

    Hidden files and folders are skipped. A symbolic link is followed only if it leads to something new: a link to a
    parent folder, or to a file or folder that was already found, is ignored. Files without links are found first, so a
    link cannot take a file away from the folder that holds it. A broken link counts as a file that
    cannot be read.

    Args:
        root: the folder.
        refuse: called for each folder that cannot be entered; None raises :class:`DataError`, which names it.
        wanted: tells whether a file of this name counts; images by default.

    Attributes:
        images: paths relative to the root, with forward slashes, sorted by the names of their components.
        folders: the folders below the root in the same order, relative to it, including links to folders.
        unread: pictures in unsupported formats, in the same order.
        lost: broken links without a file name's form, so that a folder may be missing.
    """

    def __init__(
        self,
        root: Path,
        refuse: Callable[[OSError], None] | None = None,
        wanted: Callable[[str], bool] = is_image,
    ) -> None:
        self.root = root
        self.images: list[str] = []
        self.folders: list[str] = []
        self.unread: list[str] = []
        self.lost: list[str] = []
        self._wanted = wanted
        self._refuse = refuse or _refuse
        self._links: list[str] = []
        self._files: set[tuple[int, int]] = set()
        """Device and inode of each file, which identify it."""
        self._entered: set[tuple[int, int]] = set()
        for above in root.resolve().parents:
            with contextlib.suppress(OSError):
                self._entered.add(_identity(above.stat()))
        self._enter("")
        while self._links:
            # a link directly below the root precedes links inside class folders
            links, self._links = sorted(self._links, key=lambda one: (one.count("/"), components(one))), []
            for link in links:
                self._follow(link)
        for found in (self.images, self.folders, self.unread):
            found.sort(key=components)

    @property
    def paths(self) -> list[Path]:
        """Paths of the images, including the root."""
        return [self.root / name for name in self.images]

    def warn(self) -> None:
        """Log a warning about unsupported pictures, and one about broken links, if there are any."""
        if self.unread:
            logger.warning("%d files in %s are not read: %s", len(self.unread), self.root, why_unread(self.unread))
        if self.lost:
            logger.warning("%d links in %s lead nowhere, the first: %s", len(self.lost), self.root, self.lost[0])

    def _enter(self, start: str) -> None:
        """Find everything below a folder that is reached without another link."""
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
                    visible = [entry for entry in entries if not is_hidden(entry.name)]
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
                elif self._wanted(entry.name) and entry.is_file(follow_symlinks=False):
                    self.images.append(name)
                    self._files.add((status.st_dev, entry.inode()))
                elif is_unread_image(entry.name):
                    self.unread.append(name)

    def _follow(self, name: str) -> None:
        link = self.root / name
        try:
            status = link.stat()
            target, holder = link.resolve(), link.parent.resolve()
        except (OSError, RuntimeError):  # a broken link, or a loop
            (self.images if self._wanted(link.name) else self.lost).append(name)
            return
        if stat.S_ISDIR(status.st_mode):
            self.folders.append(name)
            if not holder.is_relative_to(target):
                self._enter(name)
        elif self._wanted(link.name) and stat.S_ISREG(status.st_mode) and _identity(status) not in self._files:
            self._files.add(_identity(status))
            self.images.append(name)


def find_images(inputs: Sequence[str | Path]) -> list[Path]:
    """Image files in the order of ``inputs``: files, folders (all images below, see :class:`Walk`) and glob patterns.

    A named file is taken whatever its extension.

    Raises:
        UsageError: an input does not exist or is a URL, or a pattern matches nothing.
        DataError: a folder has no images or cannot be read.
    """
    return [path for one in inputs for path in _found(one)]


def _found(one: str | Path) -> list[Path]:
    path = Path(one)
    if path.is_dir():
        found = Walk(path)
        if not found.images:
            raise DataError(f"no images below {path}" + (f": {why_unread(found.unread)}" if found.unread else ""))
        found.warn()
        return found.paths
    if path.exists():
        return [path]
    if is_url(str(one)):
        raise UsageError(f"{one}: {NO_URLS}")
    if glob.has_magic(str(one)):
        return matches(str(one))
    raise UsageError(f"no file or folder {one}")


def matches(pattern: str) -> list[Path]:
    """The files that a glob pattern matches, in the order of their paths; ``**`` stands for folders at any depth.

    Raises:
        UsageError: the pattern matches nothing.
    """
    parts = Path(pattern).parts
    if "**" in parts:
        # glob itself would follow a link to a parent folder again and again
        first = next(place for place, part in enumerate(parts) if glob.has_magic(part))
        below = re.compile("".join("(?:.+/)?" if one == "**" else f"{_regex(one)}/" for one in parts[first:]))
        root = Path(*parts[:first])
        known = Walk(root, wanted=lambda _: True).paths if root.is_dir() else []
        found = [path for path in known if below.fullmatch(f"{path.relative_to(root).as_posix()}/")]
    else:
        found = [path for path in map(Path, sorted(glob.glob(pattern), key=components)) if path.is_file()]  # noqa: PTH207  # Path.glob takes no absolute pattern
    if not found:
        raise UsageError(f"nothing matches {pattern}")
    return found


def _regex(part: str) -> str:
    """The regular expression for a component of a pattern, without an end anchor."""
    return re.sub(r"\\[Zz]$", "", fnmatch.translate(part).replace(".*", "[^/]*"))


def is_url(text: str) -> bool:
    """Whether a path is really a URL: ``https://…``, ``s3://…`` and so on."""
    return _URL.match(text) is not None


def find_file(folder: Path, written: str) -> Path:
    """The file of a path in a table or a list, which is absolute or relative to ``folder``.

    The path is taken as written if that file exists or without alternatives; else in another Unicode form, or with
    ``/`` in place of the separators of Windows.
    """
    plain = folder / written
    if (written.isascii() and "\\" not in written) or exists(plain):
        return plain
    slashed = written.replace("\\", "/")
    forms = (unicodedata.normalize(form, text) for text in (written, slashed) for form in ("NFC", "NFD"))
    return next((path for form in forms if exists(path := folder / form)), plain)


def windows_path(folder: Path, written: str) -> str | None:
    """A hint for a path in the form of Windows that leads to nothing; None for any other path."""
    if "\\" not in written and not _DRIVE.match(written):
        return None
    slashed = folder / written.replace("\\", "/")
    return f"{written} is a path of Windows, and nothing is at {slashed}; write a path of this system, with /"


def exists(path: Path) -> bool:
    """Whether a file exists; False for a name that is too long or holds a zero byte."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_hidden(name: str) -> bool:
    """Whether files and folders of this name are skipped."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def why_unread(names: Sequence[str]) -> str:
    """Numbers of unsupported pictures by format, and what to do about them."""
    counts = Counter(Path(name).suffix.lower() for name in names)
    remedies = dict.fromkeys(unread_remedy(f"x{suffix}") for suffix in counts)
    return "; ".join([", ".join(f"{count} {suffix}" for suffix, count in counts.most_common()), *remedies])


def components(path: str) -> list[str]:
    """Components of a relative path, by which files are sorted: ``a/z.png`` comes before ``a.png``."""
    return path.split("/")


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _refuse(problem: OSError) -> None:
    """Raise an error for a folder that cannot be entered, which would otherwise be skipped silently."""
    raise DataError(f"cannot read the folder {problem.filename}: {problem.strerror}")
