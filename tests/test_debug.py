"""Looking for the first intermediate result that diverges, in engines that were damaged on purpose."""

import dataclasses
import stat

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import prompttune as pt
from prompttune.cli.main import cli
from prompttune.errors import UsageError
from prompttune.export import EngineFolder, ExportSettings, Gate
from prompttune.export.folder import FileRecord, write_manifest
from prompttune.export.parity.bisection import Bisection, Probe, bisect
from prompttune.export.tasks import engine_model
from tests.engines import backbone, checkpoint, copied, exported, noise
from tests.test_export_folder import reseal


def ancestors(graph, value):
    """Initialisers that a value of a graph is computed from."""
    makers = {output: node for node in graph.node for output in node.output}
    initialisers = {one.name for one in graph.initializer}
    seen, open_, found = set(), [value], set()
    while open_:
        name = open_.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in initialisers:
            found.add(name)
        elif name in makers:
            open_ += makers[name].input
    return found


def damage(folder, block):
    """Change one weight that ``block`` reads and no block before it does, and seal the engine again."""
    manifest = EngineFolder(folder).manifest
    probes, path = manifest.details["probes"], folder / "model.onnx"
    model = onnx.load(str(path))
    before = "embed" if block == 0 else f"block{block - 1}"
    new = ancestors(model.graph, probes[f"block{block}"]) - ancestors(model.graph, probes[before])
    for key in list(probes):  # the prompts of a block before it read other weights still
        if key.startswith(f"{before}."):
            new -= ancestors(model.graph, probes[key])
    weights = [one for one in model.graph.initializer if one.name in new and len(one.dims) == 2]
    largest = max(weights, key=lambda one: int(np.prod(one.dims)))
    values = onnx.numpy_helper.to_array(largest)
    largest.CopyFrom(onnx.numpy_helper.from_array((values + 0.1).astype(values.dtype), largest.name))
    for name in manifest.files:
        (folder / name).unlink()
    onnx.save_model(model, str(path), save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    files = {name: FileRecord.of(folder / name) for name in manifest.files}
    write_manifest(folder, dataclasses.replace(manifest, files=files))


@pytest.mark.parametrize("method", ["lspt", "sa2vp", "vpt-deep"])
def test_a_sound_engine_diverges_nowhere(method):
    found = pt.validate_engine(exported(method), images=4, debug=True).bisection
    assert found.first is None
    assert "every intermediate result" in found.verdict
    names = [one.name for one in found.probes]
    assert names[0] == "embed"
    assert names[-1] == "features"
    assert "block0" in names
    assert found.skipped == ()
    assert all(one.relative < 1e-5 and one.cosine > 0.999 for one in found.probes)


@pytest.mark.parametrize(("method", "block"), [("vpt-deep", 0), ("vpt-deep", 2), ("lspt", 4), ("sa2vp", 3)])
def test_the_damaged_block_is_named(method, block, tmp_path):
    folder = copied(method, tmp_path)
    damage(folder, block)
    report = pt.validate_engine(folder, images=4, debug=True)
    assert not report.passed
    assert report.bisection.first.split(".")[0] == f"block{block}"
    shown = CliRunner().invoke(cli, ["validate", str(folder), "--images", "4", "--debug"])
    assert shown.exit_code == 1
    assert f"the first intermediate result that diverges is block{block}" in shown.stdout
    assert "Traceback" not in shown.output


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_honest_rounding_is_no_divergence(precision, tmp_path):
    """An honest engine is let in, although some of its 16 images are near to a tie."""
    folder = tmp_path / "engine"
    pt.export_engine(
        [checkpoint("sa2vp", 0), checkpoint("sa2vp", 1)], folder, format=ExportSettings(precision=precision)
    )
    report = pt.validate_engine(folder, debug=True)
    assert report.passed
    assert report.gate == Gate.for_precision(precision)
    assert report.bisection.first is None
    assert report.max_abs > 1e-4
    if precision == "fp16":  # int8 packs its weights otherwise
        assert report.warnings == []
        damage(folder, 3)
        broken = pt.validate_engine(folder, debug=True)
        assert "top-1 agreement" in broken.failures[0]
        assert "more than the rounding of fp16 explains" in broken.warnings[0]
        assert broken.bisection.first.split(".")[0] == "block3"


def test_the_engine_folder_is_only_read(tmp_path):
    folder = copied("linear", tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for path in [folder, *before]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
        assert pt.validate_engine(folder, images=2, debug=True).bisection.first is None
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    finally:
        for path in [folder, *before]:
            path.chmod(path.stat().st_mode | stat.S_IWUSR)


def test_relative_paths_find_the_weights(tmp_path, monkeypatch):
    copied("linear", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert pt.validate_engine("engine", images=2, debug=True).bisection.first is None
    assert [one.name for one in tmp_path.iterdir()] == ["engine"]


def test_results_that_the_file_does_not_hold_are_skipped(tmp_path):
    folder = copied("vpt-deep", tmp_path)
    reseal(folder / "engine.json", lambda values: values["details"]["probes"].update(block1="gone"))
    reseal(folder / "engine.json", lambda values: values["details"]["probes"].pop("embed"))
    found = pt.validate_engine(folder, images=2, debug=True).bisection
    assert found.skipped == ("embed", "block1")
    assert "block0" in [one.name for one in found.probes]


def test_engines_without_such_results_are_refused(tmp_path):
    folder = copied("linear", tmp_path)
    reseal(folder / "engine.json", lambda values: values["details"].update(probes={}))
    with pytest.raises(UsageError, match="export it again"):
        pt.validate_engine(folder, debug=True)
    reseal(folder / "engine.json", lambda values: values.update(format="tensorrt"))
    with pytest.raises(UsageError, match="export the same settings with --format onnx"):
        pt.validate_engine(folder, debug=True, runner=pt.Engine(exported("linear")))


def test_the_tolerance_is_the_precisions(tmp_path):
    folder = EngineFolder(exported("linear"))
    model, task = engine_model(folder.manifest, backbone()), folder.read_task("task0")
    other = folder.read_task("task1")
    arguments = (folder.path, folder.manifest, model, "task0")
    assert bisect(*arguments, task, noise(2), 1e-4).first is None
    assert bisect(*arguments, task, noise(2), 0.0).first is not None
    assert bisect(*arguments, dataclasses.replace(other, labels=task.labels), noise(2), 1e-4).first is None  # no head


def test_what_is_not_finite_diverges():
    probes = (Probe("block0", 0.0, 0.0, 1.0), Probe("block1", float("nan"), float("nan"), float("nan")))
    found = Bisection("t", 0.1, probes, ())
    assert found.first == "block1"
