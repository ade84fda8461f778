"""A job on a Ray cluster: the rows of a local run, in order, whatever node is lost."""

import importlib
import io
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from prompttune.errors import DataError, EngineError, MissingExtraError, UsageError
from prompttune.export.folder import EngineFolder
from prompttune.export.runtimes import RuntimeOptions
from prompttune.serve.engine import Engine
from prompttune.serve.infer.cluster import RaySettings, run_on_ray
from prompttune.serve.infer.cluster.settings import Booking
from prompttune.serve.infer.items import ArrayPayload, BytesPayload, FilePayload, Item
from prompttune.serve.infer.job import InferJob
from prompttune.serve.infer.local import run_locally
from prompttune.serve.infer.settings import Decoding
from prompttune.serve.infer.work import Work, facts_of
from tests.engines import exported
from tests.inferring import pictures as folder_of_pictures
from tests.inferring import run

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'prompttune[ray]'")
from ray.cluster_utils import Cluster  # noqa: E402
from ray.exceptions import (  # noqa: E402
    ActorDiedError,
    NodeDiedError,
    ObjectStoreFullError,
    RayTaskError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)

from prompttune.serve.infer.cluster import connection  # noqa: E402
from prompttune.serve.infer.cluster import job as ray_job  # noqa: E402
from prompttune.serve.infer.cluster.job import on_workers  # noqa: E402
from prompttune.serve.infer.cluster.workers import EngineActor  # noqa: E402

SMALL = RaySettings(parcel=8, window=2, actors=(1, 1))
"""Little on its way, so that a job is in its midst when its first answers come."""
NODE = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
MINUTE_S = 60.0


def work_of(engine, **settings):
    folder = EngineFolder(engine)
    options = RuntimeOptions(threads=1)
    return Work(
        engine, ("task0", "task1"), facts_of(folder), folder.manifest.image_size, options, batch_size=8, **settings
    )


@pytest.fixture(scope="module")
def work():
    return work_of(exported("linear"))


def in_chunks(items, work):
    return [items[start : start + work.chunk_inputs] for start in range(0, len(items), work.chunk_inputs)]


def locally(chunks, work):
    return list(run_locally(chunks, Engine(work.engine, threads=work.options.threads), work, Decoding(1)))


def pixels(count):
    return np.random.default_rng(count).integers(0, 256, (count, 24, 32, 3), dtype=np.uint8)


def pictures(count):
    """Inputs that hold their pixels, no two alike."""
    return [Item(f"{number}.png", ArrayPayload(one), row=number) for number, one in enumerate(pixels(count))]


# -------------------------------------------------------------------------------------------------- without a cluster


@pytest.mark.parametrize(
    "wrong",
    [
        {"actors": (0, None)},
        {"actors": (3, 2)},
        {"cpus": 0},
        {"decoder_cpus": 0},
        {"gpus": -1},
        {"window": 0},
        {"parcel": 0},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(UsageError):
        RaySettings(**wrong)


@pytest.mark.parametrize(
    ("booking", "nodes", "engines"),
    [
        (Booking(1, 0, 1), [{"CPU": 4.0}, {"CPU": 3.0}], 3),
        (Booking(4, 0, 1), [{"CPU": 3.0}, {"CPU": 3.0}], 0),
        (Booking(1, 0, 1), [{"CPU": 1.0}], 0),
        (Booking(1, 1, 1), [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0}], 4),
        (Booking(1, 0.5, 1), [{"CPU": 16.0, "GPU": 1.0}], 2),
        (Booking(1, 1, 1), [{"CPU": 2.0, "GPU": 4.0}], 1),
        (Booking(1, 1, 1), [{"CPU": 2.0}], 0),
    ],
)
def test_room_leaves_some_for_decoders(booking, nodes, engines):
    assert booking.room(nodes) == engines


@pytest.mark.parametrize(("device", "threads"), [("cpu", 3), ("cuda:1", None)])
def test_threads_are_told_to_engines_on_a_cpu_alone(work, device, threads):
    told = on_workers(replace(work, options=RuntimeOptions(device)), RaySettings(cpus=3.5)).options
    assert (told.device, told.threads) == (device.partition(":")[0], threads)


def test_an_engine_on_a_gpu_books_one(work):
    assert Booking.of(RaySettings(), on_gpu=True).gpus == 1
    assert Booking.of(RaySettings(), on_gpu=False).gpus == 0
    on_gpu = replace(work, options=RuntimeOptions("cuda"))
    with pytest.raises(UsageError, match="gpus"):
        next(run_on_ray([], on_gpu, RaySettings(gpus=0)))


def test_without_ray_one_line_says_what_to_install(monkeypatch, work):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"prompttune\[ray\]"):
        run_on_ray([], work)


@pytest.fixture
def alone(monkeypatch):
    """As if Ray did not run in this process."""
    monkeypatch.setattr(connection.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(connection.ray, "shutdown", lambda: None)
    monkeypatch.setattr(connection.ray, "init", lambda **_: pytest.fail("reached"))


def test_an_address_without_a_cluster(alone, work):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
    with pytest.raises(UsageError, match=f"cannot reach Ray at {address}: .*refused"):
        next(run_on_ray([pictures(1)], work, RaySettings(address)))


@pytest.mark.parametrize("address", ["ray://somewhere:10001", "somewhere", "somewhere:port"])
def test_an_address_that_is_none(alone, work, address):
    with pytest.raises(UsageError, match=r"host:port.*ray job submit"):
        next(run_on_ray([pictures(1)], work, RaySettings(address)))


def test_a_cluster_that_does_not_let_us_join(alone, monkeypatch, work):
    def refuse(**_):
        raise RuntimeError("Version mismatch: 1 and 2\nmore")

    monkeypatch.setattr(connection.ray, "init", refuse)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(UsageError, match=rf"cannot join the Ray cluster at {address}: Version mismatch: 1 and 2$"):
            next(run_on_ray([pictures(1)], work, RaySettings(address)))


def test_another_engine_under_the_same_path_is_refused(work):
    facts = {name: replace(one, version="0") for name, one in work.known.items()}
    engine = EngineActor(replace(work, known=facts))
    assert engine.opened().endswith("differs from the one on the machine that started the job")
    assert engine.answer([]) == engine.opened()


class Ref:
    """A reference, done when a test says so."""

    def __init__(self, value, done=False):
        self.value, self.done = value, done


class FakeRay:
    """As much of Ray as a job asks for. Engines answer with the inputs themselves; ``looks`` runs at every pause."""

    def __init__(self, looks):
        self._looks, self._answering = iter(looks(self)), False
        self.actors, self.decoding, self.cancelled = [], [], []

    def put(self, value):
        return value

    def remote(self, kind):
        made = SimpleNamespace(remote=self._actor if kind is EngineActor else self._decoded)
        return SimpleNamespace(options=lambda **_: made)

    def _actor(self, _work):
        actor = SimpleNamespace(opening=Ref(None), parcels=[])
        actor.opened = SimpleNamespace(remote=lambda: actor.opening)
        actor.answer = SimpleNamespace(
            remote=lambda decoded: actor.parcels.append(Ref(decoded.value, self._answering)) or actor.parcels[-1]
        )
        self.actors.append(actor)
        return actor

    def _decoded(self, chunks, *_):
        self.decoding.append(Ref(chunks))
        return self.decoding[-1]

    def wait(self, refs, num_returns=1, timeout=0):
        done = [one for one in refs if one.done]
        if timeout and not done:
            next(self._looks)
        return done, [one for one in refs if not one.done]

    def get(self, ref):
        return ref.value

    def answer(self):
        """Answer what was sent and what will be sent."""
        self._answering = True
        for ref in (ref for one in self.actors for ref in one.parcels):
            ref.done = True

    def cancel(self, ref):
        self.cancelled.append(ref)

    def kill(self, actor):
        self.actors.remove(actor)


@pytest.fixture
def job_of(work, monkeypatch):
    """Makes a job on a cluster that is none."""

    def make(looks, chunks, nodes, cpus=1, **settings):
        monkeypatch.setattr(ray_job, "ray", FakeRay(looks))
        monkeypatch.setattr(ray_job, "alive_nodes", lambda: dict(nodes))
        return ray_job._RayJob(iter(chunks), work, RaySettings(**settings), Booking(cpus, 0, cpus))

    return make


def files(count):
    return [Item(f"{number}.png", FilePayload(f"{number}.png")) for number in range(count)]


def test_an_engine_that_opens_first_does_not_get_all(job_of, work):
    def looks(fake):
        fake.actors[1].opening.done = True
        yield
        # a window of 4 parcels an engine and one for each of the 6 CPUs
        assert [len(one.parcels) for one in fake.actors] == [0, 6, 0]
        fake.actors[0].opening.done = fake.actors[2].opening.done = True
        yield
        assert [len(one.parcels) for one in fake.actors] == [6, 6, 6]
        fake.answer()
        yield

    chunks = in_chunks(files(200), work)
    job = job_of(looks, chunks, {"one": {"CPU": 6.0}}, parcel=work.chunk_inputs)
    assert list(job.answers()) == chunks


@pytest.mark.parametrize("closed", [False, True])
def test_pixels_on_their_way_are_few_and_closing_ends_their_decoding(job_of, work, closed):
    def looks(fake):
        for one in fake.actors:
            one.opening.done = True
        yield
        assert [ref.value for ref in fake.decoding] == [[chunk] for chunk in chunks[:4]]
        if closed:
            raise DataError("enough")
        fake.answer()
        yield

    chunks = in_chunks(pictures(80), work)
    job = job_of(looks, chunks, {"one": {"CPU": 4.0}})
    if closed:
        with pytest.raises(DataError, match="enough"):
            list(job.answers())
        job.close()
        assert ray_job.ray.cancelled == ray_job.ray.decoding
        assert ray_job.ray.actors == []
    else:
        assert list(job.answers()) == chunks


def test_the_loss_of_the_last_room_is_waited_out(job_of, work, monkeypatch, caplog):
    nodes = {"one": {"CPU": 2.0}, "two": {"CPU": 2.0}}
    monkeypatch.setattr(ray_job, "STALLED_S", 0.0)

    def looks(fake):
        lost = fake.actors[0]
        lost.opening.done = True
        yield
        del nodes["one"]
        yield
        yield
        assert fake.actors == [lost]
        assert [one.message.partition(":")[0] for one in caplog.records] == [
            "a node was lost, and no other node has room for an engine"
        ]
        nodes["three"] = {"CPU": 2.0}
        fake.answer()
        yield
        [new] = fake.actors
        assert new is not lost
        new.opening.done = True
        yield

    chunks = in_chunks(files(20), work)
    job = job_of(looks, chunks, nodes, cpus=2)
    assert list(job.answers()) == chunks
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        (WorkerCrashedError(), "10 processes or nodes were lost trying to answer 0.png and the inputs after it"),
        (ActorDiedError(), "an engine was lost in each of 40 attempts to answer 0.png and the inputs after it"),
        (
            RayTaskError("f", "", NodeDiedError("gone")),
            "10 processes or nodes were lost trying to answer 0.png and the",
        ),
        (ObjectStoreFullError("full\nmore"), "the job on Ray has failed: ObjectStoreFullError: full"),
        (RuntimeEnvSetupError("no pip"), "the job on Ray has failed: RuntimeEnvSetupError: Failed"),
        (RayTaskError("f", "", RayTaskError("g", "", ValueError("bad"))), "the job on Ray has failed: ValueError: bad"),
    ],
)
def test_only_what_was_lost_counts_as_lost(problem, line):
    assert re.match(line, str(ray_job._failure(problem, ray_job._Parcel([files(2)]))))


def test_an_engine_that_a_node_cannot_open_is_one_line(job_of, work, tmp_path):
    actor = EngineActor(replace(work, engine=tmp_path / "engine"))

    def looks(fake):
        fake.actors[0].opening.value, fake.actors[0].opening.done = actor.opened(), True
        yield

    job = job_of(looks, in_chunks(files(8), work), {"one": {"CPU": 2.0}})
    here = socket.gethostname()
    with pytest.raises(EngineError, match=rf"^node {here}: no engine at {tmp_path}/engine: .*every node sees$"):
        list(job.answers())


# ---------------------------------------------------------------------------------------------------- a real cluster


@pytest.fixture(scope="module")
def cluster():
    """A head without processors, and a node with room for an engine and a decoder."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # pytest's folders are too long for Ray's sockets
    environment = {
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # or Ray writes one into the home folder
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
    }
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in environment.items():
            patch.setenv(variable, value)
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=0, **NODE)
            cluster.add_node(num_cpus=2, **NODE)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def joined(cluster):
    """This process has joined the cluster before."""
    if not ray.is_initialized():
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    return cluster


def living(kind):
    """Living actors of a class → their nodes."""
    actors = ray._private.state.actors()
    return {
        name: one["Address"]["NodeID"]
        for name, one in actors.items()
        if one["ActorClassName"].startswith(kind) and one["State"] != "DEAD"
    }


def wait_until(condition, what):
    deadline = time.monotonic() + MINUTE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.mark.slow
def test_the_rows_of_a_local_run(cluster, work, tmp_path, monkeypatch, capfd):
    if ray.is_initialized():
        ray.shutdown()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path)
    # The cluster has the address of this machine's network card, which no test may connect to from Python.
    monkeypatch.setattr(connection, "_check_reachable", lambda _: None)
    files = []
    for number, one in enumerate(pixels(9)):
        path = tmp_path / "b" / f"{number}.png"
        Image.fromarray(one).save(path)
        files.append(Item(f"b/{number}.png", FilePayload(path.relative_to(tmp_path))))
    encoded = io.BytesIO()
    Image.fromarray(pixels(1)[0]).save(encoded, "PNG")
    odd = [
        Item("bytes", BytesPayload(encoded.getvalue()), row=3, target="class1"),
        Item("no image", BytesPayload(b"none"), row=4),
        Item("empty", error="an empty cell", row=5),
        Item("missing", FilePayload(tmp_path / "missing.png")),
        Item("own task", BytesPayload(encoded.getvalue()), task="task1"),
        Item("unknown task", BytesPayload(encoded.getvalue()), task="nonsense"),
        Item("frame", ArrayPayload(pixels(1)[0]), frame=2, timestamp=0.5),
    ]
    shown = replace(work, picture_side=16)
    chunks = in_chunks(files + odd + pictures(30), shown)

    def listing():
        yield from chunks
        raise DataError("the disk is gone")

    run = run_on_ray(listing(), shown, RaySettings(cluster.address, parcel=8))
    answers = list(islice(run, len(chunks)))
    assert answers == locally(chunks, shown)
    with pytest.raises(DataError, match=r"^the disk is gone$"):
        next(run)
    rows = [row for chunk in answers for answer in chunk for row in answer.rows]
    assert len({(row.source, row.row, row.task) for row in rows}) == len(rows) == 2 * (9 + 7 + 30) - 2
    assert sum(row.error is not None for row in rows) == 2 * 3 + 1
    assert [row.error for row in rows if row.source == "missing"] == ["No such file or directory"] * 2
    assert {max(answer.picture.size) for chunk in answers for answer in chunk if answer.picture is not None} == {16}
    assert not ray.is_initialized()
    assert "".join(capfd.readouterr()) == ""


def test_a_cluster_without_room(joined, work):
    with pytest.raises(UsageError, match=r"no room for an engine \(2 CPUs on a node\) and a decoder \(1 CPUs\)"):
        next(run_on_ray([pictures(1)], work, RaySettings(cpus=2)))
    with pytest.raises(UsageError, match=r"room for 1 engines with their decoders, not for 2"):
        next(run_on_ray([pictures(1)], work, RaySettings(actors=(2, 2))))


def test_no_inputs(joined, work):
    assert list(run_on_ray([], work, SMALL)) == []


@pytest.mark.slow
def test_a_whole_job_begun_here_and_ended_there(joined, tmp_path):
    """Row log and outputs do not depend on where the chunks are answered."""
    images = folder_of_pictures(tmp_path / "images", 40, corrupt=(7,))
    one_thread = {"options": RuntimeOptions(threads=1)}
    run(images, output=tmp_path / "here.jsonl", **one_thread)

    def enough(self):
        if self._progress.inputs >= 12:
            raise EngineError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InferJob, "_check_errors", enough)
        with pytest.raises(EngineError, match="the rows of 12 inputs are safe"):
            run(images, output=tmp_path / "both.jsonl", **one_thread)
    summary, rows = run(images, output=tmp_path / "both.jsonl", **one_thread, resume=True, ray=RaySettings(parcel=8))
    assert (summary.inputs, summary.errors, len(rows)) == (40, 1, 40)
    assert (tmp_path / "both.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()
    (images / "0030.png").write_bytes((images / "0031.png").read_bytes())  # one that the cluster has answered
    with pytest.raises(DataError, match=r"0030\.png is not what it was"):
        run(images, output=tmp_path / "both.jsonl", **one_thread, resume=True, ray=RaySettings(parcel=8))


@pytest.mark.slow
@pytest.mark.parametrize("engines", [1, 2], ids=["restarted elsewhere", "no place elsewhere"])
def test_a_lost_node_loses_no_row(joined, work, engines, monkeypatch):
    if engines == 2:
        monkeypatch.setattr(ray_job, "STALLED_S", 3.0)
    joined.add_node(num_cpus=2, **NODE)
    wait_until(lambda: len(connection.alive_nodes()) == 3, "the node does not come")
    chunks = in_chunks(pictures(120), work)
    listed = []
    answers = run_on_ray(
        (listed.append(chunk) or chunk for chunk in chunks), work, replace(SMALL, actors=(engines, engines), window=6)
    )
    got = [next(answers) for _ in range(4)]
    assert len(listed) <= 4 + 6  # as answers arrive
    holder = next(iter(living("EngineActor").values()))
    joined.remove_node(next(one for one in joined.worker_nodes if one.node_id == holder), allow_graceful=False)
    got += answers
    assert got == locally(chunks, work)
    wait_until(lambda: len(connection.alive_nodes()) == 2, "the lost node stays")  # the cluster sees it late
    wait_until(lambda: not living("EngineActor"), "actors stay behind")
    assert ray.is_initialized()


class Poison(ArrayPayload):
    def open(self):
        os._exit(1)


@pytest.mark.slow
def test_an_input_that_ends_every_process_is_one_line(joined, work, monkeypatch):
    monkeypatch.setattr(ray_job, "ATTEMPTS", 2)
    items = [*pictures(8), Item("poison.png", Poison(pixels(1)[0]))]
    answers = run_on_ray(in_chunks(items, work), work, SMALL)
    assert len([next(answers), next(answers)]) == 2
    with pytest.raises(DataError, match=r"2 processes or nodes were lost trying to answer poison\.png and the inputs"):
        next(answers)
