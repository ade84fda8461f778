"""Where the data sets of a benchmark are kept: a folder, or a repository of data on the Hugging Face hub.

A repository is named as the hub's own file system names it: ``hf://datasets/OWNER/NAME[@REVISION][/FOLDER]``. Only
what a run reads is fetched, into the hub's cache, and what the cache holds serves without a connection too.
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
    """The hub's client failed otherwise than by a refusal."""


class DataRoot(ABC):
    """A place below which data sets lie; paths are relative to it, with forward slashes."""

    @abstractmethod
    def missing(self, paths: Sequence[str]) -> list[str]:
        """Those of the files and folders that are not there, each as it can be told to a user."""

    @abstractmethod
    def fetch(self, paths: Sequence[str]) -> Path:
        """The root as a folder of this machine that holds the files and whole folders at ``paths``."""


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
    """A repository of data on the hub, or a folder of one."""

    repo: str
    revision: str | None
    folder: str
    """Below the repository's top, "" for the top itself."""

    @classmethod
    def read(cls, text: str) -> HubRoot:
        """Take ``hf://datasets/OWNER/NAME[@REVISION][/FOLDER]`` apart; raises :class:`UsageError` if it is not that."""
        found = _HUB_ROOT.fullmatch(text)
        if found is None:
            raise UsageError(f"{text!r}: data on the hub are given as hf://datasets/OWNER/NAME[@REVISION][/FOLDER]")
        return cls(found["repo"], found["revision"], found["folder"] or "")

    def __str__(self) -> str:
        """As it is given."""
        revision = f"@{self.revision}" if self.revision else ""
        return "/".join(filter(None, (f"hf://datasets/{self.repo}{revision}", self.folder)))

    def missing(self, paths: Sequence[str]) -> list[str]:
        """See :class:`DataRoot`; asks the hub, or its cache if the hub is out of reach.

        Raises:
            DataError: the repository is not there or not open to this user, or the hub fails.
        """
        inside = {self._inside(path): path for path in paths}
        if not hub_answers():
            return self._cached().missing(paths)
        try:
            with self._told("look into"):
                found = HfApi().get_paths_info(self.repo, list(inside), repo_type="dataset", revision=self.revision)
        except _HubFailedError:  # it may have gone since it was last asked
            with contextlib.suppress(DataError):
                return self._cached().missing(paths)
            raise
        there = {entry.path for entry in found}
        return [f"{self}/{path}" for within, path in inside.items() if within not in there]

    def fetch(self, paths: Sequence[str]) -> Path:
        """See :class:`DataRoot`. Fetches what the hub's cache lacks, if the hub can be reached.

        Raises:
            DataError: the repository is not there or not open to this user, or a file cannot be fetched.
        """
        wanted = [pattern for path in map(self._inside, paths) for pattern in (path, f"{path}/*")]
        return self._snapshot("fetch data of", wanted, offline=not hub_answers())

    def _inside(self, path: str) -> str:
        return "/".join(filter(None, (self.folder, path)))

    def _cached(self) -> LocalRoot:
        """Whatever part of the repository is on this machine: nothing is asked for by name."""
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
        """Make what the hub's client raises one line."""
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
    """The place that ``--data-root`` names; raises :class:`UsageError` if it is neither a folder nor on the hub."""
    return HubRoot.read(text) if text.startswith(HUB_PREFIX) else LocalRoot(Path(text).expanduser())
