"""Tasks that come and go while a server runs: whole or not at all, and the old version stays if the new one fails."""

import asyncio
import os
from pathlib import Path

import pytest

from prompttune.export.folder import FileRecord, TaskRecord
from prompttune.images.preprocess import Preprocess
from prompttune.serve.batching.replica import DeviceReplica
from prompttune.serve.messages import BadRequestError, NotFoundError, UnavailableError
from prompttune.serve.service.catalogue import Numbers, Scan
from prompttune.serve.service.repository import Repository
from prompttune.serve.workers import Key
from tests.fake_worker import SETTINGS, FakeWorker, image

PREPROCESS = Preprocess(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def record(name, version):
    return TaskRecord(name, Path(name), {}, str(version), ("x", "y"), PREPROCESS, FileRecord(0, ""))


class FakeCatalogue:
    """Tasks on a disk that the test writes."""

    def __init__(self, **versions):
        self.disk = {name: record(name, version) for name, version in versions.items()}
        self.problems = {}

    def scan(self):
        return Scan(dict(self.disk), dict(self.problems))

    def find(self, name):
        return self.disk.get(name)


def scenario(test, replicas=1, **versions):
    """Run ``test(repository, catalogue, replicas, workers)``."""

    async def run():
        workers = [FakeWorker() for _ in range(replicas)]
        made = [DeviceReplica(SETTINGS, lambda _, worker=worker: worker, 3, 0.0, lambda *_: None) for worker in workers]
        catalogue = FakeCatalogue(**versions)
        repository = Repository(catalogue, Numbers(Path(os.devnull)), made)
        for replica in made:
            await replica.start()
        scan = catalogue.scan()
        await repository.begin(scan.records, scan.problems)
        try:
            async with asyncio.timeout(10):
                await test(repository, catalogue, made, workers)
        finally:
            for replica in made:
                await replica.close()

    asyncio.run(run())


def states(repository):
    return {one.name: (one.version, one.state) for one in repository.models.values()}


def test_loads_a_new_task_before_it_answers():
    async def test(repository, catalogue, replicas, workers):
        catalogue.disk["b"] = record("b", 2)
        workers[0].may_load.clear()
        loading = asyncio.create_task(repository.load("b"))
        while not workers[0].loads:
            await asyncio.sleep(0)
        assert states(repository)["b"] == ("", "LOADING")
        with pytest.raises(NotFoundError, match="loading"):
            repository.model("b").current()
        workers[0].may_load.set()
        await loading
        assert states(repository) == {"a": ("1", "READY"), "b": ("2", "READY")}

    scenario(test, a=1)


def test_an_update_answers_with_the_old_version_until_the_new_one_is_resident():
    async def test(repository, catalogue, replicas, workers):
        await replicas[0].hold(Key("a", "1"), Path("a"))
        catalogue.disk["a"] = record("a", 2)
        workers[0].may_load.clear()
        loading = asyncio.create_task(repository.load("a"))
        while len(workers[0].loads) < 2:
            await asyncio.sleep(0)
        assert repository.model("a").current().version == "1"
        outcome = await replicas[0].answer(Key("a", "1"), Path("a"), [image(7)], 0)
        assert list(outcome.logits[0]) == [1, 7]
        workers[0].may_load.set()
        await loading
        assert repository.model("a").current().version == "2"
        assert workers[0].rows == {Key("a", "2")}

    scenario(test, a=1)


def test_the_old_version_stays_when_the_new_one_cannot_be_loaded():
    async def test(repository, catalogue, replicas, workers):
        await replicas[0].hold(Key("a", "1"), Path("a"))
        catalogue.disk["a"] = record("a", 2)
        workers[0].gone.add(Key("a", "2"))
        with pytest.raises(UnavailableError, match="try again"):
            await repository.load("a")
        assert repository.model("a").current().version == "1"

    scenario(test, a=1)


def test_a_damaged_new_version_is_refused_once_and_the_reason_is_kept():
    async def test(repository, catalogue, replicas, workers):
        await replicas[0].hold(Key("a", "1"), Path("a"))
        catalogue.disk["a"] = record("a", 2)
        workers[0].rows |= {Key("x", "1"), Key("y", "1"), Key("z", "1")}
        with pytest.raises(BadRequestError, match="no row is free"):
            await repository.load("a")
        await repository.follow()
        await repository.follow()
        assert workers[0].loads.count(Key("a", "2")) == 2, "the second look must not try the refused version again"
        assert repository.model("a").current().version == "1"
        assert "refused" in repository.model("a").reason
        catalogue.disk["a"] = record("a", 3)
        workers[0].rows -= {Key("x", "1")}
        await repository.follow()
        assert (repository.model("a").current().version, repository.model("a").reason) == ("3", "")

    scenario(test, a=1)


def test_every_device_that_held_the_old_version_gets_the_new_one():
    async def test(repository, catalogue, replicas, workers):
        for replica in replicas:
            await replica.hold(Key("a", "1"), Path("a"))
        catalogue.disk["a"] = record("a", 2)
        await repository.load("a")
        assert [worker.rows for worker in workers] == [{Key("a", "2")}] * 2

    scenario(test, replicas=2, a=1)


def test_an_unloaded_task_stays_out_until_it_is_loaded():
    async def test(repository, catalogue, replicas, workers):
        await replicas[0].hold(Key("a", "1"), Path("a"))
        await repository.unload("a")
        assert workers[0].rows == set()
        await repository.follow()
        with pytest.raises(NotFoundError, match="unloaded"):
            repository.model("a").current()
        await repository.load("a")
        assert repository.model("a").current().version == "1"

    scenario(test, a=1)


def test_unknown_names_are_not_found_and_leave_nothing():
    async def test(repository, catalogue, replicas, workers):
        for call in (repository.load("zzz"), repository.unload("zzz")):
            with pytest.raises(NotFoundError):
                await call
        assert "zzz" not in repository.models

    scenario(test, a=1)


def test_follows_new_changed_and_removed_tasks():
    async def test(repository, catalogue, replicas, workers):
        del catalogue.disk["a"]
        catalogue.disk |= {"b": record("b", 2), "c": record("c", 1)}
        catalogue.problems["d"] = "its record is damaged"
        await repository.follow()
        assert states(repository) == {
            "a": ("", "UNAVAILABLE"),
            "b": ("2", "READY"),
            "c": ("1", "READY"),
            "d": ("", "UNAVAILABLE"),
        }
        assert repository.model("d").reason == "its record is damaged"

    scenario(test, a=1, b=1)


def test_a_version_gone_from_disk_is_followed_at_once():
    async def test(repository, catalogue, replicas, workers):
        catalogue.disk["a"] = record("a", 2)
        await repository.look_again("a")
        assert repository.model("a").current().version == "2"
        del catalogue.disk["a"]
        with pytest.raises(NotFoundError, match="gone"):
            await repository.look_again("a")

    scenario(test, a=1)


def test_changes_of_one_task_do_not_overtake_each_other():
    async def test(repository, catalogue, replicas, workers):
        catalogue.disk["a"] = record("a", 2)
        await asyncio.gather(*(repository.load("a") for _ in range(3)), repository.unload("a"), repository.load("a"))
        assert states(repository)["a"] == ("2", "READY")

    scenario(test, a=1)
