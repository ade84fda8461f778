"""ONNX engines in OpenVINO: the same answers, the same bank, precisions, its cache, the choice of a runtime."""

import dataclasses
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import prompttune as pt
from prompttune.cli.main import cli
from prompttune.errors import EngineError, MissingExtraError, UsageError
from prompttune.export.folder import EngineFolder
from prompttune.export.runtimes import RuntimeOptions, choice, open_runtime, processor
from prompttune.export.runtimes.choice import ONNXRUNTIME, OPENVINO, QUICKEST, quickest, remember, runtime_of
from prompttune.serve.workers.base import Key, WorkerSettings
from prompttune.serve.workers.store import Store
from tests.engines import checkpoint, copied, exported, noise
from tests.inferring import invoked, pictures
from tests.test_cli_export import refused

ov = pytest.importorskip("openvino")
from prompttune.export.runtimes import openvino as module  # noqa: E402

TASKS = ["task0", "task1", "task1", "task0"]
IN_OPENVINO = RuntimeOptions(runtime=OPENVINO, threads=1)


def run(*arguments):
    return CliRunner().invoke(cli, [*map(str, arguments)])


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    """A static int8 engine that was compared with PyTorch in OpenVINO."""
    folder = tmp_path_factory.mktemp("int8") / "engine"
    runs = [checkpoint("sa2vp", number) for number in (0, 1)]
    made = run(
        "export", *runs, "-o", folder, "--precision", "int8", "--quantization", "static", "--runtime", "openvino",
        "--calibration-images", 16,
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "not in int8: backbone.model.blocks.0.mlp.fc2, " in made.output
    return folder


@pytest.mark.parametrize("method", ["sa2vp", "dam-vp"])
def test_an_engine_answers_as_pytorch_does(tmp_path, method):
    report = pt.validate_engine(copied(method, tmp_path), options=IN_OPENVINO, batch_sizes=(1, 3, 8))
    assert not report.failures
    assert report.runtime == f"OpenVINO {ov.__version__.partition('-')[0]}, CPU, fp32"
    assert all(swap.exact for swap in report.swaps)


def test_tasks_are_added_and_replaced_in_an_open_engine(tmp_path):
    sides = [pt.Engine(copied("sa2vp", tmp_path / name), threads=1, runtime=name) for name in (OPENVINO, ONNXRUNTIME)]
    for step in range(2):
        for side in sides:
            side.add_task("new", checkpoint("sa2vp", 2 + step), replace=bool(step))
        found, wanted = (side.logits(noise(5), [*TASKS, "new"]) for side in sides)
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_calls_of_several_threads_do_not_mix():
    engine = pt.Engine(exported("sa2vp"), threads=1, runtime=OPENVINO)
    alone = [engine.logits(noise(4, seed), TASKS) for seed in range(4)]
    wrong = []

    def call(seed):
        wrong.extend(seed for _ in range(20) if not np.array_equal(engine.logits(noise(4, seed), TASKS), alone[seed]))

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --------------------------------------------------------------------------------------------------------- precisions


def test_bf16_runs_on_the_cpu_and_is_compared_with_pytorch(tmp_path):
    runs = [checkpoint("sa2vp", number) for number in (0, 1)]
    folder = pt.export_engine(runs, tmp_path / "engine", format=pt.ExportSettings(precision="bf16"))
    assert folder.manifest.parity["runtime"].endswith("bf16")
    assert not (tmp_path / "engine" / ".cache").exists(), "a proof leaves no compiled model"
    exact = pt.Engine(exported("sa2vp")).logits(noise(4), TASKS)
    found = pt.Engine(folder.path).logits(noise(4), TASKS)
    own = np.isfinite(exact)
    assert 0 < np.abs(found[own] - exact[own]).max() < 0.05 * np.abs(exact[own]).max()


def test_a_cpu_without_bf16_says_so(tmp_path, monkeypatch):
    runs = [checkpoint("linear", 0)]
    folder = pt.export_engine(runs, tmp_path / "engine", format=pt.ExportSettings(precision="bf16")).path
    real = module.ov.Core.get_property
    monkeypatch.setattr(module.ov.Core, "get_property", lambda *names: [one for one in real(*names) if one != "BF16"])
    assert pt.Engine(folder).description.endswith("CPU, bf16 in fp32, as this CPU has no bf16")


def test_static_int8_passes_the_gate_and_runs_where_it_was_proven(int8):
    manifest = EngineFolder(int8).manifest
    assert manifest.parity["runtime"].startswith("OpenVINO")
    assert max(one["max_rel"] for one in manifest.parity["neighbours"]) <= 1e-5
    assert pt.Engine(int8).description.startswith("OpenVINO")
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(int8 / "model.onnx"), load_external_data=False)).graph
    types = {one.name: one.type.tensor_type.elem_type for one in graph.value_info}
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    assert softmaxes
    assert {types[node.output[0]] for node in softmaxes} == {onnx.TensorProto.BFLOAT16}
    assert manifest.details["in_float"] == ["backbone.model.blocks.0.mlp.fc2", "backbone.model.blocks.1.mlp.fc2"]
    with pytest.raises(EngineError, match="has the int8 weights of OpenVINO: give the runtime openvino"):
        pt.Engine(int8, runtime=ONNXRUNTIME)


@pytest.mark.parametrize(("flags", "saturates"), [("avx2 avx512f", True), ("avx2 avx_vnni", False), (None, True)])
def test_sums_of_int8_products_never_saturate(int8, tmp_path, monkeypatch, flags, saturates):
    """x86 without VNNI adds pairs of them in 16 bits, so that an engine proven elsewhere would answer wrongly."""
    monkeypatch.setattr(processor, "_FACTS", tmp_path / "cpuinfo")
    monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"model name\t: a CPU\nflags\t\t: fpu {flags}\n")
    engine = pt.Engine(int8, cache=tmp_path / "cache")
    in_fp32 = "CPU, int8 in fp32, as sums of int8 products saturate on a CPU without VNNI"
    assert engine.description.endswith(in_fp32) == saturates
    if saturates:  # otherwise the real processor would have to be one with VNNI
        exact = pt.Engine(exported("sa2vp")).logits(noise(8), TASKS * 2)
        own = np.isfinite(exact)
        found = engine.logits(noise(8), TASKS * 2)
        assert np.abs(found[own] - exact[own]).max() < 0.05 * np.abs(exact[own]).max()


# -------------------------------------------------------------------------------------------------------------- cache


def test_the_compiled_model_is_kept_beside_the_engine_or_where_it_is_asked_for(tmp_path):
    folder = copied("linear", tmp_path)
    wanted = pt.Engine(folder, runtime=OPENVINO).logits(noise(2), "task0")
    [blob] = (folder / ".cache" / "openvino").glob("*.blob")
    written = blob.stat().st_mtime_ns
    np.testing.assert_array_equal(pt.Engine(folder, runtime=OPENVINO).logits(noise(2), "task0"), wanted)
    assert blob.stat().st_mtime_ns == written
    pt.Engine(folder, runtime=OPENVINO, cache=tmp_path / "kept")
    assert len(list((tmp_path / "kept").glob("*.blob"))) == 1
    assert EngineFolder(folder).tasks() == ["task0", "task1"]


@pytest.mark.parametrize("damage", [b"", b"nothing that OpenVINO wrote", None])
def test_a_damaged_cache_is_compiled_anew(tmp_path, damage):
    folder = copied("linear", tmp_path)
    wanted = pt.Engine(folder, runtime=OPENVINO).logits(noise(2), "task0")
    [blob] = (folder / ".cache" / "openvino").glob("*.blob")
    content = blob.read_bytes()
    blob.unlink()
    blob.write_bytes(content[: len(content) // 2] if damage is None else damage)
    np.testing.assert_array_equal(pt.Engine(folder, runtime=OPENVINO).logits(noise(2), "task0"), wanted)


@pytest.mark.parametrize("runtime", [ONNXRUNTIME, OPENVINO])
def test_a_damaged_file_is_reported_and_leaves_no_compiled_model(tmp_path, runtime):
    folder = copied("linear", tmp_path)
    weights = bytearray((folder / "model.onnx.data").read_bytes())
    weights[len(weights) // 2] ^= 1
    (folder / "model.onnx.data").write_bytes(weights)
    shared = tmp_path / "shared"
    pt.Engine(exported("linear"), runtime=OPENVINO, cache=shared)
    [kept] = shared.glob("*.blob")
    for cache in (None, shared) if runtime == OPENVINO else (None,):
        with pytest.raises(EngineError, match=r"model\.onnx\.data is damaged: its sha256 does not match"):
            pt.Engine(folder, runtime=runtime, cache=cache)
    assert not [*folder.rglob("*.blob")]
    assert [*shared.glob("*.blob")] == [kept]
    pt.Engine(folder, runtime=runtime, verify=False)


def test_a_folder_that_cannot_be_written_to_has_no_cache(tmp_path):
    folder = copied("linear", tmp_path)
    (folder / ".cache").write_text("a file in the way")
    assert pt.Engine(folder, runtime=OPENVINO).logits(noise(2), "task0").shape[0] == 2
    assert not remember(folder, EngineFolder(folder).manifest, OPENVINO)


# ------------------------------------------------------------------------------------------------------------- choice


def test_auto_takes_the_quickest_that_this_machine_remembers(tmp_path, monkeypatch):
    folder = copied("linear", tmp_path)
    manifest = EngineFolder(folder).manifest
    assert runtime_of(folder, manifest, RuntimeOptions()) == ONNXRUNTIME
    assert remember(folder, manifest, OPENVINO)
    assert runtime_of(folder, manifest, RuntimeOptions()) == OPENVINO
    assert pt.Engine(folder).description.startswith("OpenVINO")
    assert runtime_of(folder, manifest, RuntimeOptions("cuda")) == ONNXRUNTIME
    monkeypatch.setattr(choice, "has_openvino", lambda: False)
    assert runtime_of(folder, manifest, RuntimeOptions()) == ONNXRUNTIME
    monkeypatch.setattr(processor, "_FACTS", tmp_path / "another machine")
    assert quickest(folder, manifest) is None
    other = dataclasses.replace(manifest, files={})
    assert quickest(folder, other) is None, "another model in the same folder"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}'])
def test_a_damaged_memory_is_none(tmp_path, content):
    folder = copied("linear", tmp_path)
    (folder / ".cache").mkdir()
    (folder / QUICKEST).write_text(content)
    assert quickest(folder, EngineFolder(folder).manifest) is None
    assert remember(folder, EngineFolder(folder).manifest, OPENVINO)
    assert quickest(folder, EngineFolder(folder).manifest) == OPENVINO


def test_bench_compares_the_runtimes_and_remembers_the_quickest(tmp_path):
    folder = copied("linear", tmp_path)
    options = ("--runtimes", "all", "--batch-sizes", 1, "--mix", "one", "--repeats", 3, "--threads", 1, "--json")
    made = run("bench", folder, *options)
    assert made.exit_code == 0, made.output
    report = json.loads(made.output)
    medians = {one["subject"]: one["latency"]["p50_ms"] for one in report["measurements"]}
    best = min((ONNXRUNTIME, OPENVINO), key=medians.__getitem__)
    assert report["quickest"] == f"{best} is the quickest; auto uses it on this machine"
    assert quickest(folder, EngineFolder(folder).manifest) == best


def test_bench_does_not_remember_what_is_not_proven(tmp_path, monkeypatch):
    from prompttune.serve.bench import runtimes

    folder = EngineFolder(copied("linear", tmp_path))
    slow, fast = (
        type("", (), {"subject": name, "latency": type("", (), {"p50_ms": time})})
        for name, time in ((ONNXRUNTIME, 2.0), (OPENVINO, 1.0))
    )

    def remembered(gate=None):
        if gate:
            real = runtimes.validate_engine
            monkeypatch.setattr(runtimes, "validate_engine", lambda *a, **k: real(*a, **k, atol=gate))
        return runtimes.remember_quickest(folder, [slow, fast], RuntimeOptions(threads=1), None)

    assert "auto uses it" in remembered()
    shutil.rmtree(folder.path / ".cache")
    assert "openvino is the quickest, and not remembered, as it differs from PyTorch: " in remembered(gate=1e-12)
    assert quickest(folder.path, folder.manifest) is None
    folder.manifest = dataclasses.replace(folder.manifest, parity=None)
    assert "exported without a comparison" in remembered()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (RuntimeOptions("cuda", runtime=OPENVINO), UsageError, "runs on the cpu alone"),
        (RuntimeOptions(runtime=OPENVINO, provider="tensorrt"), UsageError, "OpenVINO does not support provider"),
        (RuntimeOptions(runtime=OPENVINO, cuda_graph=True), UsageError, "OpenVINO does not support cuda_graph"),
    ],
)
def test_what_it_cannot_do_is_one_line(options, error, message):
    folder = EngineFolder(exported("linear"))
    with pytest.raises(error, match=message) as problem:
        open_runtime(folder.path, folder.manifest, options)
    assert "\n" not in str(problem.value)


def test_other_formats_and_missing_packages_are_one_line(tmp_path, monkeypatch):
    folder = EngineFolder(exported("linear"))
    with pytest.raises(UsageError, match="for ONNX engines alone"):
        open_runtime(folder.path, dataclasses.replace(folder.manifest, format="aoti"), IN_OPENVINO)
    shutil.copytree(folder.path, tmp_path / "engine")
    (tmp_path / "engine" / "model.onnx").write_bytes(b"\x08damaged")
    with pytest.raises(EngineError, match="OpenVINO cannot open") as problem:
        open_runtime(tmp_path / "engine", folder.manifest, IN_OPENVINO)
    assert "\n" not in str(problem.value)
    monkeypatch.setattr(module, "ov", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'prompttune\[openvino\]'"):
        open_runtime(folder.path, folder.manifest, IN_OPENVINO)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--runtime", "openvino", "--device", "cuda"), "runs on the cpu alone"),
        (("--runtime", "openvino", "--precision", "int8"), "give --quantization static"),
        (("--runtime", "onnxruntime", "--precision", "bf16"), "ONNX Runtime runs bf16 on CUDA alone"),
        (("--runtime", "openvino", "--format", "aoti"), "runtime"),
        (("--runtime", "openvino", "--format", "triton"), "Triton opens ONNX files in ONNX Runtime"),
    ],
)
def test_exports_that_make_no_sense_are_refused(tmp_path, arguments, message):
    refused(run("export", checkpoint("linear", 0), "-o", tmp_path / "engine", *arguments), 2, message)


# ------------------------------------------------------------------------------------------------------- its callers


def test_a_worker_and_infer_take_it(tmp_path):
    folder = exported("linear")
    slots = np.ascontiguousarray(noise(4)[None])
    store = Store(WorkerSettings(folder, IN_OPENVINO, rows=2, axes={}, max_batch=4, host_bytes=0), slots)
    assert store.description.startswith("OpenVINO")
    task, version = EngineFolder(folder).load_task("task1")
    key = Key("task1", version)
    store.load(key, folder / "tasks" / "task1")
    found = store.run(0, [[key]] * 3).logits[:, 0, : task.num_classes]
    np.testing.assert_allclose(found, pt.Engine(folder).logits(noise(4)[:3], "task1"), atol=1e-4)

    rows = {}
    for name in (OPENVINO, ONNXRUNTIME):
        made = invoked(
            pictures(tmp_path / "pictures", 3), "--task", "task0", "--runtime", name, "-o", tmp_path / f"{name}.jsonl"
        )
        assert made.exit_code == 0, made.output
        rows[name] = [json.loads(line) for line in Path(tmp_path / f"{name}.jsonl").read_text().splitlines()]
    for found, wanted in zip(*rows.values(), strict=True):
        assert found["label"] == wanted["label"]
        assert found["probability"] == pytest.approx(wanted["probability"], abs=1e-4)
