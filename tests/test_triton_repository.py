"""Triton repositories: against Triton's schema, the model's own inputs, and Triton itself."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from google.protobuf import text_format
from PIL import Image
from tritonclient import grpc, http
from tritonclient.grpc import model_config_pb2 as triton_config
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

import prompttune as pt
from prompttune.cli.main import cli
from prompttune.errors import MissingExtraError, ParityError, UsageError
from prompttune.export import EngineFolder, validate_engine
from prompttune.export.banks import stack_states
from prompttune.export.formats import ExportSettings
from prompttune.export.triton import DATA_TYPES, TritonSettings, as_text, export_triton, make_config, shared_labels
from tests import triton_server
from tests.drawing import drawn_model
from tests.engines import backbone, checkpoint, config_of, exported, noise

ROOT = Path(__file__).parent.parent
RUNS = [checkpoint("sa2vp", number) for number in (0, 1)]
QUICK = {"batch_sizes": (1, 3), "images": 4}
TASKS = ["task0", "task1"]
needs_triton = pytest.mark.skipif(
    not triton_server.available(), reason="the distribution nvidia-pytriton, for the Triton server in it"
)


def parsed(folder: Path):
    """``config.pbtxt`` as Triton reads it: a field that Triton does not know is an error."""
    return text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), triton_config.ModelConfig())


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository with the model ``baked``, made by the command, and the model ``carried`` with its bank as inputs."""
    folder = tmp_path_factory.mktemp("triton") / "models"
    arguments = ["--images", "4", "--batch-sizes", "1,3", "--model-name", "baked", "--max-delay-ms", "200", "--json"]
    result = CliRunner().invoke(cli, ["export", *map(str, RUNS), "-o", str(folder), "--format", "triton", *arguments])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["engine"] == str(folder / "baked" / "1")
    export_triton(RUNS, folder, TritonSettings("carried", bank_inputs=True), **QUICK)
    return folder


def triton_dims(shape, batched):
    """What Triton's own check of a model compares with: -1 for a size that is free; the batch axis left out."""
    dims = [size if isinstance(size, int) else -1 for size in shape]
    return dims[1:] if batched else dims


@pytest.mark.parametrize("name", ["baked", "carried"])
def test_configuration_is_the_models(repository, name):
    config, batched = parsed(repository / name), name == "baked"
    assert (config.name, config.backend, config.platform) == (name, "onnxruntime", "onnxruntime_onnx")
    session = onnxruntime.InferenceSession(str(repository / name / "1" / config.default_model_filename))
    for declared, found in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [one.name for one in declared] == [one.name for one in found]
        for one, tensor in zip(declared, found, strict=True):
            dtype = {"tensor(float)": "FP32", "tensor(int64)": "INT64"}[tensor.type]
            assert triton_config.DataType.Name(one.data_type) == f"TYPE_{dtype}"
            assert list(one.dims) == triton_dims(tensor.shape, batched)
            assert len(one.dims) >= 1
    assert config.max_batch_size == (64 if batched else 0)
    assert config.HasField("dynamic_batching") == batched
    assert [group.kind for group in config.instance_group] == [triton_config.ModelInstanceGroup.KIND_CPU]
    model = onnx.load(str(repository / name / "1" / "model.onnx"), load_external_data=False)
    outside = {entry.value for one in model.graph.initializer for entry in one.external_data if entry.key == "location"}
    assert outside == {"model.onnx.data"}
    assert (repository / name / "1" / "model.onnx.data").is_file()


def test_parameters_tell_a_client_what_it_needs(repository):
    engine = EngineFolder(repository / "baked" / "1")
    parameters = {name: one.string_value for name, one in parsed(repository / "baked").parameters.items()}
    tasks = json.loads(parameters["tasks"])
    assert [(name, one["index"]) for name, one in tasks.items()] == [("task0", 0), ("task1", 1)]
    assert list(tasks) == list(engine.manifest.baked)
    for name, one in tasks.items():
        task = engine.read_task(name)
        assert (one["labels"], one["version"]) == (list(task.labels), task.version)
        assert one["preprocess"] == task.preprocess.to_dict()
    assert (parameters["method"], parameters["precision"]) == ("sa2vp", "fp32")
    about = json.loads(parameters["backbone"])
    assert (about["name"], about["fingerprint"]) == ("test_vit", engine.manifest.backbone["fingerprint"])
    assert "weights" not in about  # a path of the machine that exported
    assert "index" not in json.loads(parsed(repository / "carried").parameters["tasks"].string_value)["task0"]


@pytest.mark.parametrize("name", ["baked", "carried"])
def test_the_version_folder_is_a_proven_engine(repository, name):
    folder = repository / name / "1"
    assert EngineFolder(folder).manifest.parity["passed"]
    assert validate_engine(folder).passed
    ours = pt.Engine(exported("sa2vp")).logits(noise(4), TASKS * 2)
    np.testing.assert_allclose(pt.Engine(folder).logits(noise(4), TASKS * 2), ours, atol=1e-5)


def test_labels_are_written_where_tasks_share_them(tmp_path, repository):
    assert not (repository / "baked" / "labels.txt").exists()
    assert not parsed(repository / "baked").output[0].label_filename
    for seed, name in enumerate(("a", "b")):
        drawn_model(backbone(), config_of("linear"), 3, seed=seed).save(tmp_path / name)
    export_triton([tmp_path / "a", tmp_path / "b"], tmp_path / "models", parity=False)
    folder = tmp_path / "models" / "prompttune"
    assert parsed(folder).output[0].label_filename == "labels.txt"
    assert (folder / "labels.txt").read_text().splitlines() == list(EngineFolder(folder / "1").read_task("a").labels)


def test_a_plan_is_batched_as_it_was_built():
    """No GPU is needed to write the configuration of a plan."""
    engine = EngineFolder(exported("sa2vp"))
    tasks = {name: engine.read_task(name) for name in engine.tasks()}
    calls = {"batch": [2, 8, 32], "asked": [2, 2, 4], "chosen": [4, 4, 64], "width": [1, 3, 256]}
    ranges = {**calls, "tasks": [1, 2, 64], "rank": [1, 2, 32], "classes": [8, 8, 256]}
    details = {"profile": ranges, "tensorrt": "10.13.3"}
    plan = dataclasses.replace(engine.manifest, format="trt", details=details, bank_precision="fp16")
    plan = dataclasses.replace(plan, inputs=tuple(_typed(spec, "float16") for spec in plan.inputs))
    baked = dataclasses.replace(plan, baked=tuple(TASKS), inputs=plan.inputs[:2])
    config = make_config(baked, tasks, TritonSettings(), gpu=True)
    assert (config.platform, config.default_model_filename) == ("tensorrt_plan", "model.plan")
    assert (config.max_batch_size, list(config.dynamic_batching.preferred_batch_size)) == (32, [8, 32])
    assert config.model_warmup[0].batch_size == 2
    assert list(config.model_warmup[0].inputs["task_index"].dims) == [2]
    assert config.instance_group[0].kind == triton_config.ModelInstanceGroup.KIND_GPU
    assert json.loads(config.parameters["tools"].string_value)["tensorrt"] == "10.13.3"
    carried = make_config(plan, tasks, TritonSettings(), gpu=True)
    assert {one.data_type for one in carried.input if one.name.startswith("bank.")} == {triton_config.TYPE_FP16}
    warm = {name: list(one.dims) for name, one in carried.model_warmup[0].inputs.items()}
    assert (warm["image"], warm["task_index"]) == ([2, 3, 64, 64], [2, 2])
    assert (warm["class_rows"], warm["class_index"]) == ([4], [2, 2, 2])  # a task of two classes, and padding
    assert warm["bank.head.bias"] == [8]
    assert (carried.max_batch_size, carried.HasField("dynamic_batching")) == (0, False)
    assert text_format.Parse(as_text(config), triton_config.ModelConfig()) == config


def _typed(spec, dtype):
    return dataclasses.replace(spec, dtype=dtype) if spec.name.startswith("bank.") else spec


def test_every_dtype_of_an_engine_has_its_own():
    from prompttune.export.layout import DTYPES, bank_dtype

    assert {bank_dtype(precision).name for precision in DTYPES} | {"int64"} == set(DATA_TYPES)


def test_labels_differ_when_one_task_has_others():
    engine = EngineFolder(exported("sa2vp"))
    tasks = {name: engine.read_task(name) for name in TASKS}
    assert shared_labels(tasks) is None
    assert shared_labels({"task0": tasks["task0"]}) == tasks["task0"].labels


# ------------------------------------------------------------------ refusals


@pytest.mark.slow
def test_an_existing_model_stays_unless_overwritten(repository, tmp_path, monkeypatch):
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="choose another model name or give --overwrite"):
        export_triton(RUNS, repository, TritonSettings("baked"), **QUICK)
    with pytest.raises(ParityError):
        export_triton(RUNS, repository, TritonSettings("baked"), overwrite=True, atol=0.0, **QUICK)
    with pytest.raises(ParityError):
        export_triton(RUNS, repository, TritonSettings("new"), atol=0.0, **QUICK)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("prompttune.export.triton.make_config", fail)
    with pytest.raises(OSError, match="disk full"):
        export_triton(RUNS, repository, TritonSettings("baked"), overwrite=True, parity=False)
    assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in repository.iterdir()) == ["baked", "carried"]
    (tmp_path / "prompttune").mkdir()
    (tmp_path / "prompttune" / "notes.txt").write_text("somebody's")
    with pytest.raises(UsageError, match="is not a model of prompttune"):
        export_triton(RUNS, tmp_path, overwrite=True)


def test_overwriting_replaces_the_model_whole(tmp_path):
    run = checkpoint("linear", 0)
    export_triton([run], tmp_path, parity=False)
    (tmp_path / "prompttune" / "left").write_text("over")
    export_triton([run], tmp_path, TritonSettings(max_batch_size=4), overwrite=True, parity=False)
    assert parsed(tmp_path / "prompttune").max_batch_size == 4
    assert not (tmp_path / "prompttune" / "left").exists()


@pytest.mark.parametrize(
    ("triton", "settings", "message"),
    [
        (TritonSettings("../x"), ExportSettings(), "bad model name"),
        (TritonSettings(), ExportSettings("aoti"), "unknown format of a Triton model 'aoti'"),
        (TritonSettings(max_batch_size=4), ExportSettings("trt"), "give --axis batch"),
        (TritonSettings(), ExportSettings("trt", axes={"batch": (2, 4, 8)}), "let the axis batch start at 1"),
        (TritonSettings(bank_inputs=True), ExportSettings(baked=True), "leave out one of the two"),
        (TritonSettings(bank_inputs=True, max_batch_size=4), ExportSettings(), "not batched"),
        (TritonSettings(bank_inputs=True), ExportSettings(bank_precision="bf16"), "no bf16 tensors"),
    ],
)
def test_what_triton_cannot_serve_is_refused_at_once(triton, settings, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        export_triton(["nowhere"], tmp_path, triton, format=settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "value"), [("max_batch_size", 0), ("max_delay_ms", -1)])
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(UsageError, match=f"{name} must be at least"):
        TritonSettings(**{name: value})


def test_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"prompttune\[serve\]"):
        export_triton(["nowhere"], tmp_path)


def test_options_of_triton_belong_to_triton(tmp_path):
    result = CliRunner().invoke(cli, ["export", str(RUNS[0]), "-o", str(tmp_path / "x"), "--bank-inputs"])
    assert result.exit_code == 2
    assert "give --format triton" in result.stderr


# -------------------------------------------------------------- Triton itself


@pytest.fixture(scope="module")
def ports(repository, tmp_path_factory):
    with triton_server.triton_server(repository, tmp_path_factory.mktemp("server")) as ports:
        yield ports


def ask(client, module, model, arrays):
    inputs = []
    for name, array in arrays.items():
        inputs.append(module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    return client.infer(model, inputs)


@needs_triton
@pytest.mark.parametrize("module", [http, grpc], ids=["http", "grpc"])
def test_triton_answers_as_the_engine_does(repository, ports, module):
    port = ports.http if module is http else ports.grpc
    images, index = noise(6), np.arange(6) % 2
    wanted = pt.Engine(repository / "baked" / "1").logits(images, [TASKS[row] for row in index])
    engine = EngineFolder(repository / "carried" / "1")
    bank = stack_states(engine.manifest.form, [engine.read_task(name).state for name in TASKS])
    with module.InferenceServerClient(f"127.0.0.1:{port}") as client:
        assert client.is_server_ready()
        baked = ask(client, module, "baked", {"image": images, "task_index": index[:, None]})
        both = ask(client, module, "baked", {"image": images, "task_index": np.stack([index, 1 - index], 1)})
        given = {f"bank.{key}": value for key, value in bank.rows.items()} | bank.index(index[:, None].tolist())
        carried = ask(client, module, "carried", {"image": images, **given})
    for result in (baked, both, carried):
        np.testing.assert_allclose(result.as_numpy("logits")[:, 0, :3], wanted, atol=1e-5)
        assert not np.isfinite(wanted[0, 2])  # the padding of the smaller task came through
    assert both.as_numpy("logits").shape == (6, 2, 3)
    other = pt.Engine(repository / "baked" / "1").logits(images, [TASKS[1 - row] for row in index])
    np.testing.assert_allclose(both.as_numpy("logits")[:, 1], other, atol=1e-5)


@needs_triton
def test_an_index_that_no_task_has_is_an_error(ports):
    images = noise(1)
    with http.InferenceServerClient(f"127.0.0.1:{ports.http}") as client:
        with pytest.raises(InferenceServerException, match="out of data bounds"):
            ask(client, http, "baked", {"image": images, "task_index": np.array([[2]])})
        ask(client, http, "baked", {"image": images, "task_index": np.array([[1]])})


@needs_triton
def test_triton_batches_requests_of_different_tasks(repository, ports):
    """Requests that wait together share an execution, and each still gets its own task's answer."""
    images, index = noise(8, seed=3), np.arange(8) % 2
    wanted = pt.Engine(repository / "baked" / "1").logits(images, [TASKS[row] for row in index])
    with http.InferenceServerClient(f"127.0.0.1:{ports.http}", concurrency=8) as client:
        before = _executions(client)
        waiting = []
        for row in range(8):
            inputs = [http.InferInput("image", [1, 3, 64, 64], "FP32"), http.InferInput("task_index", [1, 1], "INT64")]
            inputs[0].set_data_from_numpy(images[row : row + 1])
            inputs[1].set_data_from_numpy(index[row : row + 1, None])
            waiting.append(client.async_infer("baked", inputs))
        answers = np.concatenate([one.get_result(timeout=60).as_numpy("logits") for one in waiting])
        limit = time.monotonic() + 30
        while _executions(client)[0] < before[0] + 8 and time.monotonic() < limit:
            time.sleep(0.05)  # Triton counts after it has answered
        rows, executions = (after - first for after, first in zip(_executions(client), before, strict=True))
    np.testing.assert_allclose(answers[:, 0], wanted, atol=1e-5)
    assert rows == 8
    assert executions < rows


def _executions(client):
    (model,) = client.get_inference_statistics("baked")["model_stats"]
    return model["inference_count"], model["execution_count"]


def client_in(page: Path, names: dict[str, str]) -> str:
    """The client of a page, for other names."""
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for name, other in names.items():
        assert name in code
        code = code.replace(name, other)
    return code


@needs_triton
def test_the_documented_client_runs(repository, ports, tmp_path, monkeypatch, capsys):
    page = ROOT / "docs" / "deployment.md"
    names = {"localhost:8000": f"127.0.0.1:{ports.http}", '"vision"': '"baked"', '"digits"': '"task0"'}
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 70, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(client_in(page, names), page.name, "exec"), {})
    wanted = pt.Engine(repository / "baked" / "1").predict(tmp_path / "image.png", "task0")[0]
    assert capsys.readouterr().out.strip() == wanted.label
