"""The server without a transport, over a real engine: the same answers, whatever happens meanwhile."""

import asyncio
import dataclasses
import shutil

import numpy as np
import pytest

import prompttune as pt
from prompttune.export.folder import EngineFolder
from prompttune.serve.batching.admission import Admission
from prompttune.serve.messages import (
    BadRequestError,
    DeadlineError,
    InferRequest,
    NotFoundError,
    RequestedOutput,
    UnavailableError,
)
from prompttune.serve.service.metrics import percentiles_ms
from prompttune.serve.service.service import ServiceSettings
from tests.engines import copied, exported
from tests.serving import noise, outputs, pause, request, running, within


@pytest.fixture(scope="module")
def engine():
    return pt.Engine(exported("sa2vp"))


def digest(response):
    return response.parameters["task_version"]


def test_one_task_answers_as_the_engine_does(engine):
    async def test():
        async with running(exported("sa2vp")) as service:
            images = noise(6)
            response = await service.infer(request("task1", images))
            found = outputs(response)
            np.testing.assert_allclose(found["logits"], engine.logits(images, "task1")[:, :3], atol=1e-5)
            expected = engine.predict(images, "task1")
            assert [row[0].decode() for row in found["label"]] == [one.label for one in expected]
            np.testing.assert_allclose(found["score"][:, 0], [one.probability for one in expected], atol=1e-5)
            assert (response.version, digest(response)) == ("1", engine.version("task1"))

    within(60, test())


def test_mixed_rows_name_their_tasks(engine):
    async def test():
        async with running(exported("sa2vp")) as service:
            images, tasks = noise(5), ["task0", "task1", "task1", "task0", "task1"]
            found = outputs(await service.infer(request("mixed", images, tasks)))
            expected = engine.logits(images, tasks)
            real = np.isfinite(expected)
            np.testing.assert_allclose(found["logits"][real], expected[real], atol=1e-5)
            assert (found["logits"][~real] == np.finfo(np.float32).min).all()
            assert [name.decode() for name in found["task"]] == tasks
            assert [one.decode() for one in found["task_version"]] == [engine.version(task) for task in tasks]

    within(60, test())


def test_requests_for_different_tasks_share_a_batch():
    async def test():
        async with running(exported("sa2vp"), max_delay_s=5.0) as service:
            answers = [service.infer(request(task, noise(2))) for task in ("task0", "task1")]
            async with asyncio.timeout(4):  # a full batch, made of both
                await asyncio.gather(*answers)
            batches = [service.statistics(name)[0].batch_stats for name in ("task0", "task1")]
            assert [[one.batch_size for one in sizes] for sizes in batches] == [[4], [4]]

    within(60, test())


def test_more_tasks_than_rows_are_all_answered(engine):
    async def test():
        async with running(exported("sa2vp"), resident_tasks=1) as service:
            images, tasks = noise(6), ["task0", "task1"] * 3
            found = outputs(await service.infer(request("mixed", images, tasks)))
            real = np.isfinite(expected := engine.logits(images, tasks))
            np.testing.assert_allclose(found["logits"][real], expected[real], atol=1e-5)

    within(60, test())


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (InferRequest("nope", request("nope", noise(1)).inputs), NotFoundError),
        (InferRequest("task0", request("task0", noise(1)).inputs, version="123"), NotFoundError),
        (request("mixed", noise(1), ["../task0"]), NotFoundError),
        (InferRequest("task0", []), BadRequestError),
        (InferRequest("task0", request("x", noise(1)).inputs, outputs=[RequestedOutput("nope")]), BadRequestError),
        (request("task0", noise(1)[:, :2]), BadRequestError),
    ],
)
def test_bad_requests_have_their_own_errors(wrong, error):
    async def test():
        async with running(exported("sa2vp")) as service:
            with pytest.raises(error):
                await service.infer(wrong)
            await service.infer(request("task0", noise(1)))

    within(60, test())


def test_a_full_queue_says_when_to_come_again():
    async def test():
        settings = ServiceSettings(max_queue=4)
        async with running(exported("sa2vp"), settings, max_delay_s=0.2, max_batch=16) as service:
            waiting = asyncio.create_task(service.infer(request("task0", noise(2))))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            with pytest.raises(UnavailableError, match="share") as problem:
                await service.infer(request("task0", noise(1)))
            assert problem.value.retry_after_s > 0
            other = asyncio.create_task(service.infer(request("task1", noise(2))))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            with pytest.raises(UnavailableError, match="full"):
                await service.infer(request("task1", noise(1)))
            await asyncio.gather(waiting, other)
            await service.infer(request("task0", noise(2)))

    within(60, test())


def test_a_server_that_has_answered_nothing_yet_does_not_send_clients_away_for_minutes():
    admission = Admission(1000, lambda: 0.0)
    with (
        admission.inside(["task0"] * 500),
        pytest.raises(UnavailableError) as problem,
        admission.inside(["task1"] * 501),
    ):
        pass
    assert problem.value.retry_after_s == 30


def test_a_request_out_of_time_leaves_the_queue():
    async def test():
        async with running(exported("sa2vp"), max_delay_s=30.0, max_batch=16) as service:
            with pytest.raises(DeadlineError):
                await service.infer(request("task0", noise(1), timeout=20_000))
            status = service.status()["load"]
            assert status["queued_rows"] == status["running_rows"] == 0

    within(60, test())


def test_a_cancelled_request_leaves_the_queue():
    async def test():
        async with running(exported("sa2vp"), max_delay_s=30.0, max_batch=16) as service:
            gone = asyncio.create_task(service.infer(request("task0", noise(1))))
            while not service.status()["load"]["queued_rows"]:
                await asyncio.sleep(0)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            assert service.status()["load"]["queued_rows"] == 0

    within(60, test())


def test_an_update_is_whole_and_answers_name_their_version(engine, tmp_path):
    async def test():
        folder = EngineFolder(copied("sa2vp", tmp_path / "engine"))
        old, new = folder.read_task("task0"), folder.read_task("task1")
        images = noise(3)
        by_version = {
            old.version: engine.logits(images, "task0")[:, :2],
            new.version: engine.logits(images, "task1")[:, :3],
        }
        async with running(folder.path) as service:
            seen, going = set(), True

            async def ask():
                while going:
                    response = await service.infer(request("task0", images))
                    np.testing.assert_allclose(outputs(response)["logits"], by_version[digest(response)], atol=1e-5)
                    seen.add((int(response.version), digest(response)))

            asking = [asyncio.create_task(ask()) for _ in range(4)]
            for task in (new, old, new):
                await asyncio.to_thread(folder.write_task, "task0", task, True)
                await service.load("task0")
                await service.infer(request("task0", images))
            going = False
            await asyncio.gather(*asking)
            assert {one for _, one in seen} == set(by_version)
            assert len(seen) == len({number for number, _ in seen}), "a number stands for one digest"

    within(60, test())


def test_a_version_that_is_gone_from_disk_and_rows_is_followed(engine, tmp_path):
    async def test():
        folder = EngineFolder(copied("sa2vp", tmp_path / "engine"))
        async with running(folder.path, resident_tasks=1, host_bytes=0) as service:
            folder.write_task("task1", folder.read_task("task0"), replace=True)
            response = await service.infer(request("task1", noise(2)))
            assert (response.version, digest(response)) == ("2", engine.version("task0"))

    within(60, test())


def test_watching_follows_the_folder(tmp_path):
    async def test():
        folder = EngineFolder(copied("sa2vp", tmp_path / "engine"))
        watched = tmp_path / "watched"
        watched.mkdir()
        settings = ServiceSettings(watch_interval_s=0.01)
        async with running(folder.path, settings, watch=[watched]) as service:
            shutil.copytree(folder.path / "tasks/task1", watched / "new")
            while not service.model_ready("new"):
                await asyncio.sleep(0.01)
            await service.infer(request("new", noise(1)))
            shutil.rmtree(watched / "new")
            while service.model_ready("new"):
                await asyncio.sleep(0.01)
            with pytest.raises(NotFoundError):
                await service.infer(request("new", noise(1)))

    within(60, test())


def test_draining_answers_what_is_inside_and_nothing_else():
    async def test():
        async with running(exported("sa2vp"), max_delay_s=0.2, max_batch=16) as service:
            inside = asyncio.create_task(service.infer(request("task0", noise(1))))
            while not service.status()["load"]["queued_rows"]:
                await asyncio.sleep(0)
            draining = asyncio.create_task(service.drain(10))
            await asyncio.sleep(0)
            assert not service.ready()
            with pytest.raises(UnavailableError, match="shutting down"):
                await service.infer(request("task0", noise(1)))
            assert await draining
            assert inside.done()
            await inside

    within(60, test())


def test_percentiles_are_nearest_ranks():
    assert percentiles_ms([4, 1, 3, 2], (50, 75, 76)) == {"p50_ms": 2000, "p75_ms": 3000, "p76_ms": 4000}
    assert percentiles_ms([]) == {"p50_ms": None, "p95_ms": None}


def test_statistics_and_metrics_count(engine):
    async def test():
        async with running(exported("sa2vp")) as service:
            await service.infer(request("task0", noise(3)))
            with pytest.raises(BadRequestError):
                await service.infer(request("task0", noise(1)[:, :2]))
            [one] = service.statistics("task0")
            stages = one.inference_stats
            assert (one.inference_count, one.execution_count, stages.success.count, stages.fail.count) == (3, 1, 1, 1)
            assert stages.compute_infer.ns > 0
            text = service.metrics().decode()
            assert 'prompttune_rows_total{task="task0"} 3.0' in text
            assert 'prompttune_resident_tasks{device="cpu"} 2.0' in text
            [row] = [row for row in service.task_status() if row["name"] == "task0"]
            assert (row["requests"], row["errors"], row["resident"], row["num_classes"]) == (2, 1, True, 2)

    within(60, test())


def test_metadata_tells_labels_and_preprocessing(engine):
    async def test():
        async with running(exported("sa2vp")) as service:
            metadata = service.model_metadata("task1")
            assert list(metadata.labels) == engine.labels("task1")
            assert list(metadata.versions) == ["1"]
            assert metadata == service.model_metadata("task1", "1")
            assert metadata == service.model_metadata("task1", metadata.parameters["task_version"])
            assert metadata.parameters["task_version"] == engine.version("task1")
            assert [one.name for one in service.model_metadata("mixed").inputs] == ["image", "task"]
            with pytest.raises(NotFoundError):
                service.model_metadata("task1", "other")

    within(60, test())


def test_a_task_that_overflows_does_not_fail_its_neighbours(engine, tmp_path):
    async def test():
        folder = EngineFolder(copied("sa2vp", tmp_path / "engine"))
        task = folder.read_task("task0")
        state = {
            key: np.full_like(value, np.nan) if key == "head.weight" else value for key, value in task.state.items()
        }
        folder.write_task("broken", dataclasses.replace(task, state=state))
        async with running(folder.path, max_delay_s=5.0, max_batch=2) as service:
            broken = asyncio.create_task(service.infer(request("broken", noise(1))))
            good = asyncio.create_task(service.infer(request("task1", noise(1))))
            await asyncio.wait([broken, good])
            assert broken.exception() is not None
            assert np.isfinite(outputs(good.result())["logits"]).all()

    within(60, test())


def test_a_worker_that_hangs_is_started_again(engine):
    async def test():
        async with running(exported("sa2vp"), in_process=False, stall_s=0.5) as service:
            [replica] = service._replicas
            pause(replica._running.worker.process_id)
            with pytest.raises(UnavailableError, match="try again"):
                await service.infer(request("task0", noise(2)))
            found = outputs(await service.infer(request("task0", noise(2))))
            np.testing.assert_allclose(found["logits"], engine.logits(noise(2), "task0")[:, :2], atol=1e-5)
            assert replica.restarts == 1

    within(60, test())
