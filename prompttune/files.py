"""Safe files: no half-written files (temporary file, fsync, rename), no two writers (locks), digests to check them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from prompttune.errors import PrompttuneError, UsageError

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_OF_THE_SYSTEM = "lost+found"
"""Folder that ext4 creates at the root of every volume and that cannot be removed."""
_LOG = logging.getLogger("prompttune.files")
_mine = threading.local()
_held: set[IO[bytes]] = set()

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Write a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a written file to the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path next to ``path``; move the file to ``path`` when the block ends without an error.

    The rename is atomic, so a reader sees either the old or the new file, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        with _system_errors(path):
            yield temporary
        temporary.chmod(0o666 & ~_umask())
        sync_file(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """Turn a failed write that a Rust library (safetensors) reports in its own words into an :class:`OSError`."""
    try:
        yield
    except (SafetensorError, RuntimeError) as problem:
        if (found := _OS_ERROR.search(str(problem))) is None:
            raise
        code = int(found[1])
        raise OSError(code, os.strerror(code), str(path)) from problem


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def replacing_folder(path: Path, last: str | None = None) -> Iterator[Path]:
    """Give a temporary folder; its content replaces that of ``path`` when the block ends without an error.

    The caller holds :func:`locked`, so the remains of a killed process are removed first.

    Args:
        path: the folder. An existing one is moved aside first and removed last, unless ``last`` is given.
        last: the file that makes the folder valid. With it, an existing folder keeps its place and gets new content,
            because it may be a mount point or in a folder without rename permission. This file is removed first and
            written last, so that a crash cannot leave a valid folder with mixed content. Hidden files stay.
    """
    within = last is not None and path.is_dir()
    parent = path if within else path.parent
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f".{glob.escape(path.name)}.*.part"):
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(".part", f".{path.name}.", parent))
    temporary.chmod(0o777 & ~_umask())
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                sync_file(file)
        if last is not None and within:
            _fill(path, temporary, last)
        elif path.exists():
            aside = Path(tempfile.mkdtemp(".part", f".{path.name}.old.", parent))
            path.replace(aside / path.name)
            temporary.replace(path)
            shutil.rmtree(aside)
        else:
            temporary.replace(path)
        sync_folder(parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(path: Path, temporary: Path, last: str) -> None:
    """Replace the content of ``path`` by that of its subfolder ``temporary``; see above."""
    made, aside = list(temporary.iterdir()), temporary / ".old"
    aside.mkdir()
    for old in sorted(visible(path), key=lambda one: one.name != last):
        Path(old.path).replace(aside / old.name)
    for new in sorted(made, key=lambda one: one.name == last):
        new.replace(path / new.name)


def visible(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Entries of a folder, without hidden files and those of the file system; empty for a missing folder."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as found:
        yield from (one for one in found if not one.name.startswith(".") and one.name != _OF_THE_SYSTEM)


LOCK_FILE = ".lock"
"""Name of the file in a folder that the folder's writer locks."""


@contextlib.contextmanager
def locked(path: Path, again: bool = False) -> Iterator[None]:
    """Keep other writers away from a file or folder, which need not exist yet, until the block ends.

    The lock is the kernel's (``flock``): it ends with its process, however that ends. It is on a hidden file next to
    ``path`` and, if ``path`` is a folder, on one inside it, which is visible through every mount of the folder. A
    warning is logged for a file system without locks.

    Args:
        path: the file or folder.
        again: whether to succeed if this thread holds the lock already.

    Raises:
        UsageError: another process, which is named, holds the lock, or the place cannot be written. No file was
            changed.
    """
    path = path.absolute() if path.is_symlink() and not path.exists() else path.resolve()
    mine: set[Path] = _mine.__dict__.setdefault("paths", set())
    if again and path in mine:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(_locked_file(path.parent / f".{path.name}.lock", path))
            except OSError as problem:
                if problem.errno not in _READ_ONLY or not path.is_dir():
                    raise
            if path.is_dir():
                stack.enter_context(_locked_file(path / LOCK_FILE, path))
        except OSError as problem:
            where = f" ({problem.filename})" if problem.filename else ""
            raise UsageError(f"cannot write to {path}: {problem.strerror or problem}{where}") from None
        mine.add(path)
        stack.callback(mine.discard, path)
        yield


@contextlib.contextmanager
def _locked_file(file: Path, path: Path) -> Iterator[None]:
    stream = _take(file, path)
    _held.add(stream)
    try:
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()} ({command})".encode("utf-8", "replace"))
        stream.flush()
        yield
    finally:
        _held.discard(stream)
        with stream:
            if not stream.closed and _is_at(file, stream):
                file.unlink(missing_ok=True)


def _take(file: Path, path: Path) -> IO[bytes]:
    """Create and lock a file; its holder removes it later."""
    while True:
        stream = file.open("a+b")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, stream):
                return stream
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read().decode("utf-8", "replace") or "it does not say which"
            stream.close()
            raise UsageError(
                f"another run writes to {path}: {holder}; wait for its end, or choose another output"
            ) from None
        except OSError as problem:
            if problem.errno in _NO_LOCKS:
                _LOG.warning("%s: this file system has no locks; let no two processes write there", file.parent)
                return stream
            stream.close()
            raise
        stream.close()  # the last holder removed it between the two calls


def _is_at(file: Path, stream: IO[bytes]) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def _let_go() -> None:
    """Release the locks in a forked process: they belong to the parent and end with it."""
    for stream in _held:
        stream.close()
    _held.clear()
    _mine.__dict__.clear()


os.register_at_fork(after_in_child=_let_go)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented, with the keys in the given order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, error: type[PrompttuneError], what: str) -> dict[str, Any]:
    """Read a JSON object; on a failure raise ``error`` with one line that names the file and its kind ``what``."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"no {what} at {path}") from None
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"cannot read the {what} {path}: {problem}") from None
    if not isinstance(value, dict):
        raise error(f"the {what} {path} is not a JSON object")
    return value
