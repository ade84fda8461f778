"""``prompttune serve`` as a process, asked by real clients."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
import urllib.request

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from click.testing import CliRunner
from tritonclient.utils import InferenceServerException

import prompttune as pt
from benchmarks.serve.serving import launched, wait_ready
from prompttune.cli.main import cli
from prompttune.export.folder import EngineFolder
from tests.engines import copied, exported
from tests.serving import noise


@pytest.fixture(scope="module")
def engine():
    return pt.Engine(exported("sa2vp"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return EngineFolder(copied("sa2vp", tmp_path_factory.mktemp("serve") / "engine"))


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "serve.jsonl"
    options = ("--allow-control", "--max-batch", "8", "--watch", "--watch-seconds", "0.1")
    with launched(folder.path, *options, log=log) as running:
        running.log = log
        yield running


def ask(library, client, model, images, **arguments):
    image = library.InferInput("image", list(images.shape), "FP32")
    image.set_data_from_numpy(images)
    return client.infer(model, [image], **arguments)


@pytest.mark.parametrize("library", [triton_grpc, triton_http])
def test_answers_are_the_engines(server, engine, library):
    address = server.grpc if library is triton_grpc else server.http.removeprefix("http://")
    images = noise(20)
    with library.InferenceServerClient(address) as client:
        for task, classes in (("task0", 2), ("task1", 3)):
            answer = ask(library, client, task, images)
            expected = engine.logits(images, task)[:, :classes]
            np.testing.assert_allclose(answer.as_numpy("logits"), expected, atol=1e-5)
            predictions = engine.predict(images, task)
            assert [row[0].decode() for row in answer.as_numpy("label")] == [one.label for one in predictions]
            assert {one.decode() for one in answer.as_numpy("task_version")} == {engine.version(task)}


@pytest.mark.parametrize("library", [triton_grpc, triton_http])
def test_mixed_is_asked_as_tritons_tools_do(server, engine, library):
    """Version, shapes and statistics of the model, from its metadata and configuration alone."""
    address = server.grpc if library is triton_grpc else server.http.removeprefix("http://")
    as_json = {"as_json": True} if library is triton_grpc else {}
    images, names = noise(2), np.array([["task0"], ["task1"]], dtype=object)
    with library.InferenceServerClient(address) as client:
        metadata = client.get_model_metadata("mixed", **as_json)
        [version] = metadata["versions"]
        config = client.get_model_config("mixed", str(int(version)), **as_json)
        config = config.get("config", config)
        [dims] = [one["dims"] for one in config["input"] if one["name"] == "task"]
        assert [int(one) for one in dims] == [1]
        image, task = (
            library.InferInput("image", list(images.shape), "FP32"),
            library.InferInput("task", [2, 1], "BYTES"),
        )
        image.set_data_from_numpy(images)
        task.set_data_from_numpy(names)
        answer = client.infer("mixed", [image, task], model_version=version)
        assert [one.decode() for one in answer.as_numpy("task_version")] == [engine.version(n) for n in names[:, 0]]
        for name, number in (("mixed", version), ("task0", "1")):
            [found] = client.get_inference_statistics(name, number, **as_json)["model_stats"]
            assert (found["version"], int(found["inference_count"]) > 0) == (number, True)
            assert client.is_model_ready(name, number)
        index = client.get_model_repository_index(**as_json)
        versions = {one["name"]: one["version"] for one in (index["models"] if as_json else index)}
        assert (versions["task0"], versions["mixed"]) == ("1", "1")


def test_tasks_come_and_go_while_it_serves(server, folder, engine):
    images = noise(2)
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        client.unload_model("task1")
        with pytest.raises(InferenceServerException, match="unloaded"):
            ask(triton_grpc, client, "task1", images)
        index = {one.name: one.state for one in client.get_model_repository_index().models}
        assert index["task0"] == "READY"
        assert index["task1"] == "UNAVAILABLE"
        client.load_model("task1")
        answer = ask(triton_grpc, client, "task1", images)
        np.testing.assert_allclose(answer.as_numpy("logits"), engine.logits(images, "task1")[:, :3], atol=1e-5)
        folder.write_task("new", folder.read_task("task1"))
        _until(lambda: client.is_model_ready("new"))
        np.testing.assert_allclose(
            ask(triton_grpc, client, "new", images).as_numpy("logits"), answer.as_numpy("logits")
        )
        folder.remove_task("new")
        _until(lambda: not client.is_model_ready("new"))


def _until(done, seconds=20):
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def test_a_killed_worker_is_replaced_and_nobody_hangs(server, engine):
    images, stop = noise(1), threading.Event()
    expected = engine.logits(images, "task0")[:, :2]
    wrong, statuses, answers = [], [], []

    def load():
        with triton_grpc.InferenceServerClient(server.grpc) as client:
            while not stop.is_set():
                try:
                    answer = ask(triton_grpc, client, "task0", images, client_timeout=60)
                except InferenceServerException as problem:
                    statuses.append(problem.status())
                else:
                    answers.append(time.monotonic())
                    if not np.allclose(answer.as_numpy("logits"), expected, atol=1e-5):
                        wrong.append(answer)

    clients = [threading.Thread(target=load) for _ in range(8)]
    for client in clients:
        client.start()
    try:
        _until(lambda: len(answers) > 20)
        [pid] = server.worker_pids()
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        _until(lambda: answers[-1] > killed + 1, 60)
    finally:
        stop.set()
        for client in clients:
            client.join(70)
    assert not any(client.is_alive() for client in clients)
    assert not wrong
    assert set(statuses) <= {"StatusCode.UNAVAILABLE"}
    assert server.worker_pids() != [pid]
    assert server.status()["workers"][0]["restarts"] == 1
    wait_ready(server)


def test_the_log_is_json_and_says_what_happened(server):
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert any("worker ended" in line["message"] for line in lines)


def test_sigterm_answers_what_is_inside_and_leaves_with_zero(engine):
    images = noise(1)
    with launched(exported("sa2vp"), "--max-delay-ms", "3000", "--max-batch", "64") as running:
        found = []

        def load():
            with triton_grpc.InferenceServerClient(running.grpc) as client:
                found.append(ask(triton_grpc, client, "task0", images).as_numpy("logits"))

        inside = threading.Thread(target=load)
        inside.start()
        _until(lambda: running.status()["load"]["queued_rows"] == 1)
        workers = running.worker_pids()
        running.process.send_signal(signal.SIGTERM)
        inside.join(120)
        assert running.process.wait(120) == 0
    np.testing.assert_allclose(found[0], engine.logits(images, "task0")[:, :2], atol=1e-5)
    assert not any(_alive(pid) for pid in workers)


def _alive(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_not_ready_while_it_drains():
    with launched(exported("sa2vp"), "--max-delay-ms", "3000", "--max-batch", "64", "--no-grpc") as running:
        found = []

        def load():
            with triton_http.InferenceServerClient(running.http.removeprefix("http://")) as client:
                found.append(ask(triton_http, client, "task0", noise(1)).as_numpy("logits"))

        inside = threading.Thread(target=load)
        inside.start()
        _until(lambda: running.status()["load"]["queued_rows"] == 1)
        running.process.send_signal(signal.SIGTERM)
        _until(lambda: not _ready(running))
        inside.join(120)
        assert found[0].shape == (1, 2)
        assert running.process.wait(120) == 0


def _ready(running):
    with contextlib.suppress(OSError):
        urllib.request.urlopen(running.http + "/v2/health/ready", timeout=60).close()
        return True
    return False


@pytest.mark.parametrize(
    ("options", "said", "code"),
    [
        (["nowhere"], "engine", 1),
        (["ENGINE", "--device", "tpu"], "unknown device", 2),
        (["ENGINE", "--tls-key", "key.pem"], "go together", 2),
        (["ENGINE", "--token-file", "nowhere"], "token file", 2),
        (["ENGINE", "--watch", "nowhere"], "does not exist", 1),
        (["ENGINE", "--host-memory", "lots"], "not a size", 2),
        (["ENGINE", "--max-batch", "0"], "max-batch", 2),
        (["ENGINE", "--http-port", "TAKEN"], "cannot listen", 1),
        (["ENGINE", "--http-port", "0", "--grpc-port", "TAKEN"], "cannot listen", 1),
    ],
)
def test_bad_input_is_one_line(options, said, code):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        values = {"ENGINE": str(exported("sa2vp")), "TAKEN": str(taken.getsockname()[1])}
        result = CliRunner().invoke(cli, ["serve", *(values.get(one, one) for one in options)])
    assert result.exit_code == code, result.output
    assert said in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output


def test_sizes_are_read_as_people_write_them():
    from prompttune.serve.limits import read_size

    assert [read_size(text) for text in ("1024", "512MiB", "4GB", "1.5 GiB", "2k".upper() + "B")] == [
        1024,
        512 * 2**20,
        4 * 10**9,
        3 * 2**29,
        2000,
    ]
