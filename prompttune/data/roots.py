"""Locations of benchmark data: a folder, or a data repository on the Hugging Face hub.

A repository is named as in the hub's own file system: ``hf://datasets/OWNER/NAME[@REVISION][/FOLDER]``. Only the data
that a run reads are downloaded, into the hub's cache, and cached data work without a connection too.
"""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from prompttune.errors import DataError, UsageError
from prompttune.hub import hub_answers

HUB_PREFIX = "hf://"
_HUB_ROOT = re.compile(r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<folder>.+?))?/*")


class _HubFailedError(DataError):
    """The hub's client failed for another reason than a refusal."""


class DataRoot(ABC):
    """A location of data sets; paths are relative to it, with forward slashes."""

    @abstractmethod
    def missing(self, paths: Sequence[str]) -> list[str]:
        """The missing ones among files and folders, in the form to show to a user."""

    @abstractmethod
    def fetch(self, paths: Sequence[str]) -> Path:
        """A local folder of this root with the files and whole folders at ``paths``."""


@dataclass(frozen=True)
class LocalRoot(DataRoot):
    """A folder."""

    folder: Path

    def missing(self, paths: Sequence[str]) -> list[str]:
        """See :class:`DataRoot`."""
        return [str(self.folder / path) for path in paths if not (self.folder / path).exists()]

    def fetch(self, paths: Sequence[str]) -> Path:  # noqa: ARG002 - all of it is here
        """See :class:`DataRoot`."""
        return self.folder


@dataclass(frozen=True)
class HubRoot(DataRoot):
    """A data repository on the hub, or a folder of one."""

    repo: str
    revision: str | None
    folder: str
    """Path below the repository's top; "" for the top."""

    @classmethod
    def read(cls, text: str) -> HubRoot:
        """Parse ``hf://datasets/OWNER/NAME[@REVISION][/FOLDER]``; raises :class:`UsageError` for any other form."""
        found = _HUB_ROOT.fullmatch(text)
        if found is None:
            raise UsageError(f"{text!r}: data on the hub are given as hf://datasets/OWNER/NAME[@REVISION][/FOLDER]")
        return cls(found["repo"], found["revision"], found["folder"] or "")

    def __str__(self) -> str:
        """The root in the form in which it is given."""
        revision = f"@{self.revision}" if self.revision else ""
        return "/".join(filter(None, (f"hf://datasets/{self.repo}{revision}", self.folder)))

    def missing(self, paths: Sequence[str]) -> list[str]:
        """See :class:`DataRoot`; asks the hub, or its cache if the hub cannot be reached.

        Raises:
            DataError: the repository does not exist or is closed to this user, or the hub fails.
        """
        inside = {self._inside(path): path for path in paths}
        if not hub_answers():
            return self._cached().missing(paths)
        try:
            with self._told("look into"):
                found = HfApi().get_paths_info(self.repo, list(inside), repo_type="dataset", revision=self.revision)
        except _HubFailedError:  # the hub may have gone since the last request
            with contextlib.suppress(DataError):
                return self._cached().missing(paths)
            raise
        there = {entry.path for entry in found}
        return [f"{self}/{path}" for within, path in inside.items() if within not in there]

    def fetch(self, paths: Sequence[str]) -> Path:
        """See :class:`DataRoot`. Downloads what the hub's cache lacks, if the hub can be reached.

        Raises:
            DataError: the repository does not exist or is closed to this user, or a file cannot be downloaded.
        """
        wanted = [pattern for path in map(self._inside, paths) for pattern in (path, f"{path}/*")]
        return self._snapshot("fetch data of", wanted, offline=not hub_answers())

    def _inside(self, path: str) -> str:
        return "/".join(filter(None, (self.folder, path)))

    def _cached(self) -> LocalRoot:
        """The cached part of the repository, without requesting anything by name."""
        return LocalRoot(self._snapshot("look into", [], offline=True))

    def _snapshot(self, what: str, patterns: list[str], *, offline: bool) -> Path:
        with self._told(what):
            place = snapshot_download(
                self.repo,
                repo_type="dataset",
                revision=self.revision,
                local_files_only=offline,
                allow_patterns=patterns,
            )
        return Path(place) / self.folder

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Turn the errors of the hub's client into one line."""
        try:
            yield
        except (RepositoryNotFoundError, GatedRepoError) as problem:
            raise self._refused(problem) from None
        except LocalEntryNotFoundError:
            raise DataError(f"{self}: the hub is out of reach, and its cache holds nothing of this") from None
        except Exception as problem:  # the client's HTTP library, and so its errors, differ between versions
            reason = " ".join(str(problem).split()) or type(problem).__name__
            raise _HubFailedError(f"cannot {what} {self}: {reason}") from None

    def _refused(self, problem: Exception) -> DataError:
        why = "it is gated: accept its terms on the hub" if isinstance(problem, GatedRepoError) else "no such data set"
        return DataError(f"{self}: {why}, or log in with `hf auth login` if it is private")


def data_root(text: str) -> DataRoot:
    """The root for ``--data-root``; raises :class:`UsageError` if it is neither a folder nor on the hub."""
    return HubRoot.read(text) if text.startswith(HUB_PREFIX) else LocalRoot(Path(text).expanduser())
