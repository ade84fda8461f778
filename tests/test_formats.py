"""Every format that runs on this machine through export, serving, tasks added later, and refusals."""

import dataclasses
import functools
import hashlib
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import prompttune as pt
from prompttune.cli.main import cli
from prompttune.errors import EngineError, UsageError
from prompttune.export import FORMATS, EngineFolder, add_task
from prompttune.export.folder import MANIFEST, ONNX_FILE, write_manifest
from prompttune.export.formats import ExportSettings
from prompttune.export.parity.gate import NOISE
from tests import graph_cache
from tests.engines import build_request, checkpoint, copied, exported, model_of, noise, workshop
from tests.tensorrt_rtx import MAGIC, build_engine

KINDS = {
    "fp32": ExportSettings("onnx"),
    "fp16": ExportSettings("onnx", "fp16"),
    "dynamic": ExportSettings("onnx", "int8"),
    "static": ExportSettings("onnx", "int8", quantization="static", calibration_images=16),
    "fused": ExportSettings("onnx", attention="fused"),
    "bank-fp16": ExportSettings("onnx", bank_precision="fp16"),
    "baked": ExportSettings("onnx", baked=True),
    "aoti": ExportSettings("aoti"),
    "aoti-bf16": ExportSettings("aoti", "bf16"),
}
ON_A_GPU = {"trt", "trt-rtx", "torch-trt"}  # test_tensorrt_gpu.py, and test_tensorrt*.py without a GPU
# sa2vp has both pathways. lspt has a recurrence, which only meets something new where values are converted; its other
# precisions and fused attention are in test_graphs.py.
MATRIX = [
    pytest.param(method, kind, id=f"{method}-{kind}", marks=pytest.mark.slow if kind.startswith("aoti") else ())
    for method, kinds in {
        "sa2vp": [kind for kind in KINDS if kind != "aoti-bf16"],  # a compilation takes most of a minute
        "lspt": ["fp16", "static", "aoti-bf16"],
    }.items()
    for kind in kinds
]
every_engine = pytest.mark.parametrize(("method", "kind"), MATRIX)
ROWS = 6


@functools.cache
def engine_of(method, kind):
    """An engine of ``task0`` and ``task1``, proven, with ``task4`` added later unless its tasks are baked in."""
    folder = workshop() / "formats" / method / kind
    runs = [checkpoint(method, number) for number in (0, 1)]
    pt.export_engine(runs, folder, format=KINDS[kind], batch_sizes=(1, 3), images=4)
    engine = pt.Engine(folder)
    if not KINDS[kind].baked:
        engine.add_task("task4", checkpoint(method, 4))
    return engine


def expected(method, number, images):
    with torch.no_grad():
        return model_of(method, number)(torch.from_numpy(images)).logits.numpy()


def close(kind, found, wanted, scale=None):
    """Whether logits are within the rounding of a kind's precision, relative to ``scale``, their own by default."""
    settings = KINDS[kind].resolved()
    loosest = max(NOISE[settings.precision], NOISE[settings.bank_precision])
    allowed = 1e-4 if loosest == NOISE["fp32"] else loosest * (np.abs(wanted).max() if scale is None else scale)
    return np.abs(found - wanted).max() <= allowed


def test_every_format_is_tested():
    """A format that is registered without tests fails here."""
    assert {settings.format for settings in KINDS.values()} | ON_A_GPU == set(FORMATS)
    assert {one.values[1] for one in MATRIX} == set(KINDS)


@every_engine
def test_export_and_addition_are_proven(method, kind):
    engine = engine_of(method, kind)
    report, settings = engine.folder.manifest.parity, KINDS[kind].resolved()
    assert report["passed"]
    assert report["precision"] == max(settings.precision, settings.bank_precision, key=list(NOISE).index)
    assert {one["task"] for one in report["comparisons"]} == {"task0", "task1", "mixed"}
    assert len(report["swaps"]) == 8
    assert all(one["exact"] for one in report["swaps"])
    assert {one["changed"] for one in report["neighbours"]} == {0}
    assert max(one["max_rel"] for one in report["neighbours"]) <= report["max_neighbours"]
    if not settings.baked:
        assert engine.folder.read_task("task4").parity["passed"]


@every_engine
def test_answers_are_pytorchs(method, kind):
    engine, images = engine_of(method, kind), noise(ROWS)
    for task in engine.tasks:
        number = int(task[-1])
        wanted = expected(method, number, images)
        for rows in (1, ROWS):
            found = engine.logits(images[:rows], task)
            assert found.dtype == np.float32
            assert close(kind, found[:, : number + 2], wanted[:rows])
            assert np.isneginf(found[:, number + 2 :]).all()
    assert len(engine.tasks) == (2 if KINDS[kind].baked else 3)


@every_engine
def test_swapping_tasks_leaves_no_trace(method, kind):
    engine, images = engine_of(method, kind), noise(3)
    first = engine.logits(images, "task0")
    other = engine.logits(images, "task1")
    assert not np.array_equal(first[:, :2], other[:, :2])
    assert first.tobytes() == engine.logits(images, "task0").tobytes()


@every_engine
def test_mixed_batch_equals_single_runs(method, kind):
    engine, images = engine_of(method, kind), noise(ROWS)
    tasks = [engine.tasks[row % len(engine.tasks)] for row in range(ROWS)]
    mixed = engine.logits(images, tasks)
    scale = np.abs(mixed[:, :2]).max()  # two classes are what every task has
    for row, task in enumerate(tasks):
        classes = int(task[-1]) + 2
        # The same row of a batch of the same size in which every row asks this task.
        same = engine.logits(images, task)[row, :classes]
        alone = engine.logits(images[row : row + 1], task)[0, :classes]
        # One row's logits may all be small; rounding is of the size of the task's others.
        assert close(kind, mixed[row, :classes], alone, scale)
        assert mixed[row, :classes].tobytes() == same.tobytes()
        assert np.isneginf(mixed[row, classes:]).all()
        if NOISE[KINDS[kind].precision] == NOISE["fp32"]:
            assert np.abs(mixed[row, :classes] - alone).max() <= 1e-5


@every_engine
def test_several_tasks_of_an_image_equal_single_runs(method, kind):
    engine, images = engine_of(method, kind), noise(4)
    names = [engine.tasks[-1], engine.tasks[0], engine.tasks[1], engine.tasks[0]]
    several = engine.logits(images, [names])
    for place, name in enumerate(names):
        single = engine.logits(images, name)
        assert np.abs(several[:, place, : single.shape[1]] - single).max() <= 1e-5 * np.abs(several[..., :2]).max()
        assert np.isneginf(several[:, place, int(name[-1]) + 2 :]).all()


@every_engine
def test_manifest_keeps_the_settings(method, kind):
    folder = engine_of(method, kind).folder
    manifest, settings = EngineFolder(folder.path).manifest, KINDS[kind].resolved()
    for name in ("format", "precision", "bank_precision", "attention", "quantization"):
        assert getattr(manifest, name) == getattr(settings, name)
    assert manifest.baked == (("task0", "task1") if settings.baked else None)
    assert (manifest.opset is None) == (settings.format == "aoti")
    assert manifest.opset in (None, 23 if settings.attention == "fused" else 20)
    assert set(manifest.files) == ({"model.pt2"} if settings.format == "aoti" else {ONNX_FILE, f"{ONNX_FILE}.data"})
    dtypes = {spec.dtype for spec in manifest.inputs} - {"int64"}
    rows = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[settings.bank_precision]
    assert dtypes == {"float32"} | (set() if settings.baked else {rows})
    if settings.format == "aoti":
        assert manifest.details == {"device": "cpu", "cpu": torch.backends.cpu.get_cpu_capability()}
    elif settings.format == "onnx":
        assert "features" in manifest.details["probes"]


@pytest.mark.parametrize("kind", ["bank-fp16", "baked"])  # the others are in test_graphs.py and test_export_matrix.py
def test_nvidias_builder_takes_the_graph(kind, tmp_path):
    build_engine(engine_of("sa2vp", kind).folder.path, tmp_path / "plan")
    assert (tmp_path / "plan").read_bytes().startswith(MAGIC)


def test_smaller_precisions_make_smaller_files():
    sizes = {
        kind: sum(file.size for file in engine_of("sa2vp", kind).folder.manifest.files.values())
        for kind in ("fp32", "fp16", "dynamic", "static")
    }
    assert sizes["fp16"] < 0.75 * sizes["fp32"]
    assert sizes["dynamic"] < 0.75 * sizes["fp32"]
    assert sizes["static"] < 0.75 * sizes["fp32"]


def one_line(result, code, message):
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1 or result.stderr.startswith("Usage:")


def run(*arguments):
    return CliRunner().invoke(cli, [str(one) for one in arguments])


# ------------------------------------------------------------------------------------------------------ baked in


def test_baked_tasks_neither_come_nor_go():
    engine, run_folder = engine_of("sa2vp", "baked"), checkpoint("sa2vp", 2)
    folder = engine.folder.path
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for refused in (
        lambda: engine.add_task("late", run_folder),
        lambda: engine.add_task("task0", run_folder, replace=True, save=False),
        lambda: engine.remove_task("task0"),
        lambda: add_task(folder, "late", run_folder),
        lambda: EngineFolder(folder, verify=False).remove_task("task0"),
    ):
        with pytest.raises(UsageError, match="baked into its model: export it again with the tasks that you want") as e:
            refused()
        assert "\n" not in str(e.value)
    one_line(run("tasks", "add", folder, run_folder), 2, "are baked into its model")
    one_line(run("tasks", "remove", folder, "task0"), 2, "are baked into its model")
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert [spec.name for spec in engine.folder.manifest.inputs] == ["image", "task_index"]
    assert engine.logits(noise(2), ["task1", "task0"]).shape == (2, 3)


def test_baked_rows_follow_the_order_of_the_export(tmp_path):
    runs = {"zebra": checkpoint("linear", 0), "ant": checkpoint("linear", 1)}
    pt.export_engine(runs, tmp_path / "engine", format=ExportSettings(baked=True), parity=False)
    engine = pt.Engine(tmp_path / "engine")
    assert engine.folder.manifest.baked == ("zebra", "ant")
    images = noise(2)
    found = engine.logits(images, ["ant", "zebra"])
    assert np.abs(found[0] - expected("linear", 1, images)[0]).max() <= 1e-4
    assert np.abs(found[1, :2] - expected("linear", 0, images)[1]).max() <= 1e-4


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ExportSettings("tflite"), r"unknown format 'tflite'; known: onnx, aoti"),
        (ExportSettings("onnx", "fp8"), "unknown precision 'fp8'"),
        (ExportSettings("aoti", "int8"), "the format aoti has no int8: choose fp32, fp16, bf16"),
        (ExportSettings("onnx", bank_precision="int8"), "unknown bank precision 'int8'"),
        (ExportSettings("onnx", attention="flash"), "unknown attention 'flash'"),
        (ExportSettings("onnx", quantization="static"), "quantization needs the precision int8"),
        (ExportSettings("onnx", "int8", quantization="both"), "unknown quantization 'both'"),
        (ExportSettings("onnx", calibration_images=0), "calibration_images must be at least 1, not 0"),
        (ExportSettings("onnx", axes={"batch": (1, 4, 8)}), "the format onnx needs no sizes of axes"),
        (ExportSettings("onnx", axes={"batch": (4, 1, 8)}), "sizes of the axis batch must rise from 1"),
        (ExportSettings("onnx", axes={"batch": 8}), "sizes of the axis batch must be a list such as 1, 8, 64, not 8"),
        (
            ExportSettings("onnx", axes={"batch": ("1", "4", "8")}),
            "must be a list such as 1, 8, 64, not",
        ),
        (ExportSettings("onnx", axes=8), "axes must be sizes by axis, such as batch=1:8:64, not 8"),
        (ExportSettings("onnx", options={"workspace": 1}), "unknown option of the format onnx 'workspace'"),
        (ExportSettings("aoti", axes={"batch": (1, 4, 8)}), "the format aoti needs no sizes of axes"),
        (ExportSettings("aoti", options={"workspace": 1}), "has no options of its own"),
        (ExportSettings("onnx", device="tpu"), "unknown device 'tpu'"),
        (
            ExportSettings("onnx", "bf16", options={"runtime": "onnxruntime"}),
            "ONNX Runtime runs bf16 on CUDA alone",
        ),
        (
            ExportSettings("onnx", bank_precision="bf16", options={"runtime": "onnxruntime"}),
            "ONNX Runtime runs bf16 on CUDA alone",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, settings, message):
    with pytest.raises(UsageError, match=message) as problem:
        pt.export_engine(tmp_path / "no checkpoint is looked at", tmp_path / "engine", format=settings)
    assert "\n" not in str(problem.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "aoti", "--precision", "int8"], "has no int8"),
        (["--precision", "fp8"], "'fp8' is not one of"),
        (["--quantization", "static"], "quantization needs the precision int8"),
        (["--axis", "batch=1:8:64"], "the format onnx needs no sizes of axes"),
        (["--axis", "batch=1:8"], "'batch=1:8' is not like batch=1:8:64"),
        (["--axis", "batch=1:x:8"], "'batch=1:x:8' is not like batch=1:8:64"),
        (["--axis", "batch=1:²:8"], "'batch=1:²:8' is not like batch=1:8:64"),
        (["--axis", "batch=4:1:8"], "sizes of the axis batch must rise from 1"),
        (["--axis", "rows=1:2:8"], "axes: batch, asked, tasks, rank, classes, chosen, width, clusters"),
        (["--workspace", "5"], "unknown option of the format onnx 'workspace'"),
        (["--precision", "bf16", "--runtime", "onnxruntime"], "runs bf16 on CUDA alone"),
        (["--device", "cuda:x"], "unknown device 'cuda:x'"),
    ],
)
def test_the_command_refuses_with_exit_code_2(tmp_path, arguments, message):
    one_line(run("export", checkpoint("linear", 0), "-o", tmp_path / "engine", *arguments), 2, message)
    assert not list(tmp_path.iterdir())


def test_bf16_is_exported_without_proof_and_not_opened_by_onnx_runtime_on_the_cpu(tmp_path):
    folder = tmp_path / "engine"
    made = run("export", checkpoint("linear", 0), "-o", folder, "--precision", "bf16", "--no-parity")
    assert made.exit_code == 0, made.output
    manifest = EngineFolder(folder).manifest
    assert (manifest.precision, manifest.bank_precision, manifest.parity) == ("bf16", "bf16", None)
    with pytest.raises(EngineError, match="bf16 on CUDA alone: open the engine on cuda, give the runtime openvino"):
        pt.Engine(folder, runtime="onnxruntime")
    one_line(run("validate", folder, "--runtime", "onnxruntime"), 1, "bf16 on CUDA alone")


def test_aoti_without_a_compiler_or_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one_line(
        run("export", checkpoint("linear", 0), "-o", tmp_path / "engine", "--format", "aoti", "--device", "cuda"),
        1,
        "compiling for cuda needs a CUDA device and PyTorch finds none here: use a GPU host, or export with --format",
    )

    def find_none():
        raise RuntimeError("a page\nof advice")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", find_none)
    one_line(
        run("export", checkpoint("linear", 0), "-o", tmp_path / "engine", "--format", "aoti"),
        1,
        "AOTInductor needs a C++ compiler and finds none: install g++, or export with --format onnx",
    )
    assert not list(tmp_path.iterdir())


def claimed(folder, **changes):
    """A copy of an engine whose manifest says something else."""
    engine = copied("linear", folder)
    manifest = dataclasses.replace(EngineFolder(engine).manifest, format="aoti", **changes)
    (engine / MANIFEST).unlink()
    write_manifest(engine, manifest)
    return engine


@pytest.mark.parametrize(
    ("details", "here", "device", "message"),
    [
        ({"device": "cuda", "compute_capability": "9.0", "gpu": "a GPU"}, "AVX2", "cpu", "was compiled for cuda, not"),
        ({"device": "cpu", "cpu": "AVX2"}, "AVX2", "cuda", "was compiled for cpu, not for cuda: .* --device cuda"),
        ({"device": "cpu", "cpu": "AVX512"}, "AVX2", "cpu", "a CPU with AVX512, this one has AVX2: export it again"),
        ({"device": "cpu", "cpu": "AVX2"}, "NEON", "cpu", "a CPU with AVX2, this one has NEON"),
        ({"device": "cpu", "cpu": "AVX2"}, "AVX512", "cpu", r"PyTorch cannot open .*model\.pt2"),
        (
            {"device": "cuda", "compute_capability": "9.0", "gpu": "a GPU"},
            "AVX2",
            "cuda",
            "cuda needs a CUDA device and",
        ),
    ],
)
def test_aoti_packages_open_where_they_were_made_for(tmp_path, monkeypatch, details, here, device, message):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match=message) as problem:
        pt.Engine(claimed(tmp_path, details=details), device=device)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("option", [{"cuda_graph": True}, {"provider": "tensorrt"}, {"cache": "x"}])
def test_runtime_options_without_a_meaning_are_refused(tmp_path, option):
    with pytest.raises(UsageError, match=f"the format aoti does not support {next(iter(option))}: leave it out"):
        pt.Engine(claimed(tmp_path, details={"device": "cpu", "cpu": "DEFAULT"}), **option)
    with pytest.raises(UsageError, match="belong to a GPU: give the device cuda"):
        pt.Engine(exported("linear"), **option)


def test_a_failed_compilation_is_one_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        print("a compiler's log")
        raise RuntimeError("C++ compile error\nand two pages")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fail)
    one_line(
        run("export", checkpoint("linear", 0), "-o", tmp_path / "engine", "--format", "aoti"),
        1,
        "AOTInductor failed: C++ compile error",
    )
    assert not list(tmp_path.iterdir())


def test_a_graph_that_cannot_be_quantised_is_one_line(tmp_path, monkeypatch):
    from prompttune.export.formats import onnx_int8 as quantise

    def fail(*_, **__):
        raise ValueError("no such thing\nas this")

    monkeypatch.setattr(quantise, "quantize_static", fail)
    settings = ExportSettings("onnx", "int8", quantization="static")
    with pytest.raises(EngineError, match=r"^the graph cannot be quantised: no such thing$"):
        pt.export_engine([checkpoint("linear", 0)], tmp_path / "engine", format=settings, parity=False)
    assert not list(tmp_path.iterdir())


def test_calibration_shows_every_task_its_own_images():
    """Static scales come from each task's images under that task, in batches, as many as were asked for in all."""
    from prompttune.export.formats import onnx_int8 as quantise

    asked = []
    settings = ExportSettings("onnx", "int8", quantization="static", calibration_images=20)
    request = build_request("linear", settings)
    images = {"task0": noise(10, 1), "task1": noise(10, 2)}
    request = dataclasses.replace(request, images=lambda task, count: (asked.append((task, count)), images[task])[1])
    feeds = list(quantise._feeds(request))
    assert asked == [("task0", 10), ("task1", 10)]
    assert [len(one["image"]) for one in feeds] == [8, 2, 8, 2]
    assert [set(one["task_index"].ravel().tolist()) for one in feeds] == [{0}, {0}, {1}, {1}]
    assert [one["task_index"].shape for one in feeds] == [(8, 1), (2, 1), (8, 1), (2, 1)]
    chosen = [one["class_rows"][one["class_index"]].reshape(-1, one["class_index"].shape[-1]) for one in feeds]
    assert [one[:, :2].min() for one in chosen] == [1, 1, 3, 3]
    assert np.array_equal(np.concatenate([one["image"] for one in feeds[2:]]), images["task1"])
    assert len(feeds[0]["bank.head.weight"]) == 1 + 2 + 3


def test_an_unknown_format_in_the_folder_is_named(tmp_path):
    folder = shutil.copytree(exported("linear"), tmp_path / "engine")
    manifest = dataclasses.replace(EngineFolder(folder).manifest, format="tflite")
    (folder / MANIFEST).unlink()
    write_manifest(folder, manifest)
    with pytest.raises(EngineError, match=r"has the format 'tflite'; known: onnx, aoti"):
        pt.Engine(folder)


def test_graphs_are_kept_by_all_that_is_traced(monkeypatch):
    request = build_request("linear", ExportSettings("onnx"))
    key = graph_cache._key(request)
    assert graph_cache._key(build_request("linear", ExportSettings("onnx"))) == key
    monkeypatch.setattr(request.model.backbone.blocks[0].timm.attn, "num_heads", 1)
    assert graph_cache._key(request) not in (None, key)
    monkeypatch.setattr(type(request.model.task_type), "__module__", "elsewhere")
    assert graph_cache._key(request) is None


def test_an_engine_of_a_removed_format_says_what_to_do(tmp_path):
    folder = shutil.copytree(exported("linear"), tmp_path / "engine")
    manifest = dataclasses.replace(EngineFolder(folder).manifest, format="onnx-adapter")
    (folder / MANIFEST).unlink()
    write_manifest(folder, manifest)
    message = f"{folder} has the removed format onnx-adapter: export it again with --format onnx"
    with pytest.raises(EngineError) as problem:
        pt.Engine(folder)
    assert str(problem.value) == message
    one_line(run("tasks", "add", folder, checkpoint("linear", 1)), 1, message)
    one_line(run("export", folder, "-o", tmp_path / "x", "--format", "onnx-adapter"), 2, "is not one of")


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ON_A_GPU])
def test_formats_name_themselves(name):
    assert FORMATS[name]().name == name


def linked(engine, folder):
    """``engine`` as the hub's cache holds it: links to files that are called after their digests."""
    (folder / "blobs").mkdir()
    for file in [path for path in engine.rglob("*") if path.is_file()]:
        blob, link = folder / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest(), folder / "snapshot"
        shutil.copy(file, blob)
        link = link / file.relative_to(engine)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return folder / "snapshot"


def test_an_engine_of_symbolic_links_opens(tmp_path):
    plain, images = exported("linear"), noise(2)
    folder = linked(plain, tmp_path)
    assert np.array_equal(pt.Engine(folder).logits(images, "task1"), pt.Engine(plain).logits(images, "task1"))
    assert pt.validate_engine(folder, images=2, debug=True).passed
    (folder / ONNX_FILE).unlink()
    shutil.copy(plain / ONNX_FILE, folder)  # the weights alone are a link
    assert np.array_equal(pt.Engine(folder).logits(images, "task1"), pt.Engine(plain).logits(images, "task1"))
