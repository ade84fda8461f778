"""Benchmarks: that they measure what they say, never how fast anything is."""

import contextlib
import csv
import dataclasses
import importlib
import json
import math
import platform
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import prompttune as pt
from benchmarks.__main__ import SUITE
from benchmarks.engines import draw_task
from benchmarks.residency import check_answers
from prompttune.cli.main import cli
from prompttune.errors import EngineError, UsageError
from prompttune.export import EngineFolder, ExportSettings
from prompttune.export.formats import tensorrt
from prompttune.export.runtimes import RuntimeOptions, open_runtime, processor
from prompttune.export.tasks import engine_backbone
from prompttune.serve.bench import BenchSettings, Latency, Ratio, Rounds, bench_engine, interleaved, machine
from prompttune.serve.bench.plain import export_plain, plain_settings
from prompttune.serve.bench.subjects import assignments, engine_subject, torch_subject
from prompttune.serve.bench.task_costs import ADDED_CHECKPOINTS, measure_adding
from tests.engines import backbone, checkpoint, copied, exported, noise
from tests.fake_tensorrt import VERSION, fake_tensorrt, install
from tests.test_cli_export import refused

QUICK = Rounds(warmup=1, repeats=3)
OPTIONS = RuntimeOptions("cpu", 1)


def run(*arguments):
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def report():
    settings = BenchSettings(
        against=("backbone", "torch", str(exported("linear"))),
        batch_sizes=(1, 3),
        rounds=QUICK,
        tasks_per_image=(1, 2),
        checkpoint=checkpoint("sa2vp", 4),
    )
    return bench_engine(exported("sa2vp"), settings, RuntimeOptions(threads=1))


# ------------------------------------------------------------------------------------------------------------ timing


def test_runs_are_called_in_turn_warm_up_first():
    called = []
    runs = {name: lambda name=name: called.append(name) for name in "abc"}
    seconds = interleaved(runs, Rounds(warmup=2, repeats=4))
    assert called == list("abc") * 6
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_seconds_bound_the_rounds(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("prompttune.serve.bench.timing.time.perf_counter", lambda: float(next(clock)))
    # A clock that moves one second a look: start, then look, twice a run, look.
    long = interleaved({"a": lambda: None}, Rounds(warmup=0, seconds=20))["a"]
    short = interleaved({"a": lambda: None}, Rounds(warmup=0, seconds=0.1))["a"]
    assert len(short) == 3
    assert 3 < len(long) < 20
    assert set(long) == {1.0}


def test_device_is_waited_for_on_both_sides_of_a_run():
    order = []
    interleaved({"a": lambda: order.append("run")}, Rounds(warmup=0, repeats=1), lambda: order.append("wait"))
    assert order == ["wait", "run", "wait"]


def test_latency_and_ratio():
    latency = Latency.of([0.001 * value for value in range(1, 102)])
    assert (latency.rounds, latency.p50_ms, latency.p90_ms, latency.p99_ms) == pytest.approx((101, 51, 91, 100))
    assert latency.mean_ms == pytest.approx(51)
    assert latency.per(8) == pytest.approx(8 / 0.051)
    # The median of the rounds' ratios, not the ratio of the medians, which is 2 / 3 here.
    assert Ratio.of([1, 2, 9], [1, 4, 3]).median == 1
    assert Ratio.of([1, 2, 3, 4, 5], [1] * 5) == Ratio(3, 2, 4)
    with pytest.raises(ValueError, match="cannot be paired"):
        Ratio.of([1, 2], [1])


def test_rows_go_round_the_tasks():
    assert assignments(["a", "b", "c"], 2, "one") == [["a", "a"]]
    assert assignments(["a", "b", "c"], 2, "all") == [["a", "b"], ["c", "a"], ["b", "c"]]
    assert assignments(["a", "b"], 4, "all") == [["a", "b", "a", "b"]]
    assert assignments([], 4, "all") == [[]]


GROWING = """
import mmap
from prompttune.serve.bench.memory import memory_growth

mebi = 2**20
with memory_growth() as growth:
    # Pages of their own: an allocator might give out memory again that was resident before.
    with mmap.mmap(-1, 64 * mebi) as passing:
        passing.write(b"1" * len(passing))
    kept = mmap.mmap(-1, 32 * mebi)
    kept.write(b"1" * len(kept))
print(growth.resident is not None and 24 * mebi < growth.resident < 48 * mebi)
print(growth.peak is None or 56 * mebi < growth.peak < 160 * mebi, growth.device)
"""


def test_memory_growth_sees_memory_come_and_go():
    """In a process of its own: the threads of other tests allocate too."""
    ended = subprocess.run([sys.executable, "-c", GROWING], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["True", "True", "None"]


# ------------------------------------------------------------------------------------------------------------ report


def test_threads_are_told_to_engines_on_a_cpu_alone(monkeypatch):
    """TensorRT's runtimes refuse a number of threads, so no engine of theirs could be measured."""
    told = []

    def opened(name, engine, options, tasks):
        told.append(options.threads)
        raise EngineError("seen")

    monkeypatch.setattr("prompttune.serve.bench.run.engine_subject", opened)
    for device in ("cpu", "cuda", "cuda:1"):
        with pytest.raises(EngineError, match="seen"):
            bench_engine(exported("linear"), options=RuntimeOptions(device))
    assert told == [torch.get_num_threads(), None, None]


def test_report_holds_every_subject_batch_size_and_mix(report):
    names = ["engine", "backbone", "torch", "linear/engine"]
    assert [one.name for one in report.subjects] == names
    found = {(one.subject, one.batch_size, one.mix): one for one in report.measurements}
    assert set(found) == {(name, size, mix) for name in names for size in (1, 3) for mix in ("one", "all")}
    assert len(report.measurements) == len(found)
    for (name, size, mix), one in found.items():
        assert one.latency.rounds == 3
        assert 0 < one.latency.p50_ms <= one.latency.p90_ms <= one.latency.p99_ms
        assert one.images_per_s == pytest.approx(size / one.latency.p50_ms * 1000)
        assert one.tasks == (0 if name == "backbone" else 1 if mix == "one" else 2)
        assert (one.engine_over is None) == (name == "engine")
    assert [(one.batch_size, one.tasks) for one in report.mixing] == [(1, 2), (3, 2)]
    assert [(one.batch_size, one.tasks) for one in report.fan_out] == [(1, 1), (1, 2), (3, 1), (3, 2)]
    for one in report.fan_out:
        assert one.latency.rounds == 3
        assert one.over_one.median > 0
        assert one.over_backbone.median > 0
    assert (report.resident_tasks, report.threads, report.repeats, report.seconds) == (2, 1, 3, None)
    assert all(one.load_s > 0 for one in report.subjects)


def test_task_costs(report):
    engine = pt.Engine(exported("sa2vp"))
    widest = 3  # classes of task1
    row = sum(rows[0].nbytes * (widest if key.startswith("head.") else 1) for key, rows in engine.bank._rows.items())
    assert report.bytes_per_task == engine.bank.row_bytes == row
    assert report.switching.tasks == ("task0", "task1")
    assert report.switching.same.rounds == report.switching.alternating.rounds == 3
    assert report.adding.state.rounds == 3
    assert report.adding.checkpoint.rounds == ADDED_CHECKPOINTS
    assert report.adding.first_checkpoint_s > 0
    assert EngineFolder(exported("sa2vp")).tasks() == ["task0", "task1"]  # nothing was written


def test_report_is_plain_values(report):
    values = json.loads(json.dumps(report.to_dict()))
    assert values["measurements"][0]["latency"]["rounds"] == 3
    assert values["versions"]["onnxruntime"]
    rows = list(report.rows())
    assert len(rows) == len(report.measurements)
    assert rows[0].keys() == rows[-1].keys()
    assert rows[0]["engine_over"] == ""
    assert float(rows[1]["engine_over"]) > 0


def test_half_a_bank_takes_half_the_bytes(tmp_path):
    pt.export_engine(
        {"task0": checkpoint("sa2vp", 0)}, tmp_path / "half", format=ExportSettings(bank_precision="fp16"), parity=False
    )
    pt.export_engine({"task0": checkpoint("sa2vp", 0)}, tmp_path / "full", parity=False)
    half, full = (pt.Engine(tmp_path / name).bank.row_bytes for name in ("half", "full"))
    assert 2 * half == full


def test_tasks_in_the_model_cannot_be_added(tmp_path):
    settings, baked = ExportSettings(baked=True), tmp_path / "baked"
    pt.export_engine([checkpoint("linear", number) for number in (0, 1)], baked, format=settings, parity=False)
    report = bench_engine(baked, BenchSettings(batch_sizes=(1,), rounds=QUICK), RuntimeOptions(threads=1))
    assert (report.adding, report.bytes_per_task, report.resident_tasks) == (None, 0, 2)
    assert report.switching.tasks == ("task0", "task1")
    with pytest.raises(UsageError, match="as constants"):
        measure_adding(pt.Engine(baked), QUICK, checkpoint("linear", 1))


def test_limit_of_tasks_and_no_task_costs():
    report = bench_engine(exported("linear"), BenchSettings(batch_sizes=(2,), tasks=1, rounds=QUICK, task_costs=False))
    assert {one.tasks for one in report.measurements} == {1}
    assert (report.switching, report.adding) == (None, None)


def test_progress_rises_to_the_end():
    told = []
    bench_engine(exported("linear"), BenchSettings(batch_sizes=(1,), rounds=QUICK), None, lambda *one: told.append(one))
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert (shares[0], told[-1]) == (0.0, ("done", 1.0))


def test_bad_values_are_refused(tmp_path):
    engine = exported("linear")
    for arguments, message in (
        ({"against": ("torch", "torch")}, "given twice"),
        ({"against": ("engine",)}, "nothing to compare with"),
        ({"against": (str(tmp_path / "none"),)}, "nothing to compare with"),
        ({"mix": ("some",)}, "unknown mix 'some'"),
        ({"mix": ()}, "at least one mix"),
        ({"batch_sizes": (0,)}, "batch sizes"),
        ({"tasks": 0}, "at least 1"),
        ({"tasks_per_image": (3,)}, "3 tasks for an image are more than the engine's 2"),
        ({"tasks_per_image": (2,), "mix": ("all",)}, "let the mix have one"),
    ):
        with pytest.raises(UsageError, match=message):
            bench_engine(engine, BenchSettings(rounds=QUICK, **arguments))
    with pytest.raises(UsageError, match="above 0"):
        Rounds(seconds=math.nan)
    with pytest.raises(EngineError, match="no engine manifest"):
        bench_engine(engine, BenchSettings(against=(str(tmp_path),), rounds=QUICK))
    empty = copied("linear", tmp_path)
    for name in EngineFolder(empty).tasks():
        EngineFolder(empty).remove_task(name)
    with pytest.raises(UsageError, match="no tasks to measure"):
        bench_engine(empty, BenchSettings(rounds=QUICK))


# ---------------------------------------------------------------------------------------------------------- subjects


@pytest.mark.parametrize(
    ("precision", "quantization", "name"),
    [(*case, "test_vit") for case in (("fp32", None), ("fp16", None), ("int8", "dynamic"), ("int8", "static"))]
    + [("fp16", None, "test_eva2")],
)
def test_plain_backbone_gives_the_pooled_features(precision, quantization, name, tmp_path):
    manifest = EngineFolder(exported("linear", name)).manifest
    frozen = engine_backbone(manifest)
    quantised = dataclasses.replace(manifest, precision=precision, quantization=quantization)
    settings = plain_settings(quantised)
    assert settings.quantization == quantization
    made = export_plain(manifest, frozen, settings, tmp_path)
    plain = open_runtime(tmp_path, made, OPTIONS)
    images = noise(3)
    wanted = frozen.model(torch.from_numpy(images)).detach().numpy()
    found = plain.logits(images, {"task_index": np.zeros((3, 1), np.int64)}, {})
    assert found.shape == (3, 1, frozen.width)
    found = found[:, 0]
    assert np.abs(found - wanted).max() <= {"fp32": 1e-4, "fp16": 0.01, "int8": 0.2}[precision] * np.abs(wanted).max()
    one = {"task_index": np.zeros((1, 1), np.int64)}
    assert plain.logits(images[:1], one, {}).shape == (1, 1, frozen.width)
    assert (made.format, made.precision) == ("onnx", precision)
    assert plain_settings(manifest).precision == "fp32"


def test_plain_backbone_is_built_as_a_tensorrt_engine_was(monkeypatch, tmp_path):
    """Its own device, range of the batch, options and kind of int8: a plan has no other axes and no dynamic scales."""
    monkeypatch.setattr(tensorrt, "require_cuda", lambda *_: 0)
    monkeypatch.setattr(tensorrt, "gpu_record", lambda _: {"gpu": "a GPU", "compute_capability": "9.0"})
    cuda = types.SimpleNamespace(device=lambda _: contextlib.nullcontext(), is_available=lambda: False)
    monkeypatch.setattr(tensorrt, "torch", types.SimpleNamespace(cuda=cuda))
    fake = install(monkeypatch, fake_tensorrt())
    options = {"version_compatible": False, "hardware_compatibility": "ampere_plus", "optimization_level": 1}
    details = {"profile": {"batch": [1, 2, 4], "tasks": [1, 2, 64]}, "tensorrt": VERSION, **options}
    changes = {"format": "trt", "precision": "int8", "quantization": "static", "details": details}
    manifest = dataclasses.replace(EngineFolder(exported("linear")).manifest, **changes)
    settings = plain_settings(manifest, "cuda:1")
    assert (settings.device, dict(settings.axes)) == ("cuda:1", {"batch": (1, 2, 4)})
    made = export_plain(manifest, engine_backbone(manifest), settings, tmp_path)
    assert (made.format, made.quantization) == ("trt", "static")
    assert made.details["profile"] == {"batch": [1, 2, 4], "asked": [1, 1, 32]}
    assert {name: made.details[name] for name in options} == options
    (profile,) = fake.configs[-1].profiles
    assert profile == {
        "image": tuple((rows, 3, 64, 64) for rows in (1, 2, 4)),
        "task_index": ((1, 1), (2, 1), (4, 32)),
    }
    assert fake.configs[-1].builder_optimization_level == 1


def test_plain_backbones_options_follow_the_format():
    manifest = EngineFolder(exported("linear")).manifest
    details = {"profile": {"batch": [1, 8, 32]}, "optimization_level": 3, "hardware_compatibility": "ampere_plus"}
    for name, capability, options in (
        ("torch-trt", "9.0", {"hardware_compatibility": "ampere_plus"}),
        ("trt-rtx", "", {}),
        ("trt-rtx", "8.9, 12.0", {"compute_capability": ["8.9", "12.0"]}),
    ):
        made = {**details, "compute_capability": capability}
        engine = dataclasses.replace(manifest, format=name, precision="fp16", details=made)
        settings = plain_settings(engine, "cuda")
        assert (settings.device, settings.quantization, settings.options) == ("cuda", None, options)
        assert settings.axes == {"batch": (1, 8, 32)}


def test_exporting_the_plain_backbone_leaves_it_as_it_was(tmp_path):
    manifest, frozen = EngineFolder(exported("linear")).manifest, backbone()
    before = [block.timm.attn.fused_attn for block in frozen.blocks]
    export_plain(manifest, frozen, ExportSettings(precision="fp16", attention="explicit"), tmp_path)
    assert [block.timm.attn.fused_attn for block in frozen.blocks] == before
    assert {str(one.dtype) for one in frozen.parameters()} == {"torch.float32"}


@pytest.mark.parametrize("mix", ["one", "all"])
def test_pytorch_does_the_same_work_as_the_engine(mix):
    folder, images = EngineFolder(exported("sa2vp")), noise(3)
    rows = assignments(folder.tasks(), 3, mix)
    answers = []
    for subject in (
        engine_subject("engine", folder.path, OPTIONS),
        torch_subject(folder, OPTIONS, None),
    ):
        call = subject.prepare()().call(images, rows)
        answers.append([call() for _ in range(len(rows) + 1)])
    for found, wanted in zip(*answers, strict=True):
        asked = found.shape[1]  # the engine's answers are as wide as the widest task of the call
        assert np.isneginf(wanted[:, asked:]).all()
        wanted = wanted[:, :asked]
        real = np.isfinite(found)
        assert (real == np.isfinite(wanted)).all()
        assert np.abs(found[real] - wanted[real]).max() <= 1e-4


# ----------------------------------------------------------------------------------------------------------- command


def test_command_prints_tables_and_writes_files(tmp_path):
    table = tmp_path / "made" / "bench.csv"
    result = run(
        exported("sa2vp"), "--against", "backbone", "--batch-sizes", "1,2", "--warmup", 0, "--repeats", 2,
        "--threads", 1, "--csv", table,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for words in ("engine takes", "a resident task takes", "switching tasks", "adding a folded task", "2 rounds"):
        assert words in result.stdout
    rows = list(csv.DictReader(table.open()))
    assert {(row["subject"], row["batch"], row["mix"]) for row in rows} == {
        (subject, size, mix) for subject in ("engine", "backbone") for size in "12" for mix in ("one", "all")
    }
    assert all(row["hardware"] and row["onnxruntime"] and row["command"].startswith("prompttune") for row in rows)


def test_a_figure_names_the_instruction_sets(tmp_path, monkeypatch):
    """Processors of one name differ by the factor that bf16 products make."""
    core = "model name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f avx512_bf16 sha_ni\nbugs\t\t:\n\n"
    (tmp_path / "cpuinfo").write_text(core * 2)
    monkeypatch.setattr(processor, "_FACTS", tmp_path / "cpuinfo")
    assert machine.hardware_name() == "AMD EPYC avx512_bf16 avx512f avx2 x2"
    (tmp_path / "cpuinfo").write_text("Features\t: fp asimd\n")
    assert machine.hardware_name() == platform.processor()


def test_command_prints_json():
    result = run(exported("linear"), "--json", "--seconds", 0.05, "--batch-sizes", 1, "--mix", "one", "--threads", 1)
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert (values["repeats"], values["seconds"]) == (None, 0.05)
    assert [one["mix"] for one in values["measurements"]] == ["one"]


def test_command_refuses_in_one_line(tmp_path):
    engine = exported("linear")
    refused(run(engine, "--seconds", 1, "--repeats", 5), 2, "either --repeats or --seconds")
    refused(run(engine, "--mix", "one,two"), 2, "unknown mix 'two'")
    refused(run(engine, "--batch-sizes", "1,x"), 2, "batch sizes")
    refused(run(engine, "--against", "nothing"), 2, "nothing to compare with at 'nothing'")
    refused(run(engine, "--device", "tpu"), 2, "unknown device")
    refused(run(tmp_path), 1, "no engine manifest")
    refused(run(engine, "--add", tmp_path / "none"), 1, "no checkpoint folder")


# ------------------------------------------------------------------------------------------------------------- suite

TINY = ["--backbone", "test_vit", "--image-size", "64", "--rounds", "1", "--threads", "1"]
ARGUMENTS = {
    "forward": [*TINY, "--batch", "1", "--method", "linear"],
    "training_step": [*TINY, "--batch", "1"],
    "attention": ["--side", "3", "--rounds", "1", "--threads", "1"],
    "high_resolution": ["--image-size", "64", "--image-size", "128", "--heads", "2", "--rounds", "1", "--threads", "1"],
    "onnx_methods": [*TINY, "--method", "sa2vp", "--tasks", "2", "--batch", "1"],
    "mixing": [*TINY, "--method", "vpt-deep", "--tasks", "3"],
    "int8": [*TINY, "--tasks", "2", "--images", "4", "--quantization", "dynamic"],
    "residency": [*TINY, "--tasks", "20"],
}  # fmt: skip
MACHINE = {"hardware", "threads", "torch", "timm", "onnxruntime", "command"}


def test_suite_is_covered():
    assert set(SUITE) == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_benchmark_writes_its_figures(name, tmp_path):
    main = importlib.import_module(f"benchmarks.{name}").main
    result = CliRunner().invoke(main, [*ARGUMENTS[name], "--results", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (written,) = tmp_path.iterdir()
    rows = list(csv.DictReader(written.open()))
    assert rows
    assert all(row.keys() > MACHINE and row["threads"] == "1" for row in rows)
    if name == "residency":
        assert rows[0]["checked"] == "20"
        assert rows[0]["other_class_than_alone"] == "0"
        assert float(rows[0]["max_abs_from_alone"]) <= 1e-4
    if name == "high_resolution":
        memory = {(row["implementation"], row["attention"], row["tokens"]): float(row["peak_mib"]) for row in rows}
        # Explicit products of 65 tokens and 2 heads: scores, their masked copy and the softmax at the least.
        assert memory["masked", "explicit", "65"] >= 2 * 2 * 65 * 65 * 4 / 2**20
        assert len(memory) == len(rows) == 8


def test_residency_notices_a_row_that_is_another_task():
    engine = pt.Engine(exported("sa2vp"))
    like = engine.folder.read_task("task1")
    bank = engine.bank
    for number in range(2, 5):
        bank.put(f"task{number}", draw_task(like, number if number < 4 else 77))
    right, _ = check_answers(engine, like, [2, 3], OPTIONS)
    wrong, _ = check_answers(engine, like, [2, 3, 4], OPTIONS)
    assert right <= 1e-5 < 1e-3 < wrong
