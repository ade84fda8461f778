"""Ray Serve: requests that see a replica die are asked again, and a task stays with the replica that holds it."""

import asyncio
import contextlib
import importlib
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time

import numpy as np
import pytest

import prompttune as pt
from prompttune.errors import MissingExtraError, UsageError
from prompttune.serve.service.assembly import EngineSettings
from tests.engines import exported
from tests.serving import noise

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'prompttune[ray]'")
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from ray import serve  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from ray.exceptions import ActorDiedError  # noqa: E402
from ray.serve.exceptions import BackPressureError  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.responses import Response  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402
from tritonclient import http as triton  # noqa: E402

from prompttune.serve.limits import Limits  # noqa: E402
from prompttune.serve.protocol.rest import rest_application  # noqa: E402
from prompttune.serve.protocol.security import Guard, Tokens  # noqa: E402
from prompttune.serve.protocol.settings import TransportSettings  # noqa: E402
from prompttune.serve.ray_serve import Scaling, application, build  # noqa: E402
from prompttune.serve.ray_serve import ingress as ingress_module  # noqa: E402
from prompttune.serve.ray_serve import proxy as proxy_module  # noqa: E402
from prompttune.serve.ray_serve.deployments import ENGINE, INGRESS  # noqa: E402
from prompttune.serve.ray_serve.ingress import Ingress  # noqa: E402
from prompttune.serve.ray_serve.messages import ATTEMPTS, RequestHead, WholeAnswer  # noqa: E402
from prompttune.serve.ray_serve.proxy import AskAgain  # noqa: E402
from prompttune.serve.ray_serve.replica import _call  # noqa: E402
from tests.fake_service import FakeService  # noqa: E402

FULL = 16
"""Images of a batch, which is not held back when it is full."""
HOLD_S = 0.3
"""That a request stays inside its replica, so that one that is killed takes some with it."""
CLASSES = {"task0": 2, "task1": 3}
INFER = "/v2/models/task0/infer"


class Replies:
    """Stands in for the handle of the replicas: each call takes the next reply, an error or an answer."""

    def __init__(self, *replies):
        self._replies = list(replies)
        self.calls = []
        self._routed = ""

    def options(self, method_name="", multiplexed_model_id=""):
        self._routed = multiplexed_model_id
        return self

    async def remote(self, head, body, task):
        self.calls.append((self._routed, head, body, task))
        self._routed = ""
        reply = self._replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply


def asked(replies, *, affinity=True, **transport):
    one = Ingress(replies, TransportSettings(**transport), 5.0, affinity)
    return TestClient(one.__serve_build_asgi_app__())


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    for module in (ingress_module, proxy_module):
        monkeypatch.setattr(module, "PAUSE_S", 0.0)


OK = WholeAnswer(200, [(b"content-type", b"application/json"), (b"x-request-id", b"mine")], b"{}")


def test_a_lost_replica_is_followed_by_another():
    replies = Replies(ActorDiedError(), OK)
    answer = asked(replies).post(INFER, content=b"body")
    assert (answer.status_code, answer.content) == (200, b"{}")
    assert [call[2] for call in replies.calls] == [b"body", b"body"]


def test_a_request_that_loses_every_replica_may_come_again_later():
    replies = Replies(*[ActorDiedError()] * (ATTEMPTS + 1))
    answer = asked(replies).post(INFER)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert "lost" in answer.json()["error"]
    assert len(replies.calls) == ATTEMPTS


def test_full_replicas_are_unavailable():
    answer = asked(Replies(BackPressureError(5, 5))).post(INFER)
    assert answer.status_code == 503
    assert "retry-after" in answer.headers


def test_no_replica_in_time_is_unavailable(monkeypatch):
    monkeypatch.setattr(ingress_module, "ANSWER_S", -4.9)
    monkeypatch.setattr(ingress_module, "PAUSE_S", 5.0)
    answer = asked(Replies(ActorDiedError())).post(INFER)
    assert answer.status_code == 503
    assert "in time" in answer.json()["error"]


def test_a_name_is_routed_by_once_a_replica_has_answered_for_it():
    missing = WholeAnswer(404, [], b"{}")
    replies = Replies(missing, missing, OK, OK, OK)
    client = asked(replies)
    for model in ("made-up", "made-up", "task0", "task0"):
        client.post(f"/v2/models/{model}/infer")
    client.get("/v2/models/task0")
    assert [call[0] for call in replies.calls] == ["", "", "", "task0", ""]
    assert [call[3] for call in replies.calls] == ["made-up", "made-up", "task0", "task0", ""]


@pytest.mark.parametrize(
    ("path", "affinity"), [("/v2/models/mixed/infer", True), ("/v2/models/panel/infer", True), (INFER, False)]
)
def test_what_is_not_routed_by_task(path, affinity):
    replies = Replies(OK, OK)
    client = asked(replies, affinity=affinity)
    for _ in range(2):
        client.post(path)
    assert [call[0] for call in replies.calls] == ["", ""]


def test_the_prefix_of_the_application_is_kept():
    replies = Replies(OK)
    client = TestClient(asked(replies).app, root_path="/vision", base_url="https://models.example")
    client.get("/vision/v2/")
    [(_, head, body, _)] = replies.calls
    assert (head.path, head.root_path, head.scheme) == ("/v2/", "/vision", "https")
    answer = asyncio.run(_call(rest_application(FakeService(), TransportSettings()), head, body))
    assert (answer.status, dict(answer.headers)[b"location"]) == (307, b"https://models.example/vision/v2")


def test_a_body_is_refused_before_it_is_forwarded():
    replies = Replies()
    client = asked(replies, limits=Limits(body_bytes=10), guard=Guard(Tokens(["secret"])))
    assert client.post(INFER, content=b"x").status_code == 401
    authorised = {"Authorization": "Bearer secret"}
    assert client.post(INFER, content=b"x" * 11, headers=authorised).status_code == 413
    assert not replies.calls


class LosingProxy:
    """Stands in for Ray's proxy: reads the whole request, and answers from the given attempt on."""

    def __init__(self, losses):
        self._losses = losses
        self.bodies = []

    async def __call__(self, scope, receive, send):
        request = Request(scope, receive)
        self.bodies.append(await request.body())
        if len(self.bodies) > self._losses:
            await Response("fine")(scope, receive, send)


@pytest.mark.parametrize(("losses", "status"), [(0, 200), (ATTEMPTS - 1, 200), (ATTEMPTS, 503)])
def test_a_lost_ingress_is_followed_by_another(losses, status):
    proxy = LosingProxy(losses)
    answer = TestClient(AskAgain(proxy)).post(INFER, content=iter([b"in ", b"parts"]))
    assert answer.status_code == status
    assert ("retry-after" in answer.headers) == (status == 503)
    assert proxy.bodies == [b"in parts"] * min(losses + 1, ATTEMPTS)


@pytest.mark.parametrize(
    ("engine", "transport", "scaling", "message"),
    [
        ({}, {"guard": Guard(control=True)}, {}, "watch"),
        ({"devices": ("cpu", "cuda")}, {}, {}, "one device"),
        ({"devices": ("cuda",)}, {}, {}, "gpus"),
        ({}, {"shared_memory": True}, {}, "shared memory"),
        ({}, {"root_path": "/vision"}, {}, "route_prefix"),
        ({}, {"proxies": ("*",)}, {}, "route_prefix"),
    ],
)
def test_settings_without_a_meaning_on_a_cluster(engine, transport, scaling, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        application(EngineSettings(tmp_path, **engine), None, TransportSettings(**transport), Scaling(**scaling))


@pytest.mark.parametrize(("device", "scaling", "threads"), [("cpu", {"cpus": 2.5}, 2), ("cuda", {"gpus": 1.0}, None)])
def test_threads_are_told_to_replicas_on_a_cpu_alone(monkeypatch, tmp_path, device, scaling, threads):
    told = []

    class Deployment:
        def bind(self, engine, *_):
            told.append(engine.runtime.threads)
            raise UsageError("seen")

    monkeypatch.setattr("prompttune.serve.ray_serve.deployments._engine_deployment", lambda _: Deployment())
    with pytest.raises(UsageError, match="seen"):
        application(EngineSettings(tmp_path, devices=(device,)), None, TransportSettings(), Scaling(**scaling))
    assert told == [threads]


@pytest.mark.parametrize(
    "wrong",
    [{"min_replicas": 0}, {"min_replicas": 3, "max_replicas": 2}, {"ingress_replicas": 0}, {"target_requests": 65}],
)
def test_scaling_is_checked(wrong):
    with pytest.raises(UsageError):
        Scaling(**wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "engine"),
        ({"engine": "x", "replicas": "2"}, "replicas"),
        ({"engine": "x", "max_batch": "many"}, "max_batch"),
        ({"engine": "x", "token_file": "nowhere"}, "token file"),
    ],
)
def test_wrong_arguments_of_serve_run_are_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        build(arguments)


def test_without_ray_one_line_says_what_to_install(monkeypatch):
    name = "prompttune.serve.ray_serve"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"prompttune\[ray\]"):
        importlib.import_module(name)


# -------------------------------------------------------------------------------------------------- a real cluster


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@contextlib.contextmanager
def two_nodes():
    """A head and a second node, each with room for one engine."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # pytest's folders are too long for Ray's sockets
    environment = {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "prompttune.serve.ray_serve.proxy:middlewares",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # or Ray writes one into the home folder
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",
    }
    node = {"num_cpus": 3, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in environment.items():
            patch.setenv(variable, value)
        cluster = Cluster()
        try:
            for _ in range(2):
                cluster.add_node(**node)
            ray.init(address=cluster.address, log_to_driver=False)
            yield
        finally:
            if ray.is_initialized():
                serve.shutdown()
                ray.shutdown()
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def address():
    """``host:port`` of two replicas of one engine on two nodes."""
    arguments = {  # text, as ``serve run`` passes it on
        "engine": str(exported("sa2vp")),
        "max_batch": str(FULL),
        "max_delay_ms": str(1000 * HOLD_S),
        "resident_tasks": "1",
        "min_replicas": "2",
        "max_replicas": "2",
        "cpus": "2",
        "ingress_replicas": "2",
    }
    port = free_port()
    with two_nodes():
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(arguments))
        yield f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def engine():
    return pt.Engine(exported("sa2vp"))


def replicas(deployment):
    """The running replicas of a deployment: process → node."""
    details = serve.context._get_global_client().get_serve_details()
    found = details["applications"]["default"]["deployments"][deployment]["replicas"]
    return {one["pid"]: one["node_id"] for one in found if one["state"] == "RUNNING"}


def rows_answered():
    """How many rows of each task each replica has answered: (time of its start, task) → rows."""
    handle = serve.get_deployment_handle(ENGINE, "default")
    counts = {}
    for answer in handle.broadcast("answer", RequestHead("GET", "/metrics", b"", []), b"", "").results(timeout_s=30):
        families = text_string_to_metric_families(WholeAnswer(*answer).body.decode())
        samples = [sample for family in families for sample in family.samples]
        [started] = [sample.value for sample in samples if sample.name == "prompttune_batch_rows_created"]
        for sample in samples:
            if sample.name == "prompttune_rows_total":
                counts[started, sample.labels["task"]] = sample.value
    return counts


def infer(client, task, images):
    image = triton.InferInput("image", images.shape, "FP32")
    image.set_data_from_numpy(images)
    return client.infer(task, [image]).as_numpy("logits")


@pytest.mark.slow
def test_a_task_stays_where_it_is_held(address):
    full = noise(FULL)
    with contextlib.closing(triton.InferenceServerClient(address)) as client:

        def answered_by(requests):
            """Task → the replicas that answered its requests."""
            before = rows_answered()
            for task in CLASSES:
                for _ in range(requests):
                    infer(client, task, full)
            grown = [key for key, rows in rows_answered().items() if rows > before.get(key, 0)]
            return {task: {started for started, one in grown if one == task} for task in CLASSES}

        deadline, last, holders = time.monotonic() + 120, None, answered_by(3)
        # A replica has room for one task here, so each comes to rest at one of its own.
        while (
            holders != last or len(set.union(*holders.values())) != 2 or any(len(one) != 1 for one in holders.values())
        ):
            assert time.monotonic() < deadline, "the tasks do not come to rest"
            last, holders = holders, answered_by(3)
        assert answered_by(20) == holders


class Load:
    """Threads that ask for both tasks until they are told to stop, and compare every answer."""

    def __init__(self, address, engine):
        self._address = address
        self._images = noise(4)
        self._expected = {task: engine.logits(self._images, task)[:, :count] for task, count in CLASSES.items()}
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(task,)) for task in CLASSES for _ in range(3)]
        self.answered, self.problems = [], []

    def __enter__(self):
        for thread in self._threads:
            thread.daemon = True
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join(120)

    def _ask(self, task):
        with contextlib.closing(triton.InferenceServerClient(self._address, network_timeout=120.0)) as client:
            while not self._stop.is_set():
                try:
                    logits = infer(client, task, self._images)
                    np.testing.assert_allclose(logits, self._expected[task], atol=1e-5)
                except Exception as problem:
                    self.problems.append(problem)
                    return
                self.answered.append(task)

    def wait_for(self, more):
        """Return when so many more requests have been answered, or one has not."""
        target, deadline = len(self.answered) + more, time.monotonic() + 120
        while len(self.answered) < target and not self.problems:
            assert time.monotonic() < deadline, "requests hang"
            time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("deployment", [ENGINE, INGRESS])
def test_a_killed_replica_loses_no_request(address, engine, deployment):
    before = replicas(deployment)
    assert len(before) == 2
    with Load(address, engine) as load:
        load.wait_for(20)
        time.sleep(HOLD_S / 2)  # what was asked again since the last answer is inside now
        # The proxy is on the driver's node, and prefers the replicas there.
        killed = min(before, key=lambda process: before[process] != ray.get_runtime_context().get_node_id())
        os.kill(killed, signal.SIGKILL)
        load.wait_for(20)
        deadline = time.monotonic() + 120
        while len(after := replicas(deployment)) < 2 or killed in after:
            assert time.monotonic() < deadline, "the replica does not come back"
            assert not load.problems
            time.sleep(0.1)
        load.wait_for(20)
    assert not load.problems
    assert set(load.answered) == set(CLASSES)
    if deployment == ENGINE:
        assert len(set(before.values())) == len(set(after.values())) == 2
