"""TensorRT and Torch-TensorRT up to the libraries' door: who may pass, and with what."""

import contextlib
import ctypes
import dataclasses
import importlib
import json
import shutil
import sys
import types

import pytest
import torch
from click.testing import CliRunner

import prompttune as pt
from prompttune.cli.main import cli
from prompttune.errors import EngineError, MissingExtraError, UsageError
from prompttune.export import EngineFolder
from prompttune.export.banks import needed_sizes
from prompttune.export.folder import MANIFEST, write_manifest
from prompttune.export.formats import FORMATS, ExportSettings
from prompttune.export.formats.tensorrt_builder import BuildProgress, bar
from prompttune.export.formats.tensorrt_options import TensorRTOptions
from prompttune.export.layout import TensorSpec, axis_ranges, declare_inputs, dynamic_axes, input_shapes
from prompttune.export.runtimes import RuntimeOptions, open_runtime
from prompttune.export.runtimes.tensorrt_compatibility import check_capability, check_version, version_numbers
from prompttune.export.runtimes.tensorrt_library import require_cuda, require_tensorrt, require_torch_tensorrt
from tests.engines import build_request, checkpoint, copied, model_of
from tests.fake_tensorrt import VERSION, fake_tensorrt, folded_state, install, pretend_gpu

DETAILS = {
    "tensorrt": VERSION,
    "gpu": "a GPU",
    "compute_capability": "9.0",
    "profile": {"batch": [1, 2, 4], "tasks": [1, 2, 8], "classes": [1, 3, 16]},
    "version_compatible": False,
    "hardware_compatibility": "none",
}


# ------------------------------------------------------------------------------------------------------- the door


@pytest.mark.parametrize(
    ("name", "library", "extra"), [("trt", "tensorrt", "tensorrt"), ("torch-trt", "torch_tensorrt", "torch-tensorrt")]
)
def test_missing_library_names_the_extra(monkeypatch, tmp_path, name, library, extra):
    find = importlib.import_module

    def find_all_but_one(wanted, *arguments):
        if wanted == library:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)
        return find(wanted, *arguments)

    monkeypatch.setattr(importlib, "import_module", find_all_but_one)
    with pytest.raises(MissingExtraError, match=rf"pip install 'prompttune\[{extra}\]'; or export with --format onnx"):
        pt.export_engine(checkpoint("linear", 0), tmp_path / "engine", format=name)
    assert not list(tmp_path.iterdir())
    folder = stale(tmp_path, name)
    result = CliRunner().invoke(cli, ["validate", str(folder)])
    assert result.exit_code == 1
    assert f"pip install 'prompttune[{extra}]'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def stale(folder, name="trt", **details):
    """An engine folder that claims to hold a plan."""
    engine = copied("linear", folder)
    manifest = dataclasses.replace(EngineFolder(engine).manifest, format=name, details={**DETAILS, **details})
    (engine / MANIFEST).unlink()
    write_manifest(engine, manifest)
    return engine


def test_type_stubs_are_not_the_library(monkeypatch):
    install(monkeypatch, types.ModuleType("tensorrt"))
    with pytest.raises(MissingExtraError, match="tensorrt is not installed"):
        require_tensorrt()


def test_libraries_that_do_not_load_give_one_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "tensorrt.py").write_text("import tensorrt_libs_of_another_place")
    (tmp_path / "torch_tensorrt.py").write_text("print('long story')\nraise Exception('no libnvinfer.so.10\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    with pytest.raises(EngineError, match="tensorrt is installed but does not load: No module named 'tensorrt_libs"):
        require_tensorrt()
    with pytest.raises(EngineError, match=r"torch_tensorrt is installed but does not load: no libnvinfer\.so\.10; i"):
        require_torch_tensorrt()
    assert not capsys.readouterr().out


def test_a_version_compatible_plan_needs_the_lean_runtime(monkeypatch):
    pretend_gpu(monkeypatch)
    install(monkeypatch, fake_tensorrt())
    settings = ExportSettings("trt", options={"version_compatible": True}).resolved()
    loaded = []

    def load(name):
        loaded.append(name)
        if len(loaded) == 1:
            raise OSError("cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load)
    with pytest.raises(
        EngineError, match=rf"needs libnvinfer_lean\.so\.10, .* pip install tensorrt-lean=={VERSION}, or"
    ):
        FORMATS["trt"]().check(settings)
    FORMATS["trt"]().check(settings)
    assert loaded == ["libnvinfer_lean.so.10"] * 2


def test_cuda_is_asked_for(monkeypatch):
    pretend_gpu(monkeypatch)
    assert require_cuda("cuda", "it") == 0
    with pytest.raises(UsageError, match="it needs a CUDA device: give the device cuda, not cpu"):
        require_cuda("cpu", "it")
    with pytest.raises(UsageError, match="the device cuda:1 does not exist: this machine has 1"):
        require_cuda("cuda:1", "it")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="PyTorch finds none here"):
        require_cuda("cuda", "it")


def test_format_checks_settings(monkeypatch):
    pretend_gpu(monkeypatch)
    install(monkeypatch, fake_tensorrt())
    settings = ExportSettings("trt", "int8", device="cuda").resolved()
    assert settings.quantization == "static"
    assert settings.attention == "explicit"
    FORMATS["trt"]().check(settings)
    with pytest.raises(UsageError, match="int8 with fixed scales"):
        FORMATS["trt"]().check(dataclasses.replace(settings, quantization="dynamic"))
    with pytest.raises(UsageError, match=r"unknown TensorRT option 'workspaces'; did you mean workspace\?"):
        FORMATS["trt"]().check(dataclasses.replace(settings, options={"workspaces": 1}))
    with pytest.raises(UsageError, match="has no int8"):
        ExportSettings("torch-trt", "int8").resolved()
    assert ExportSettings("torch-trt").resolved().attention == "fused"
    with pytest.raises(UsageError, match="none and ampere_plus"):
        FORMATS["torch-trt"]().check(
            ExportSettings("torch-trt", options={"hardware_compatibility": "same_compute_capability"})
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workspace": 0}, "workspace must be at least 1, not 0"),
        ({"workspace": True}, "workspace must be a whole number, not True"),
        ({"workspace": "1G"}, "not '1G'"),
        ({"optimization_level": 6}, "optimization_level must be at least 0 and at most 5, not 6"),
        ({"optimization_level": None}, "optimization_level needs a whole number, not nothing"),
        ({"timing_cache": 3}, "must be a path"),
        ({"timing_cache": "cache", "optimization_level": 0}, "ignores the timing cache"),
        ({"version_compatible": 1}, "must be true or false"),
        ({"hardware_compatibility": "ampere"}, "did you mean ampere_plus"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        TensorRTOptions.parse(options)


def test_options_become_a_record():
    options = TensorRTOptions.parse({"timing_cache": "a/cache", "workspace": 5, "version_compatible": True})
    assert options.timing_cache.name == "cache"
    assert json.loads(json.dumps(options.to_dict()))["version_compatible"] is True


# ----------------------------------------------------------------------------------------------- profiles, limits

INPUTS = [
    TensorSpec("image", "float32", ("batch", 3, 8, 8)),
    TensorSpec("task_index", "int64", ("batch", "asked")),
    TensorSpec("bank.a", "float16", ("tasks", 4, "rank")),
]


def test_ranges_come_from_the_tasks():
    needed = {"tasks": 40, "rank": 20, "classes": 3}
    found = axis_ranges(INPUTS, needed, {})
    calls = {"batch": (1, 8, 32), "asked": (1, 1, 4)}
    assert found == {**calls, "tasks": (1, 40, 80), "rank": (1, 20, 40)}
    found = axis_ranges(INPUTS, {"tasks": 2, "rank": 4}, {"batch": (2, 2, 2)})
    assert found == {**calls, "batch": (2, 2, 2), "tasks": (1, 2, 64), "rank": (1, 4, 32)}
    assert input_shapes(INPUTS[2], found) == ((1, 4, 1), (2, 4, 4), (64, 4, 32))
    assert dynamic_axes(INPUTS) == ["batch", "asked", "tasks", "rank"]
    with pytest.raises(UsageError, match=r"unknown dynamic axis 'ranks'; did you mean rank, tasks"):
        axis_ranges(INPUTS, needed, {"ranks": (1, 1, 1)})
    with pytest.raises(UsageError, match="the axis rank may grow to 16, but the tasks of this export need 20"):
        axis_ranges(INPUTS, needed, {"rank": (1, 8, 16)})


def test_ranges_of_classes():
    """A call may ask for every class of the bank, unless the user says otherwise."""
    inputs = declare_inputs({"head.weight": ("classes", 8)}, 8)
    needed = {"tasks": 2, "classes": 2051, "chosen": 2051, "width": 2000}
    found = axis_ranges(inputs, needed, {})
    wanted = {"classes": (1, 2051, 4102), "chosen": (1, 2051, 4102), "width": (1, 2000, 4000)}
    assert found == {"batch": (1, 8, 32), "asked": (1, 1, 4), **wanted}
    few = {"tasks": 2, "classes": 7, "chosen": 7, "width": 3}
    assert axis_ranges(inputs, few, {})["width"] == (1, 3, 256)
    assert axis_ranges(inputs, few, {"classes": (1, 7, 9000)})["chosen"] == (1, 7, 9000)
    assert axis_ranges(inputs, few, {"chosen": (1, 7, 64)})["chosen"] == (1, 7, 64)
    with pytest.raises(UsageError, match="the axis width may grow to 2, but the tasks of this export need 3"):
        axis_ranges(inputs, few, {"width": (1, 2, 2)})


def test_tasks_that_only_read_an_image_get_more_room():
    for method, most in (("linear", 32), ("sa2vp", None)):
        axes = build_request(method, ExportSettings("trt", axes={"batch": (1, 2, 4)})).axes
        assert axes == {"batch": (1, 2, 4)} | ({"asked": (1, 1, most)} if most else {})
    chosen = build_request("linear", ExportSettings("trt", axes={"asked": (1, 1, 2)})).axes
    assert chosen == {"asked": (1, 1, 2)}


def test_sizes_that_tasks_need():
    models = [model_of("sa2vp", number) for number in (0, 1)]
    states = {f"{number}": folded_state(model) for number, model in enumerate(models)}
    assert needed_sizes(models[0].state_layout(), states) == {
        "tasks": 2,
        "rank": 3,
        "classes": 1 + 2 + 3,
        "chosen": 1 + 2 + 3,
        "width": 3,
    }


def test_progress_of_nested_phases():
    shares = []
    progress = BuildProgress(lambda share: shares.append(round(share, 3)))
    progress.start("all", None, 2)
    progress.start("one", "all", 4)
    progress.advance("one", 2)
    progress.advance("one", 2)
    progress.advance("one")
    progress.advance("all", 1)
    progress.advance("all")
    progress.start("late", None, 2)
    assert progress.advance("late", 1)
    assert shares == [0.0, 0.25, 0.5, 1.0]  # what begins late does not take it back
    assert bar(0.5) == "━" * 12 + "─" * 12 + " 50%"


# --------------------------------------------------------------------------------------------- plans of elsewhere


def test_versions_that_open_a_plan():
    assert version_numbers("10.13.3.9.post1") == (10, 13, 3, 9)
    check_version("10.13.3.9", "10.13.3.9.post1", False)
    check_version("10.13.3.9", "10.14.0", True)
    check_version("10.13.3.9", "11.4.0.106", True)
    for built, running, compatible in (
        ("10.13.3", "10.14.0", False),
        ("10.14.0", "10.13.3", True),
        ("8.6", "10.1", True),
    ):
        with pytest.raises(EngineError, match=rf"built by TensorRT {built}, here is {running}"):
            check_version(built, running, compatible)


@pytest.mark.parametrize(
    ("level", "here", "fits"),
    [
        ("none", (9, 0), True),
        ("none", (8, 9), False),
        ("same_compute_capability", (8, 9), False),
        ("ampere_plus", (8, 0), True),
        ("ampere_plus", (12, 0), True),
        ("ampere_plus", (7, 5), False),
    ],
)
def test_gpus_that_run_a_plan(level, here, fits):
    details = {**DETAILS, "hardware_compatibility": level}
    with contextlib.nullcontext() if fits else pytest.raises(EngineError, match="export the engine again"):
        check_capability(details, here)


def test_a_plan_for_several_capabilities_runs_on_each():
    details = {**DETAILS, "gpu": "RTX", "compute_capability": "8.6, 8.9"}
    check_capability(details, (8, 9))
    with pytest.raises(EngineError, match=r"for compute capability 8\.6, 8\.9 \(RTX\), this GPU has 12\.0"):
        check_capability(details, (12, 0))


def test_runtime_refuses_a_stale_plan(monkeypatch, tmp_path):
    pretend_gpu(monkeypatch)
    install(monkeypatch, fake_tensorrt())
    cuda = RuntimeOptions("cuda")

    def opened(options=cuda, **details):
        folder = tmp_path / "case"
        engine = EngineFolder(stale(folder, **details), verify=False)
        try:
            return open_runtime(engine.path, engine.manifest, options)
        finally:
            shutil.rmtree(folder)

    with pytest.raises(EngineError, match=r"built by TensorRT 10\.12\.0, here is 10\.13\.3\.9.*install tensorrt=="):
        opened(tensorrt="10.12.0")
    with pytest.raises(EngineError, match=r"compute capability 8\.9 \(a GPU\), this GPU has 9\.0"):
        opened(compute_capability="8.9")
    with pytest.raises(UsageError, match="give the device cuda, not cpu"):
        opened(RuntimeOptions())
    with pytest.raises(UsageError, match="does not support threads"):
        opened(RuntimeOptions("cuda", threads=2))
