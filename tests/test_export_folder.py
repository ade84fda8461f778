"""Engine folders: what they refuse, what they check, what they leave alone."""

import dataclasses
import json
import shutil

import numpy as np
import onnx
import pytest
import torch

import prompttune as pt
from prompttune.errors import CheckpointError, EngineError, ParityError, UsageError
from prompttune.export import (
    EngineFolder,
    EngineTask,
    MultiTaskGraph,
    add_task,
    export_engine,
)
from prompttune.export.banks import BankForm, stack_states
from prompttune.export.formats import Built
from prompttune.export.formats import onnx as formats_onnx
from prompttune.export.formats.onnx_file import verify_onnx
from prompttune.export.layout import bind_axes
from prompttune.export.tasks import fold_checkpoint
from tests.drawing import drawn_model
from tests.engines import backbone, checkpoint, config_of, copied, exported, model_of, noise


def reseal(path, change):
    """Edit a sealed JSON file the way an attacker or a newer version would, digest included."""
    from prompttune.export.folder import _sealed

    values = json.loads(path.read_text())
    values.pop("digest")
    change(values)
    path.write_text(json.dumps(_sealed(values)))


# ------------------------------------------------------------------- the graph, without exporting it


@pytest.mark.parametrize("method", ["sa2vp", "lspt"])
def test_multi_task_graph_is_the_models_own_forward(method):
    models = [model_of(method, number) for number in (1, 3)]
    folded = [fold_checkpoint(checkpoint(method, number), backbone()).task for number in (1, 3)]
    bank = stack_states(BankForm(models[0].state_layout()), [task.state for task in folded])
    images, asked = torch.from_numpy(noise(3)), [[1, 0], [0, 0], [1, 1]]
    with torch.no_grad():
        index = [torch.from_numpy(one) for one in bank.index(asked).values()]
        rows = {key: torch.from_numpy(value) for key, value in bank.rows.items()}
        found = MultiTaskGraph(models[0])(images, *index, rows)
        assert found.shape[:2] == (3, 2)
        for row, tasks in enumerate(asked):
            for number, task in enumerate(tasks):
                expected = models[task](images[row : row + 1]).logits[0]
                assert (found[row, number, : len(expected)] - expected).abs().max() <= 1e-5
                assert torch.isneginf(found[row, number, len(expected) :]).all()


def test_a_baked_batch_size_is_found_out(tmp_path):
    folder = copied("linear", tmp_path)
    manifest = EngineFolder(folder).manifest
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    verify_onnx(folder / "model.onnx", manifest.inputs, manifest.outputs)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    onnx.save(model, str(folder / "model.onnx"))
    with pytest.raises(EngineError, match=r"image is FLOAT \[3, 3, 64, 64\], declared was float32 \['batch', "):
        verify_onnx(folder / "model.onnx", manifest.inputs, manifest.outputs)


def test_layout_names_the_tensor_that_does_not_fit():
    layout = {"a": (2, "rank"), "b": ("rank", 3)}
    assert bind_axes(layout, {"a": (1, 2, 5), "b": (1, 5, 3)}, "x") == {"rank": 5}
    with pytest.raises(EngineError, match=r"x does not fit the engine: b is \[4, 3\], the engine has \[5, 3\]"):
        bind_axes(layout, {"a": (1, 2, 5), "b": (1, 4, 3)}, "x")
    with pytest.raises(EngineError, match="only one side has these state tensors: b"):
        bind_axes(layout, {"a": (1, 2, 5)}, "x")


# ------------------------------------------------------------------- exporting


def test_manifest_says_what_the_engine_is():
    manifest = EngineFolder(exported("vpt-shallow")).manifest
    assert manifest.backbone["fingerprint"] == backbone().fingerprint
    assert manifest.method["graph_settings"] == {"num_prompts": 3, "first_block": 0}
    assert [spec.name for spec in manifest.inputs] == [
        "image",
        "task_index",
        "class_rows",
        "class_index",
        "bank.prompts",
        "bank.head.weight",
        "bank.head.bias",
    ]
    shapes = {spec.name: spec.shape for spec in manifest.inputs}
    assert shapes["task_index"] == ("batch", "asked")
    assert (shapes["class_rows"], shapes["class_index"]) == (("chosen",), ("batch", "asked", "width"))
    assert shapes["bank.prompts"][0] == "tasks"
    assert shapes["bank.head.weight"] == ("classes", backbone().width)
    assert manifest.outputs[0].shape == ("batch", "asked", "width")
    assert manifest.to_dict()["format_version"] == 3
    assert manifest.files.keys() == {"model.onnx", "model.onnx.data"}
    assert (manifest.format, manifest.precision, manifest.opset) == ("onnx", "fp32", 20)
    assert not list(exported("vpt-shallow").parent.glob(".engine*"))


def other_checkpoint(folder, method="linear", config=None, over=None):
    drawn_model(over or backbone(), config or config_of(method), 3).save(folder)
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda at: other_checkpoint(at, over=backbone(seed=1)), "fingerprint .* has test_vit with fingerprint"),
        (lambda at: other_checkpoint(at, over=backbone(size=32)), "its image size is 32, .* has 64"),
        (lambda at: other_checkpoint(at, "lspt"), "its method is lspt, .* has vpt-shallow"),
        (lambda at: other_checkpoint(at, config=pt.VPTShallowConfig(num_prompts=5)), "its num_prompts is 5, .* has 3"),
    ],
    ids=["fingerprint", "image size", "method", "graph setting"],
)
def test_what_does_not_fit_is_refused_with_both_sides(make, message, tmp_path):
    other = make(tmp_path / "other")
    with pytest.raises(EngineError, match="task 'other' does not fit task 'task0': .*" + message):
        export_engine([checkpoint("vpt-shallow", 0), other], tmp_path / "engine")
    assert not (tmp_path / "engine").exists()
    with pytest.raises(EngineError, match="task 'x' does not fit the engine: .*" + message):
        add_task(exported("vpt-shallow"), "x", other)
    with pytest.raises(EngineError, match="task 'x' does not fit the engine: .*" + message):
        pt.Engine(exported("vpt-shallow")).add_task("x", other)


def test_names_and_outputs_are_checked_before_work(tmp_path):
    path = checkpoint("linear", 0)
    for name in ("../up", ".hidden", "a/b", "", "-x", "é"):
        with pytest.raises(UsageError, match="bad task name"):
            export_engine({name: path}, tmp_path / "engine")
    with pytest.raises(UsageError, match="two tasks are called 'task0'"):
        export_engine([path, path], tmp_path / "engine")
    with pytest.raises(UsageError, match="at least one"):
        export_engine([], tmp_path / "engine")
    with pytest.raises(UsageError, match="unknown format 'tflite'"):
        export_engine([path], tmp_path / "engine", format="tflite")
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        export_engine([tmp_path / "nothing"], tmp_path / "engine")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="is not an engine"):
        export_engine([path], tmp_path / "notes", overwrite=True)
    with pytest.raises(UsageError, match="--overwrite"):
        export_engine([path], copied("linear", tmp_path))


def test_an_engine_that_fails_the_gate_is_not_put_in_place(tmp_path, monkeypatch):
    folder = copied("linear", tmp_path)
    manifest = EngineFolder(folder).manifest

    def copied_model(request, target):  # the graph of an earlier export will do, and is quicker
        for name in manifest.files:
            shutil.copy(exported("linear") / name, target)
        return Built(manifest.inputs, manifest.outputs, list(manifest.files))

    monkeypatch.setattr(formats_onnx, "write_onnx", copied_model)
    before = (folder / "engine.json").read_bytes()
    with pytest.raises(ParityError, match=r"logits differ by .*, allowed 0 .*; the engine was not put in place"):
        export_engine([checkpoint("linear", 2)], folder, overwrite=True, atol=0.0)
    assert (folder / "engine.json").read_bytes() == before
    assert EngineFolder(folder).tasks() == ["task0", "task1"]
    assert [one.name for one in tmp_path.iterdir()] == ["engine"]


# ------------------------------------------------------------------- tasks of a folder


def test_adding_and_removing_leaves_the_model_alone(tmp_path):
    folder = copied("linear", tmp_path)
    before = {one: (one.read_bytes(), one.stat().st_mtime_ns) for one in folder.glob("model.onnx*")}
    assert len(before) == 2
    task = add_task(folder, "late", checkpoint("linear", 4))
    assert task.parity["passed"]
    assert {one["task"] for one in task.parity["comparisons"]} == {"late", "mixed"}
    assert list(EngineFolder(folder, verify=False).scan().records) == ["late", "task0", "task1"]
    assert EngineFolder(folder, verify=False).scan().records["late"].version == task.version
    with pytest.raises(UsageError, match="already has a task 'late'"):
        add_task(folder, "late", checkpoint("linear", 5))
    replaced = add_task(folder, "late", checkpoint("linear", 5), replace=True)
    assert len(EngineFolder(folder, verify=False).scan().records["late"].labels) == 7
    assert replaced.version != task.version
    EngineFolder(folder, verify=False).remove_task("task0")
    assert list(EngineFolder(folder, verify=False).scan().records) == ["late", "task1"]
    with pytest.raises(UsageError, match="unknown task 'task0'"):
        EngineFolder(folder, verify=False).remove_task("task0")
    assert {one: (one.read_bytes(), one.stat().st_mtime_ns) for one in folder.glob("model.onnx*")} == before
    assert sorted(one.name for one in (folder / "tasks").iterdir()) == ["late", "task1"]


def test_a_task_that_fails_the_gate_is_not_added(tmp_path):

    folder = copied("linear", tmp_path)
    with pytest.raises(ParityError, match="task 'late' was not added"):
        add_task(folder, "late", checkpoint("linear", 4), atol=0.0)
    assert EngineFolder(folder).tasks() == ["task0", "task1"]


def test_version_follows_all_that_an_answer_depends_on():
    task = EngineFolder(exported("linear")).read_task("task1")
    same = EngineTask(task.labels, task.preprocess, {key: value.copy() for key, value in task.state.items()})
    assert task.version == same.version
    bias = {**task.state, "head.bias": task.state["head.bias"] + 1}
    cropped = dataclasses.replace(task.preprocess, crop_pct=0.5)
    changed = [
        dataclasses.replace(task, state=bias),
        dataclasses.replace(task, labels=("x", "y", "z")),
        dataclasses.replace(task, preprocess=cropped),
    ]
    assert len({task.version, *(one.version for one in changed)}) == 4


# ------------------------------------------------------------------- damage


def answer(folder, task):
    """A damaged task hides no other, so it is told when it is asked for."""
    return pt.Engine(folder).logits(noise(1), task)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tasks/task1/state.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damaged_files_are_found(name, damage, tmp_path):
    folder = copied("linear", tmp_path)
    path = folder / name
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-10])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    word = "missing" if damage == "missing" else "damaged"
    with pytest.raises(EngineError, match=f"{path.name} is {word}") as caught:
        answer(folder, "task1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "what"), [("engine.json", "manifest"), ("tasks/task0/task.json", "task record")])
def test_edited_records_are_found(name, what, tmp_path):
    folder = copied("linear", tmp_path)
    path = folder / name
    original = path.read_text()
    path.write_text(original.replace("bicubic", "bilinear"))
    with pytest.raises(EngineError, match=f"{what} .* was edited or damaged"):
        answer(folder, "task0")
    path.write_text(original[:100])
    with pytest.raises(EngineError, match=f"cannot read the .*{what}"):
        answer(folder, "task0")
    path.write_text(original)
    reseal(path, lambda values: values.update(format_version=4))
    with pytest.raises(EngineError, match="format version 4, this prompttune reads up to 3: upgrade"):
        answer(folder, "task0")
    reseal(path, lambda values: (values.update(format_version=1), values.pop("labels", values.pop("files", None))))
    with pytest.raises(EngineError, match=r"(lacks a part|is damaged): '(files|labels)'"):
        answer(folder, "task0")


def test_no_engine_is_one_line(tmp_path):
    with pytest.raises(EngineError, match="no engine manifest at"):
        pt.Engine(tmp_path)
    with pytest.raises(EngineError, match="no engine manifest at"):
        EngineFolder(tmp_path / "nowhere", verify=False).scan()


def test_a_state_of_another_layout_is_refused(tmp_path):
    folder = copied("linear", tmp_path)
    task = EngineFolder(folder).read_task("task0")
    wide = dataclasses.replace(task, state={**task.state, "head.weight": np.zeros((1, 2, 7), np.float32)})
    with pytest.raises(EngineError, match=r"head.weight is \[2, 7\]"):
        EngineFolder(folder).write_task("wide", wide)
    shutil.rmtree(folder / "tasks" / "task0")
    shutil.copytree(exported("vpt-shallow") / "tasks" / "task0", folder / "tasks" / "task0")
    with pytest.raises(EngineError, match="only one side has these state tensors: prompts"):
        answer(folder, "task0")
