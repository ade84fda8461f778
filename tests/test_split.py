"""Engines in two parts, and the cache of image states in front of the second one."""

import numpy as np
import pytest
from click.testing import CliRunner

import prompttune as pt
from prompttune.cli.main import cli
from prompttune.errors import UsageError
from prompttune.export import EngineFolder, ExportSettings
from prompttune.export.runtimes.image_cache import ImageCache
from prompttune.serve.service.settings import EngineSettings
from prompttune.serve.workers import Key, WorkerSettings
from prompttune.serve.workers.store import Store
from tests.engines import checkpoint, exported, noise, workshop

TOGETHER = [["task0", "task1"]]


@pytest.fixture(scope="module", params=["linear", "sa2vp"])
def split(request):
    folder = workshop() / "split" / request.param
    runs = [checkpoint(request.param, number) for number in (0, 1)]
    pt.export_engine(runs, folder, format=ExportSettings(split=True), batch_sizes=(1, 3))
    return request.param, folder


def test_two_parts_answer_as_one(split):
    method, folder = split
    images = noise(3)
    whole, parts = (pt.Engine(one).logits(images, TOGETHER) for one in (exported(method), folder))
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    files = pt.Engine(folder).folder.manifest.files
    assert {name.partition("/")[0] for name in files} == {"image", "answer"}


def test_a_kept_image_costs_the_tasks_part_alone_and_gives_the_same_bits(split, monkeypatch):
    _, folder = split
    engine, images = pt.Engine(folder, image_cache=8), noise(4)
    kept = engine._runtime
    assert isinstance(kept, ImageCache)
    computed, run = [], kept._runtime.image_state
    monkeypatch.setattr(kept._runtime, "image_state", lambda given: computed.append(len(given)) or run(given))
    first = engine.logits(images, TOGETHER)
    assert np.array_equal(engine.logits(images, TOGETHER), first)
    np.testing.assert_allclose(engine.logits(images[[3, 3, 0]], "task1"), first[[3, 3, 0], 1], atol=1e-5)
    engine.logits(np.concatenate([images[:1], noise(1, seed=9)]), "task0")
    assert computed == [4, 1]
    assert (kept.hits, kept.misses) == (4 + 3 + 1, 4 + 1)


def test_the_cache_stays_within_its_bytes_and_drops_the_least_recent(split):
    _, folder = split
    runtime, images = pt.Engine(folder)._runtime, noise(4)
    one = sum(value[0].nbytes for value in runtime.image_state(images[:1]).values())
    cache, engine = ImageCache(runtime, 2 * one), pt.Engine(folder)
    engine._runtime = cache
    for row in (0, 1, 0, 2, 0, 1):  # 2 takes the place of 1
        engine.logits(images[row : row + 1], "task0")
        assert cache.nbytes <= 2 * one
    assert (cache.hits, cache.misses) == (2, 4)


def test_a_frame_like_an_earlier_one_takes_its_work(split, monkeypatch):
    _, folder = split
    engine, images = pt.Engine(folder, image_cache=8, skip_unchanged=0.05), noise(3)
    like, moved, still = images.copy(), images.copy(), np.repeat(images[:1], 2, 0)
    like += 0.04 * np.where(np.arange(images.shape[-1]) % 2, 1, -1).astype(np.float32)
    moved[:, :, -5:, -5:] += 1.5  # one cell's part
    still[1, 0, 3, 3] += 5.0  # a pixel: 5 / 3 channels / 256 places
    first = engine.logits(images, "task0")
    assert np.array_equal(engine.logits(like, "task0"), first)
    cache = engine._runtime
    assert (cache.hits, cache.misses) == (3, 3)
    assert np.abs(engine.logits(moved, "task0") - first).max() > 1e-5
    assert (cache.hits, cache.misses) == (3, 6)
    fresh = pt.Engine(folder, image_cache=8, skip_unchanged=0.05)
    together = fresh.logits(still, "task0")
    assert np.array_equal(together[0], together[1])
    for shade in range(40):  # a slow change is compared with what was computed, not with the frame before
        fresh.logits(still[:1] + np.float32(0.01 * shade), "task0")
    assert fresh._runtime.misses >= 2 + 40 // 6
    with pytest.raises(UsageError, match="--skip-unchanged compares with kept images: give --image-cache"):
        pt.Engine(folder, skip_unchanged=0.05)


def test_a_server_keeps_images_for_all_of_its_tasks(split):
    _, folder = split
    settings = EngineSettings.of(folder, {"image_cache": 8})
    assert "--image-cache" in CliRunner().invoke(cli, ["serve", "--help"]).output
    slots = np.ascontiguousarray(noise(2)[None])
    store = Store(WorkerSettings(folder, settings.runtime, rows=2, axes={}, max_batch=2, host_bytes=0), slots)
    keys = [Key(name, EngineFolder(folder).load_task(name)[1]) for name in TOGETHER[0]]
    for key in keys:
        store.load(key, folder / "tasks" / key.task)
    before = store.stats()
    first, again = (store.run(0, [[key], [key]]).logits for key in keys)
    wanted = pt.Engine(folder).logits(noise(2), TOGETHER)
    for number, found in enumerate((first, again)):
        np.testing.assert_allclose(found[:, 0, : 2 + number], wanted[:, number, : 2 + number], atol=1e-5)
    after = store.stats()
    assert after.image_hits - before.image_hits >= 2
    assert after.image_misses - before.image_misses <= 2
    assert 0 < after.image_bytes <= 8 << 20


def test_a_replaced_task_answers_anew_for_a_kept_image(split):
    method, folder = split
    engine, image = pt.Engine(folder, image_cache=8), noise(1)
    before = engine.logits(image, "task0")
    engine.add_task("task0", checkpoint(method, 1), replace=True, save=False, parity=False)
    np.testing.assert_allclose(engine.logits(image, "task0"), engine.logits(image, "task1"), atol=1e-6)
    assert before.shape != engine.logits(image, "task0").shape


def test_what_cannot_be_split_is_refused_in_one_line(tmp_path):
    for wrong in ({"baked": True}, {"format": "aoti"}, {"precision": "int8", "quantization": "static"}):
        with pytest.raises(UsageError, match="split is for the format onnx on the cpu, not baked"):
            ExportSettings(split=True, **wrong).resolved()
    with pytest.raises(UsageError, match="an image cache needs an engine in two parts: export it with --split"):
        pt.Engine(exported("linear"), image_cache=8)
    told = CliRunner().invoke(cli, ["infer", str(exported("linear")), str(tmp_path), "--image-cache", "8"])
    assert told.exit_code != 0
    assert "Traceback" not in told.output


def test_parts_have_no_intermediate_results(split):
    with pytest.raises(UsageError, match="an engine in two parts does not show its intermediate results"):
        pt.validate_engine(split[1], debug=True)
