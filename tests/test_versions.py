"""Versions of tasks are numbers that count up, wherever and however a task is replaced."""

import asyncio
import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import prompttune as pt
from prompttune.errors import EngineError
from prompttune.export.folder import EngineFolder
from prompttune.export.versions import carry_over, read_number
from prompttune.serve.messages import InferRequest, InputTensor, NotFoundError, bytes_array
from prompttune.serve.service.catalogue import Numbers
from prompttune.serve.service.models import READY
from prompttune.serve.service.service import ServiceSettings
from tests.engines import copied, exported
from tests.serving import noise, outputs, request, running, within


@pytest.fixture
def folder(tmp_path):
    return EngineFolder(copied("sa2vp", tmp_path))


@contextlib.asynccontextmanager
async def asked(folder, name="task0"):
    """A server, and a way to ask it for a version's number and digest."""
    async with running(folder.path) as service:

        async def ask(version=""):
            inputs = request(name, noise(1)).inputs
            answer = await service.infer(InferRequest(name, inputs, version=version))
            assert {one.decode() for one in outputs(answer)["task_version"]} == {answer.parameters["task_version"]}
            return int(answer.version), answer.parameters["task_version"]

        yield service, ask


def numbers_of(folder, *changes, name="task0"):
    """What a server says after each change: the number, the same in the index, the metadata and the statistics."""
    found = []

    async def test():
        async with asked(folder, name) as (service, ask):
            for change in changes:
                change()
                with contextlib.suppress(NotFoundError):
                    await service.load(name)
                number, digest = await ask()
                assert await ask(str(number)) == await ask(digest) == (number, digest)
                assert service.model_ready(name, str(number))
                assert service.model_ready(name, digest)
                [entry] = [one for one in service.index() if one.name == name]
                versions = service.model_metadata(name, str(number)).versions
                [statistics] = service.statistics(name, str(number))
                assert [entry.version] == list(versions) == [statistics.version] == [str(number)]
                for other in (number - 1, number + 1, f"0{number}", f"{number}.0", "latest"):
                    assert not service.model_ready(name, str(other))
                    with pytest.raises(NotFoundError, match=f"has the version {number}"):
                        await ask(str(other))
                found.append(number)

    within(60, test())
    return found


def write(folder, source, name="task0"):
    task = folder.read_task(source)
    return lambda: folder.write_task(name, task, replace=True)


def copy(folder, source, name="task0"):
    """A task that somebody copies over another, without telling prompttune."""
    files = {one.name: one.read_bytes() for one in (folder.path / "tasks" / source).iterdir()}

    def change():
        for file, content in files.items():
            (folder.path / "tasks" / name / file).write_bytes(content)

    return change


def nothing():
    pass


@pytest.mark.parametrize("replaced", [write, copy])
def test_a_replaced_task_gets_the_next_number_and_keeps_it(folder, replaced):
    old, new = replaced(folder, "task0"), replaced(folder, "task1")
    assert numbers_of(folder, nothing, new, nothing, old, new) == [1, 2, 2, 3, 4]
    assert numbers_of(folder, nothing, new, old) == [4, 4, 5]


def test_numbers_count_while_no_server_runs_and_outlive_the_task(folder):
    old, new = write(folder, "task0"), write(folder, "task1")
    old()
    assert numbers_of(folder, nothing) == [1]
    new()
    old()
    folder.remove_task("task0")
    new()
    assert numbers_of(folder, nothing, nothing) == [4, 4]
    folder.remove_task("task0")
    new()
    assert numbers_of(folder, nothing) == [4], "the same content is the same version"


def test_a_read_only_engine_counts_in_memory(folder, monkeypatch):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("prompttune.serve.service.catalogue.write_number", refuse)
    new = copy(folder, "task1")
    assert numbers_of(folder, nothing, new) == [1, 2]
    assert numbers_of(folder, nothing) == [1]
    assert not (folder.path / "versions").exists()


DAMAGED = ("", "[]", "{}", *(f'{{"number": {number}, "version": "x"}}' for number in ("0", "true", '"2"', 2**63)))


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_number_is_named_and_does_not_stop_a_server(folder, content, caplog):
    new = write(folder, "task1")
    path = folder.path / "versions" / "task0.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    assert numbers_of(folder, nothing) == [1]
    assert str(path) in caplog.text
    with pytest.raises(EngineError, match=r"task0\.json"):
        new()


def test_a_number_survives_a_copy_of_the_engine(folder, tmp_path):
    write(folder, "task1")()
    assert json.loads((folder.path / "versions/task0.json").read_text())["number"] == 2
    other = EngineFolder(shutil.copytree(folder.path, tmp_path / "other"))
    assert numbers_of(other, nothing) == [2]


def test_an_export_in_the_place_of_an_engine_goes_on_counting(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    engine = EngineFolder(Path(shutil.copytree(exported("sa2vp"), old)))
    write(engine, "task1")()
    engine.write_task("gone", engine.read_task("task0"))
    new.mkdir()
    replaced, kept = engine.read_task("task0").version, engine.read_task("task1").version
    carry_over(old, new, {"task0": (replaced, "other"), "task1": (kept, kept), "gone": ("x", "x"), "fresh": ("", "y")})
    numbers = {name: read_number(new, name).number for name in ("task0", "task1", "gone", "fresh")}
    assert numbers == {"task0": 3, "task1": 1, "gone": 2, "fresh": 0}


def test_a_name_that_is_too_long_for_the_file_is_served(tmp_path):
    assert Numbers(tmp_path).number("x" * 255, "one") == 1
    assert Numbers(tmp_path).number("x" * 255, "two") == 1


def test_a_watched_task_counts_too(folder, tmp_path):
    watched = tmp_path / "watched"
    shutil.copytree(folder.path / "tasks/task0", watched / "more")

    async def test():
        settings = ServiceSettings(watch_interval_s=0.01)
        async with running(folder.path, settings, watch=[watched]) as service:
            assert service.model_ready("more", "1")
            for file in (folder.path / "tasks/task1").iterdir():
                shutil.copy(file, watched / "more" / file.name)
            while not service.model_ready("more", "2"):
                await asyncio.sleep(0.01)

    within(60, test())


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_mixed_is_a_model_as_tools_know_them(shape):
    names = ["task0", "task1", "task0"]
    engine = pt.Engine(exported("sa2vp"))

    async def test():
        async with running(exported("sa2vp")) as service:
            metadata = service.model_metadata("mixed", "1")
            assert list(metadata.versions) == ["1"]
            assert {one.name: tuple(one.shape) for one in metadata.inputs}["task"] == (-1, 1)
            assert [(one.version, one.state) for one in service.index(ready=True) if one.name == "mixed"] == [
                ("1", READY)
            ]
            inputs = [InputTensor("image", "FP32", noise(3)), InputTensor("task", "BYTES", bytes_array(names, shape))]
            answer = await service.infer(InferRequest("mixed", inputs, version="1"))
            assert answer.version == "1"
            assert [one.decode() for one in outputs(answer)["task"]] == names
            np.testing.assert_allclose(outputs(answer)["logits"][1], engine.logits(noise(3), "task1")[1, :3], atol=1e-5)
            [one] = service.statistics("mixed", "1")
            stages = one.inference_stats
            assert (one.version, stages.success.count, stages.fail.count, one.inference_count) == ("1", 1, 0, 3)
            assert (stages.queue.count, stages.compute_input.count, stages.compute_output.count) == (1, 1, 1)
            assert stages.compute_infer.ns > 0
            assert one.batch_stats
            assert "mixed" in [one.name for one in service.statistics()]
            for call in (service.model_metadata, service.statistics):
                with pytest.raises(NotFoundError, match="version 1"):
                    call("mixed", "2")
            with pytest.raises(NotFoundError, match="version 1"):
                await service.infer(InferRequest("mixed", inputs, version="2"))
            assert not service.model_ready("mixed", "2")
            wrong = InputTensor("task", "BYTES", bytes_array(names, (1, 3)))
            with pytest.raises(Exception, match="task"):
                await service.infer(InferRequest("mixed", [inputs[0], wrong]))

    within(60, test())
