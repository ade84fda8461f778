"""The model repository: tasks are loaded and unloaded while the server runs, each change atomic."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

from prompttune.errors import PrompttuneError
from prompttune.export.folder import TaskRecord
from prompttune.serve.batching.replica import DeviceReplica
from prompttune.serve.messages import BadRequestError, NotFoundError, UnavailableError
from prompttune.serve.service.catalogue import Catalogue, Numbers
from prompttune.serve.service.models import LOADING, READY, Model
from prompttune.serve.workers import Key, VersionGoneError, WorkerDiedError

LOG = logging.getLogger("prompttune.serve")


class Repository:
    """The served tasks. All but the catalogue's reading happens on the event loop.

    Args:
        catalogue: the tasks on disk.
        numbers: counts the versions of each task.
        replicas: devices on which a task is tried before it answers.
    """

    def __init__(self, catalogue: Catalogue, numbers: Numbers, replicas: Sequence[DeviceReplica]) -> None:
        self._catalogue = catalogue
        self._numbers = numbers
        self._replicas = replicas
        self._reading = asyncio.Lock()
        self.models: dict[str, Model] = {}
        """Every task that is or was known, by name."""

    def model(self, name: str) -> Model:
        """Find a task by its name.

        Raises:
            NotFoundError: the task does not exist.
        """
        if name not in self.models:
            raise NotFoundError(f"the task {name!r} does not exist: the repository index lists the tasks")
        return self.models[name]

    async def begin(self, records: Mapping[str, TaskRecord], problems: Mapping[str, str]) -> None:
        """Add what the first scan of the disk found; states are loaded on request."""

        def count() -> list[int]:
            return [self._numbers.number(name, record.version) for name, record in records.items()]

        for (name, record), number in zip(records.items(), await asyncio.to_thread(count), strict=True):
            self.models.setdefault(name, Model(name)).replace(record, number)
        for name, problem in problems.items():
            LOG.warning("a task cannot be served: %s", problem, extra={"task": name})
            self.models.setdefault(name, Model(name)).retire(problem)

    # ------------------------------------------------------------------ control

    async def load(self, name: str) -> None:
        """Load a task from disk; the old version answers until a worker holds the new one.

        Raises:
            NotFoundError: the task does not exist on disk.
            BadRequestError: the task is damaged or does not fit; an old version stays.
            UnavailableError: no worker can take it at the moment.
        """
        model = self.models.get(name) or Model(name)
        async with model.changing:
            try:
                record = await self._find(name)
                if record is None:
                    raise NotFoundError(f"the task {name!r} does not exist on disk")
                self.models.setdefault(name, model)
                await self._bring_in(model, record)
            except (WorkerDiedError, VersionGoneError):
                raise UnavailableError(f"the task {name!r} could not be loaded just now: try again") from None
            except (NotFoundError, UnavailableError):
                raise
            except PrompttuneError as problem:
                raise BadRequestError(f"the task {name!r} cannot be loaded: {problem}") from None

    async def unload(self, name: str) -> None:
        """Unload a task; running requests are still answered.

        Raises:
            NotFoundError: the task does not exist.
        """
        model = self.model(name)
        async with model.changing:
            model.unloaded = True
            await self._drop(model.retire("unloaded"))
        LOG.info("task unloaded", extra={"task": name})

    async def look_again(self, name: str) -> None:
        """Load the version that is on disk now, after the answering one has disappeared from disk.

        Raises:
            NotFoundError: the task's folder has disappeared.
            UnavailableError: the version on disk cannot be loaded.
        """
        model = self.model(name)
        async with model.changing:
            if model.unloaded:
                return
            try:
                record = await self._find(name)
                if record is not None:
                    await self._bring_in(model, record)
                    return
            except PrompttuneError as problem:
                raise UnavailableError(f"the task {name!r} is changing: {problem}") from None
            await self._drop(model.retire("its folder is gone"))
            raise NotFoundError(f"the task {name!r} is gone")

    async def follow(self) -> None:
        """Scan the disk once and take over new, changed and removed tasks. Never raises for a bad task."""
        async with self._reading:
            scan = await asyncio.to_thread(self._catalogue.scan)
        for name, record in scan.records.items():
            model = self.models.setdefault(name, Model(name))
            if record.version not in (model.version, model.refused) and not model.unloaded:
                await self._follow_change(model, record)
        for name, problem in scan.problems.items():
            model = self.models.setdefault(name, Model(name))
            if model.reason != problem:
                LOG.warning("a task on disk cannot be served: %s", problem, extra={"task": name})
                model.reason = problem
        for name in self.models.keys() - scan.records.keys() - scan.problems.keys():
            model = self.models[name]
            if model.state == READY:
                async with model.changing:
                    await self._drop(model.retire("its folder is gone"))
                LOG.info("task gone", extra={"task": name})

    async def _follow_change(self, model: Model, record: TaskRecord) -> None:
        async with model.changing:
            try:
                await self._bring_in(model, record)
            except (WorkerDiedError, VersionGoneError):
                return  # the next scan tries again
            except PrompttuneError as problem:
                model.refused, model.reason = record.version, f"the version {record.version} was refused: {problem}"
                LOG.warning("a task's new version was refused: %s", problem, extra={"task": model.name})

    # ------------------------------------------------------------------- pieces

    async def _find(self, name: str) -> TaskRecord | None:
        async with self._reading:
            return await asyncio.to_thread(self._catalogue.find, name)

    async def _bring_in(self, model: Model, record: TaskRecord) -> None:
        """Load before unloading: every worker that held the old version, at least one, first loads the new one."""
        old = model.key
        if model.state != READY:
            model.state = LOADING
        holders = [replica for replica in self._replicas if old is not None and replica.holds(old)]
        try:
            for replica in holders or self._replicas[:1]:
                await replica.hold(Key(record.name, record.version), record.folder)
        except PrompttuneError:
            if model.state == LOADING:
                model.retire("it could not be loaded")
            raise
        number = await asyncio.to_thread(self._numbers.number, record.name, record.version)
        await self._drop(model.replace(record, number))
        LOG.info("task ready", extra={"task": record.name, "version": number, "task_version": record.version})

    async def _drop(self, key: Key | None) -> None:
        if key is not None:
            for replica in self._replicas:
                await replica.drop(key)
