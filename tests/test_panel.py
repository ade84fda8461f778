"""The model ``panel``: one image, several tasks, through the service and through both transports."""

import asyncio
import io
import json
import os
import urllib.error
import urllib.request

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
import tritonclient.utils.shared_memory as shm
from PIL import Image
from tritonclient.utils import InferenceServerException

import prompttune as pt
from benchmarks.serve.serving import launched
from prompttune.export.folder import EngineFolder
from prompttune.serve.messages import (
    BadRequestError,
    InferRequest,
    InputTensor,
    NotFoundError,
    RequestedOutput,
    TooLargeError,
    bytes_array,
)
from prompttune.serve.service.assembly import READERS, most_answers
from prompttune.serve.service.service import ServiceSettings
from tests.engines import copied, exported
from tests.serving import noise, outputs, running, within

TASKS = ["task0", "task1"]
ALL = [RequestedOutput(name) for name in ("logits", "probabilities", "label", "score", "task", "task_version")]


@pytest.fixture(scope="module")
def engine():
    return pt.Engine(exported("linear"))


def panel(images, names=None, wanted=(), shape=None, **parameters):
    datatype = {"float32": "FP32", "uint8": "UINT8"}.get(str(images.dtype), "BYTES")
    inputs = [InputTensor("image", datatype, images)]
    if names is not None:
        inputs.append(InputTensor("tasks", "BYTES", bytes_array(names, shape)))
    return InferRequest("panel", inputs, outputs=wanted, parameters=parameters)


def photograph(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (80, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def texts(tensor):
    return np.vectorize(bytes.decode, otypes=[object])(tensor).tolist()


# -------------------------------------------------------------------------------------------------------- the service


def test_all_tasks_answer_as_the_engine_does_in_one_batch(engine):
    async def test():
        async with running(exported("linear")) as service:
            images = noise(3)
            response = await service.infer(panel(images, wanted=ALL, top_k=2))
            found, expected = outputs(response), engine.logits(images, [TASKS])
            real = np.isfinite(expected)
            np.testing.assert_allclose(found["logits"][real], expected[real], atol=1e-5)
            assert (found["logits"][~real] == np.finfo(np.float32).min).all()
            assert found["label"].shape == found["score"].shape == (3, 2, 2)
            predicted = engine.predict(images, [TASKS])
            assert [[row[0] for row in image] for image in texts(found["label"])] == [
                [one.label for one in image] for image in predicted
            ]
            assert texts(found["task"]) == [TASKS] * 3
            assert texts(found["task_version"]) == [[engine.version(task) for task in TASKS]] * 3
            assert (response.model, response.version) == ("panel", "1")
            assert response.parameters["infer_ms"] > 0
            for name in TASKS:
                assert [one.batch_size for one in service.statistics(name)[0].batch_stats] == [3]
            [counted] = service.statistics("panel")
            assert (counted.inference_count, counted.execution_count) == (6, 1)
            metrics = service.metrics().decode()
            assert "prompttune_batch_answers_total 6.0" in metrics
            assert "prompttune_batch_padding_total 0.0" in metrics
            assert 'prompttune_rows_total{task="task1"} 3.0' in metrics

    within(60, test())


def test_named_tasks_for_all_images_and_for_each(engine):
    async def test():
        async with running(exported("linear")) as service:
            images = noise(2)
            for names, shape, rows in (
                (["task1"], (1,), [["task1"]] * 2),
                (["task1", "task0"], (2, 1), [["task1"], ["task0"]]),
                (["task1", "task0", "task0", "task1"], (2, 2), [["task1", "task0"], ["task0", "task1"]]),
                ([], (0,), [TASKS] * 2),
                ([], (2, 0), [TASKS] * 2),
            ):
                found = outputs(await service.infer(panel(images, names, shape=shape)))
                assert texts(found["task"]) == rows
                assert sorted(found) == ["label", "score", "task", "task_version"]
                expected = [[one.probability for one in image] for image in engine.predict(images, rows)]
                np.testing.assert_allclose(found["score"][..., 0], expected, atol=1e-5)

    within(60, test())


def test_files_are_decoded_once_and_several_requests_share_a_batch(engine, monkeypatch):
    async def test():
        file = photograph(0)
        async with running(exported("linear"), max_delay_s=5.0, max_batch=2) as service:
            decoded = []
            prepare = service._decoder._prepare
            monkeypatch.setattr(service._decoder, "_prepare", lambda *one: decoded.append(1) or prepare(*one))
            single = InferRequest("task0", [InputTensor("image", "BYTES", bytes_array([file]))])
            async with asyncio.timeout(4):  # the batch is full with the second image
                waiting = asyncio.gather(service.infer(panel(bytes_array([file]))), service.infer(single))
                while service._replicas[0].queued_rows < 3:  # whichever is decoded first
                    await asyncio.sleep(0.01)
                await service.infer(panel(bytes_array([photograph(1)])))
                first, other = await waiting
            assert len(decoded) == 3
            np.testing.assert_array_equal(outputs(first)["score"][0, 0, :2], outputs(other)["score"][0])
            assert [one.batch_size for one in service.statistics("task1")[0].batch_stats] == [2]

    within(60, test())


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        (panel(noise(1), ["task0", "nope"]), NotFoundError, "'nope' does not exist"),
        (
            panel(noise(2), ["task0"] * 3, shape=(3, 1)),
            BadRequestError,
            r"tasks must be \[K\] or \[2, K\], not \[3, 1\]",
        ),
        (panel(noise(1), ["task0"], shape=(1, 1, 1)), BadRequestError, "tasks must be"),
        (panel(noise(1), [b"\xff"]), BadRequestError, "not UTF-8"),
        (InferRequest("panel", []), BadRequestError, "input image is missing; model 'panel' takes image and tasks"),
        (panel(noise(5)), TooLargeError, "10 answers in one request, the limit is 8"),
        (panel(noise(1), wanted=[RequestedOutput("nope")]), BadRequestError, "unknown output"),
        (
            InferRequest("panel", panel(noise(1)).inputs, version="2"),
            NotFoundError,
            "the model 'panel' has the version 1",
        ),
        (InferRequest("task0", panel(noise(1), ["task0"]).inputs), BadRequestError, "unknown input 'tasks'"),
        (panel(np.full_like(noise(1), 3e38)), BadRequestError, "out of range"),
    ],
)
def test_bad_requests_have_their_own_errors(wrong, error, said):
    async def test():
        async with running(exported("linear"), ServiceSettings(max_queue=8)) as service:
            with pytest.raises(error, match=said):
                await service.infer(wrong)
            await service.infer(panel(noise(1)))
            assert service.status()["load"]["queued_rows"] == 0

    within(60, test())


def test_an_unloaded_task_is_left_out_of_all_and_refused_by_name():
    async def test():
        async with running(exported("linear")) as service:
            await service.unload("task0")
            assert texts(outputs(await service.infer(panel(noise(1))))["task"]) == [["task1"]]
            with pytest.raises(NotFoundError, match="'task0' is not available: unloaded"):
                await service.infer(panel(noise(1), TASKS))

    within(60, test())


def test_more_tasks_than_rows_are_all_answered(engine):
    async def test():
        async with running(exported("linear"), resident_tasks=1) as service:
            found = outputs(await service.infer(panel(noise(2))))
            expected = [[one.probability for one in image] for image in engine.predict(noise(2), [TASKS])]
            np.testing.assert_allclose(found["score"][..., 0], expected, atol=1e-5)

    within(60, test())


def test_a_method_that_shares_nothing_answers_as_well():
    engine = pt.Engine(exported("sa2vp"))

    async def test():
        async with running(exported("sa2vp")) as service:
            found = outputs(await service.infer(panel(noise(2))))
            expected = [[one.probability for one in image] for image in engine.predict(noise(2), [TASKS])]
            np.testing.assert_allclose(found["score"][..., 0], expected, atol=1e-5)
            assert "prompttune_batch_padding_total 0.0" in service.metrics().decode()

    within(60, test())


def test_answers_of_a_batch_follow_what_the_method_shares():
    manifest = EngineFolder(exported("linear")).manifest
    assert most_answers(manifest, 4) == 4 * READERS
    tuned = EngineFolder(exported("sa2vp")).manifest
    assert most_answers(tuned, 4) == 0
    tuned.method["graph_settings"]["first_block"] = 1
    assert most_answers(tuned, 4) == 4


def test_a_task_named_as_the_model_is_refused(tmp_path):
    async def test():
        folder = EngineFolder(copied("linear", tmp_path / "engine"))
        folder.write_task("panel", folder.read_task("task0"))
        async with running(folder.path) as service:
            entry = next(one for one in service.index() if one.name == "panel" and one.reason)
            assert "cannot be served as 'panel'" in entry.reason
            await service.infer(panel(noise(1)))

    within(60, test())


# ----------------------------------------------------------------------------------------------------- the transports


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "serve.jsonl"
    tokens = log.with_name("tokens")
    tokens.write_text("secret\n")
    with launched(exported("linear"), "--allow-shared-memory", "--token-file", str(tokens), log=log) as running:
        yield running


HEADERS = {"authorization": "Bearer secret"}
"""Triton's HTTP client adds to what it is given: give it a copy."""


def client_of(library, server):
    return library.InferenceServerClient(server.grpc if library is triton_grpc else server.http.removeprefix("http://"))


def image_input(library, images):
    tensor = library.InferInput("image", list(images.shape), "FP32" if images.dtype == np.float32 else "BYTES")
    tensor.set_data_from_numpy(images)
    return tensor


def names_input(library, names, shape, **how):
    tensor = library.InferInput("tasks", shape, "BYTES")
    tensor.set_data_from_numpy(np.array(names, dtype=object).reshape(shape), **how)
    return tensor


@pytest.mark.parametrize("library", [triton_http, triton_grpc], ids=["http", "grpc"])
def test_clients_ask_files_and_tensors(server, engine, library):
    with client_of(library, server) as client:
        files = np.array([photograph(0), photograph(1)], dtype=object)
        answer = client.infer("panel", [image_input(library, files)], headers=dict(HEADERS), parameters={"top_k": 1})
        predicted = engine.predict(list(files), [TASKS])
        assert texts(answer.as_numpy("label")[..., 0]) == [[one.label for one in row] for row in predicted]
        images, names = noise(2), names_input(library, ["task1", "task0"], [2])
        answer = client.infer(
            "panel", [image_input(library, images), names], headers=dict(HEADERS),
            outputs=[library.InferRequestedOutput("logits"), library.InferRequestedOutput("task")],
        )  # fmt: skip
        expected = engine.logits(images, [["task1", "task0"]])
        real = np.isfinite(expected)
        np.testing.assert_allclose(answer.as_numpy("logits")[real], expected[real], atol=1e-5)
        assert texts(answer.as_numpy("task")) == [["task1", "task0"]] * 2
        with pytest.raises(InferenceServerException, match="'nope' does not exist"):
            client.infer(
                "panel", [image_input(library, images), names_input(library, ["nope"], [1])], headers=dict(HEADERS)
            )
        with pytest.raises(InferenceServerException, match="token"):
            client.infer("panel", [image_input(library, images)])


@pytest.mark.parametrize("library", [triton_http, triton_grpc], ids=["http", "grpc"])
def test_tensors_in_shared_memory(server, engine, library):
    images, key = noise(1), f"/prompttune-panel-{os.getpid()}"
    region = shm.create_shared_memory_region("panel", key, images.nbytes + 64)
    try:
        shm.set_shared_memory_region(region, [images])
        with client_of(library, server) as client:
            client.register_system_shared_memory("panel", key, images.nbytes + 64, headers=dict(HEADERS))
            image = library.InferInput("image", list(images.shape), "FP32")
            image.set_shared_memory("panel", images.nbytes)
            wanted = library.InferRequestedOutput("score")
            wanted.set_shared_memory("panel", 64, offset=images.nbytes)
            client.infer("panel", [image], outputs=[wanted], headers=dict(HEADERS), parameters={"top_k": 1})
            found = shm.get_contents_as_numpy(region, np.float32, [1, 2, 1], images.nbytes)
            expected = [[one.probability for one in row] for row in engine.predict(images, [TASKS])]
            np.testing.assert_allclose(found[..., 0], expected, atol=1e-5)
            client.unregister_system_shared_memory("panel", headers=dict(HEADERS))
    finally:
        shm.destroy_shared_memory_region(region)


def posted(server, body, path="v2/models/panel/infer"):
    request = urllib.request.Request(f"{server.http}/{path}", json.dumps(body).encode(), HEADERS)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as problem:
        return problem.code, json.load(problem)


def test_json(server, engine):
    image = {"name": "image", "datatype": "FP32", "shape": [1, 3, 64, 64], "data": noise(1).ravel().tolist()}
    status, answer = posted(server, {"inputs": [image], "parameters": {"top_k": 1}})
    shapes = {one["name"]: (one["shape"], one["data"]) for one in answer["outputs"]}
    assert (status, shapes["task"]) == (200, ([1, 2], TASKS))
    assert shapes["label"] == ([1, 2, 1], [one.label for one in engine.predict(noise(1), [TASKS])[0]])
    assert {"decode_ms", "queue_ms", "infer_ms"} == set(answer["parameters"])
    named = {"name": "tasks", "datatype": "BYTES", "shape": [1], "data": ["other"]}
    status, answer = posted(server, {"inputs": [image, named]})
    assert (status, list(answer)) == (404, ["error"])
    assert "'other' does not exist" in answer["error"]


def test_metadata_says_what_it_takes(server):
    with client_of(triton_grpc, server) as client:
        found = client.get_model_metadata("panel", headers=dict(HEADERS), as_json=True)
        assert {one["name"]: (one["datatype"], one["shape"]) for one in found["inputs"]} == {
            "image": ("FP32", ["-1", "3", "64", "64"]),
            "tasks": ("BYTES", ["-1", "-1"]),
        }
        shapes = {one["name"]: one["shape"] for one in found["outputs"]}
        assert (shapes["label"], shapes["task"]) == (["-1", "-1", "-1"], ["-1", "-1"])
        assert client.is_model_ready("panel", headers=dict(HEADERS))
        config = client.get_model_config("panel", headers=dict(HEADERS), as_json=True)["config"]
        assert [one["dims"] for one in config["input"]] == [["3", "64", "64"], ["-1"]]
        assert "left out for all tasks" in config["parameters"]["tasks.BYTES"]["string_value"]
        index = client.get_model_repository_index(headers=dict(HEADERS), as_json=True)["models"]
        assert [one["name"] for one in index] == [*TASKS, "mixed", "panel"]
