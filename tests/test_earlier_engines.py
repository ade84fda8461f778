"""Engines of earlier releases: one task for an image, and a bank row for each task in every tensor."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

import prompttune as pt
from prompttune.errors import EngineError
from prompttune.export import EngineFolder, add_task, validate_engine
from prompttune.export.folder import MANIFEST, ONNX_FILE, ONNX_WEIGHTS_FILE, FileRecord, write_manifest
from prompttune.export.formats.onnx_file import OPSET, export_onnx
from prompttune.export.graph import Traced, capture
from prompttune.export.layout import TensorSpec
from tests import engines, segmenting
from tests.engines import noise


class EarlierGraph(torch.nn.Module):
    """Each row of a batch is answered for the one task that its index names."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image, task_index, bank):
        rows = {key: one.index_select(0, task_index) for key, one in bank.items()}
        return self.model.forward_state(image, rows).logits


def earlier(engine, model, folder):
    """A copy of an engine as an earlier release wrote it."""
    shutil.copytree(engine, folder)
    layout, size = model.state_layout(), model.backbone.image_size
    axes = ("batch", "tasks", *dict.fromkeys(axis for shape in layout.values() for axis in shape if type(axis) is str))
    sizes = dict(zip(axes, (3, 5, 7, 11, 13), strict=False))
    inputs = [
        TensorSpec("image", "float32", ("batch", 3, size, size)),
        TensorSpec("task_index", "int64", ("batch",)),
        *(TensorSpec(f"bank.{key}", "float32", ("tasks", *shape)) for key, shape in layout.items()),
    ]
    outputs = [TensorSpec("logits", "float32", ("batch", "classes", *model.head.size))]
    named = {spec.name: {at: axis for at, axis in enumerate(spec.shape) if type(axis) is str} for spec in inputs}
    shapes = {spec.name: [sizes.get(axis, axis) for axis in spec.shape] for spec in inputs}
    sample = [torch.zeros(shapes["image"]), torch.zeros(shapes["task_index"], dtype=torch.int64)]
    sample.append({key: torch.zeros(shapes[f"bank.{key}"]) for key in layout})
    dynamic = {"image": named["image"], "task_index": named["task_index"]}
    dynamic["bank"] = {key: named[f"bank.{key}"] for key in layout}
    program = capture(EarlierGraph(model), sample, dynamic, "explicit", "cpu", "an earlier graph")
    files = ONNX_FILE, ONNX_WEIGHTS_FILE
    for name in files:
        (folder / name).unlink()
    export_onnx(Traced(program, inputs, outputs, dynamic, []), folder, OPSET)
    manifest = EngineFolder(folder, verify=False).manifest
    records = {name: FileRecord.of(folder / name) for name in files}
    (folder / MANIFEST).unlink()
    details = {name: value for name, value in manifest.details.items() if name != "probes"}
    write_manifest(
        folder,
        dataclasses.replace(manifest, inputs=tuple(inputs), outputs=tuple(outputs), files=records, details=details),
    )
    return folder


@pytest.fixture(scope="module")
def classification(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier") / "engine"
    return earlier(engines.exported("sa2vp"), engines.model_of("sa2vp", 0), folder)


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory):
    model = segmenting.drawn_segmentation(segmenting.tiny(), "sa2vp", "linear", rank=2)
    return earlier(segmenting.engine_of("sa2vp", "linear"), model, tmp_path_factory.mktemp("earlier") / "engine")


def expected(number, images):
    with torch.no_grad():
        return engines.model_of("sa2vp", number)(torch.from_numpy(images)).logits.numpy()


def test_their_manifests_keep_their_versions(classification, segmentation):
    for folder, version in ((classification, 1), (segmentation, 2)):
        manifest = EngineFolder(folder).manifest
        assert json.loads((folder / MANIFEST).read_text())["format_version"] == version
        assert (manifest.asks_many, manifest.form.by_class) == (False, False)
        assert manifest.outputs[0].shape[:2] == ("batch", "classes")


def test_their_answers_are_pytorchs(classification):
    engine, images = pt.Engine(classification), noise(4)
    for number in (0, 1):
        assert np.abs(engine.logits(images, f"task{number}") - expected(number, images)).max() <= 1e-4
    mixed = engine.logits(images, ["task1", "task0", "task1", "task0"])
    for row, number in enumerate((1, 0, 1, 0)):
        assert np.abs(mixed[row, : number + 2] - expected(number, images)[row]).max() <= 1e-4
        assert np.isneginf(mixed[row, number + 2 :]).all()


def test_several_tasks_of_an_image_are_rows_of_their_own(classification, monkeypatch):
    engine, images, rows = pt.Engine(classification), noise(3), []
    run = type(engine._runtime).run

    def counted(self, inputs, bank):
        rows.append((len(inputs["image"]), *inputs["task_index"].shape))
        return run(self, inputs, bank)

    monkeypatch.setattr(type(engine._runtime), "run", counted)
    several = engine.logits(images, [["task1", "task0", "task1"]])
    assert rows == [(9, 9)]
    for place, number in enumerate((1, 0, 1)):
        assert np.abs(several[:, place, : number + 2] - expected(number, images)).max() <= 1e-4
        assert np.isneginf(several[:, place, number + 2 :]).all()
    assert [len(row) for row in engine.predict(images, [["task1"], ["task0", "task1"], ["task0"]])] == [1, 2, 1]


def test_their_tasks_come_and_go(classification, tmp_path):
    folder, images = shutil.copytree(classification, tmp_path / "engine"), noise(2)
    before = (folder / MANIFEST).read_bytes()
    engine = pt.Engine(folder)
    engine.add_task("task4", engines.checkpoint("sa2vp", 4))  # of a larger rank and more classes
    assert np.abs(engine.logits(images, "task4")[:, :6] - expected(4, images)).max() <= 1e-4
    assert np.isneginf(engine.logits(images, ["task4", "task0"])[1, 2:]).all()
    add_task(folder, "task2", engines.checkpoint("sa2vp", 2))
    first = engine.logits(images, "task0")
    engine.logits(images, "task4")
    assert engine.logits(images, "task0").tobytes() == first.tobytes()
    engine.add_task("task4", engines.checkpoint("sa2vp", 3), replace=True)
    assert np.abs(engine.logits(images, "task4")[:, :5] - expected(3, images)).max() <= 1e-4
    engine.remove_task("task4")
    assert EngineFolder(folder).tasks() == ["task0", "task1", "task2"]
    assert (folder / MANIFEST).read_bytes() == before
    few = pt.Engine(folder, resident_tasks=1)
    found = few.answer(images, [["task0", "task1"], ["task2"]])
    assert [[len(one.logits) for one in row] for row in found] == [[2, 3], [4]]
    assert np.abs(found[1][0].logits - expected(2, images)[1]).max() <= 1e-4


def test_they_validate(classification, segmentation):
    report = validate_engine(classification, batch_sizes=(1, 4), images=4)
    assert report.passed, report.failures
    assert {one.among for one in report.neighbours} >= {"other tasks of the same images"}
    assert validate_engine(classification, against=engines.exported("sa2vp"), batch_sizes=(1, 2), images=2).passed
    report = validate_engine(segmentation, batch_sizes=(1, 3), images=3)
    assert report.passed, report.failures


def test_their_maps_are_those_of_the_latest_form(segmentation):
    images, lists = noise(2), [["task0", "task1"]]
    found = pt.Engine(segmentation).logits(images, lists)
    wanted = pt.Engine(segmenting.engine_of("sa2vp", "linear")).logits(images, lists)
    assert found.shape == wanted.shape
    finite = np.isfinite(wanted)
    assert np.array_equal(np.isfinite(found), finite)
    assert np.abs(found[finite] - wanted[finite]).max() <= 1e-5


def test_a_manifest_of_a_later_release_is_refused(classification, tmp_path):
    from tests.test_export_folder import reseal

    folder = shutil.copytree(classification, tmp_path / "engine")
    reseal(folder / MANIFEST, lambda values: values.update(format_version=4))
    with pytest.raises(EngineError, match="has format version 4, this prompttune reads up to 3: upgrade prompttune"):
        pt.Engine(folder)
