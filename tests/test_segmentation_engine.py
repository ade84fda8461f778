"""Segmentations as tasks of an engine: export, parity, mixed batches, tasks added, validation, inference."""

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import prompttune as pt
from prompttune.cli.main import cli
from prompttune.data import load_data
from prompttune.data.builtin import ArraySource
from prompttune.errors import DataError, EngineError, UsageError
from prompttune.evaluation.scored import Chosen
from prompttune.export import EngineFolder
from prompttune.export.parity.figures import DifferenceTally
from prompttune.export.parity.gate import Gate
from prompttune.export.parity.map_figures import MapTally
from prompttune.export.parity.samples import Labelled
from prompttune.export.tasks import Fit, engine_model
from prompttune.images.preprocess import Preprocess
from prompttune.serve.infer import InferSettings, infer
from prompttune.serve.masks import class_map, mask_of_image, palette, seen_box
from prompttune.serve.service.assembly import make_service
from prompttune.serve.service.settings import EngineSettings
from prompttune.task_types import ClassificationConfig
from tests.engines import exported, noise
from tests.segmenting import LABELS, drawn_segmentation, engine_of, saved, tiny, write_blocks
from tests.tensorrt_rtx import MAGIC, build_engine
from tests.test_export_folder import reseal

ENGINES = [("sa2vp", "linear"), ("lspt", "pyramid")]


@pytest.fixture(scope="module", params=ENGINES, ids=lambda one: "-".join(one))
def engine(request, tmp_path_factory):
    """With ``task2``, of other classes and another rank, added to the two that it was exported with."""
    method, head = request.param
    folder = tmp_path_factory.mktemp("engines") / "engine"
    shutil.copytree(engine_of(method, head), folder)
    opened = pt.Engine(folder)
    opened.add_task("task2", saved(method, head, 2))
    opened.method, opened.head = method, head
    return opened


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    source = load_data("demo/shapes-seg", target="mask").val
    for index in range(3):
        image = source.load(index)[0]
        (image.resize((100, 80)) if index == 1 else image).save(folder / f"{index}.png")
    return folder


def expected(engine, number, images):
    with torch.no_grad():
        model = pt.PromptModel.load(saved(engine.method, engine.head, number), backbone=tiny())
        return model(torch.from_numpy(images)).logits.numpy()


@pytest.mark.parametrize(("method", "head"), ENGINES)
def test_nvidias_builder_takes_the_graph(method, head, tmp_path):
    build_engine(engine_of(method, head), tmp_path / "plan")
    assert (tmp_path / "plan").read_bytes().startswith(MAGIC)


def test_export_is_proven(engine):
    manifest = engine.folder.manifest
    assert manifest.outputs[0].shape == ("batch", "asked", "width", 16, 16)
    assert manifest.to_dict()["format_version"] == 3
    report = manifest.parity
    assert report["passed"]
    assert report["mixed_vs_single"] <= 1e-5
    assert {one["task"] for one in report["comparisons"]} == {"task0", "task1", "mixed"}
    for one in report["comparisons"]:
        assert one["pixels"] == one["images"] * 16 * 16
        assert one["max_abs"] <= 1e-4
        assert one["agreement"] > 0.999
    assert all(one["exact"] for one in report["swaps"])
    assert report["swaps"]


def test_an_eva_is_exported_like_a_vit(tmp_path):
    over, images = tiny("test_eva"), noise(2)
    models = [drawn_segmentation(over, "sa2vp", "pyramid", number, rank=2 + number) for number in (0, 1)]
    for number, model in enumerate(models):
        model.save(tmp_path / f"task{number}")
    runs = [tmp_path / f"task{number}" for number in (0, 1)]
    folder = pt.export_engine(runs, tmp_path / "engine", batch_sizes=(1, 2))
    assert folder.manifest.parity["passed"]
    assert folder.manifest.backbone["name"] == "test_eva"
    logits = pt.Engine(folder.path).logits(images, ["task1", "task0"])
    for row, number in enumerate((1, 0)):
        wanted = models[number](torch.from_numpy(images[row : row + 1])).logits[0].detach().numpy()
        assert np.abs(logits[row, : len(LABELS[number])] - wanted).max() <= 1e-4
        assert np.abs(wanted).max() > 0.1


def test_head_is_an_input(engine):
    graph = onnx.load(str(engine.folder.path / "model.onnx"), load_external_data=False).graph
    inputs = {value.name for value in graph.input}
    assert {"bank.head.weight", "bank.head.bias"} <= inputs
    assert ("bank.head.lateral" in inputs) == (engine.head == "pyramid")


def test_every_row_may_have_its_own_task(engine):
    names, images = ["task0", "task1", "task2", "task0"], noise(4)
    mixed = engine.logits(images, names)
    assert mixed.shape == (4, 5, 16, 16)
    for row, name in enumerate(names):
        number = int(name[-1])
        classes = len(LABELS[number])
        single = engine.logits(images[row : row + 1], name)[0, :classes]
        wanted = expected(engine, number, images[row : row + 1])[0]
        assert np.abs(mixed[row, :classes] - single).max() <= 1e-5
        assert np.abs(mixed[row, :classes] - wanted).max() <= 1e-4
        assert np.isneginf(mixed[row, classes:]).all()
    assert np.abs(mixed[0, :2] - mixed[3, :2]).max() > 1e-3


def test_several_tasks_of_an_image_equal_single_runs(engine):
    names, images = ["task2", "task0", "task1", "task0"], noise(3)
    several = engine.logits(images, [names])
    assert several.shape == (3, 4, 5, 16, 16)
    for place, name in enumerate(names):
        single = engine.logits(images, name)
        assert np.abs(several[:, place, : single.shape[1]] - single).max() <= 1e-5
        assert np.isneginf(several[:, place, single.shape[1] :]).all()
    lists = [["task1"], ["task2", "task0", "task1"], ["task0", "task2"]]
    for row, (asked, found) in enumerate(zip(lists, engine.segment(images, lists), strict=True)):
        assert [one.task for one in found] == asked
        for name, one in zip(asked, found, strict=True):
            (alone,) = engine.segment(images[row : row + 1], name)
            assert one.labels == alone.labels
            assert (one.mask == alone.mask).mean() > 0.999


def test_masks_are_those_of_pytorch(engine):
    images = noise(2)
    found = engine.segment(images, ["task1", "task2"])
    for row, number in enumerate((1, 2)):
        assert found[row].mask.shape == (64, 64)
        assert found[row].labels == LABELS[number]
        wanted = class_map(expected(engine, number, images[row : row + 1])[0], 64)
        assert (found[row].mask == wanted).mean() > 0.999
    with pytest.raises(UsageError, match=r"call segment\(\)"):
        engine.predict(images, "task0")


def test_validation_measures_iou_on_both_sides(engine):
    report = pt.validate_engine(
        engine.folder.path,
        {"task0": "demo/shapes-seg"},
        batch_sizes=(1, 4),
        images=4,
        limit=8,
        tasks=["task0", "task1"],
    )
    assert report.passed, report.failures
    (accuracy,) = report.accuracy
    assert accuracy.metric == "mIoU"
    assert accuracy.images == 8
    assert accuracy.engine == pytest.approx(accuracy.reference, abs=1e-3)
    assert accuracy.to_dict()["evaluation"]["engine"]["pixels"] == 8 * 64 * 64


def test_validation_scores_classes_that_differ(tmp_path):
    folder = write_blocks(tmp_path / "blocks", (2, 3))
    (folder / "classes.txt").write_text("heart\ngrey\narrow\n")
    report = pt.validate_engine(
        engine_of("sa2vp", "linear"), {"task0": str(folder)}, tasks=["task0"], images=2, batch_sizes=(1, 2)
    )
    (one,) = report.accuracy
    assert one.images == 3
    assert one.evaluation is not None
    found = one.evaluation.engine.to_dict()
    assert found["iou"]["grey"] == 0
    assert found["unseen"]["grey"] > 0
    assert any("pixels of class grey" in note for note in one.notes)
    assert any("no pixels of " in note for note in one.notes)


def test_a_task_of_another_head_or_kind_is_refused(engine, tmp_path):
    other = next(one for one in ENGINES if one[1] != engine.head)
    with pytest.raises(EngineError, match="does not fit"):
        engine.add_task("other", saved(*other, 0))
    from tests.engines import checkpoint

    with pytest.raises(EngineError, match="its task type is classification, the engine has segmentation"):
        engine.add_task("whole", checkpoint(engine.method, 0))


def test_rows_and_overlays_of_pictures(engine, photos, tmp_path):
    outputs = (str(tmp_path / "rows.jsonl"), f"{tmp_path}/overlays/")
    settings = InferSettings(engine.folder.path, (str(photos),), outputs, ("task0",))
    (photos / "broken.png").write_bytes(b"no picture")
    try:
        assert infer(settings).inputs == 4
        resumed = replace(settings, resume=True)
        assert infer(resumed).finished
    finally:
        (photos / "broken.png").unlink()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    good = [row for row in rows if row["error"] is None]
    assert len(good) == 3
    assert len(rows) == 4
    assert next(row for row in rows if row["error"])["pixel_shares"] == []
    for row in good:
        assert sum(one["share"] for one in row["pixel_shares"]) == pytest.approx(1)
        assert row["label"] == row["pixel_shares"][0]["label"]
        assert row["probability"] is None
    written = sorted(path.name for path in (tmp_path / "overlays").iterdir())
    assert written == [
        *(f"00000{number}-{number}{kind}" for number in range(3) for kind in (".mask.png", ".png")),
        "legend-task0.json",
        "legend-task0.png",
    ]
    check_overlay(engine, photos / "1.png", tmp_path / "overlays", good)
    with pytest.raises(UsageError, match="exists"):
        infer(settings)
    infer(InferSettings(engine.folder.path, (str(photos),), outputs, ("task0",), overwrite=True))
    assert len(list((tmp_path / "overlays").iterdir())) == 8


def check_overlay(engine, photo, folder, rows):
    """Sizes, classes and colours of one picture's files."""
    picture = np.asarray(Image.open(photo).convert("RGB")).astype(float)
    with Image.open(folder / "000001-1.mask.png") as image:
        assert image.mode == "P"
        assert image.size == (100, 80)
        mask = np.asarray(image)
    overlay = np.asarray(Image.open(folder / "000001-1.png")).astype(float)
    assert overlay.shape == (80, 100, 3)
    seen = engine.segment([photo], "task0")[0].mask
    assert np.array_equal(mask, mask_of_image(seen, engine.preprocess("task0"), 100, 80))
    assert np.abs(overlay - (picture + palette(5)[mask]) / 2).max() <= 0.51
    shares = {
        one["label"]: one["share"]
        for one in next(row for row in rows if row["source"].endswith("1.png"))["pixel_shares"]
    }
    for index, label in enumerate(LABELS[0]):
        assert shares.get(label, 0.0) == pytest.approx((seen == index).mean())
    legend = json.loads((folder / "legend-task0.json").read_text())
    assert [one["label"] for one in legend] == list(LABELS[0])
    assert [one["colour"] for one in legend] == palette(5).tolist()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["-o", "rows.csv"], "a segmentation cannot be written to 'rows.csv'"),
        (["-o", "csv:-"], "a segmentation cannot be written to 'csv:-'"),
        (["-o", "film.mp4"], "a segmentation cannot be written to 'film.mp4'"),
        (["--labels", "folder"], "--labels is for classifications"),
        (["--smooth", "1"], "--smooth is for classifications"),
        (["--executor", "ray"], "--executor ray is for classifications"),
    ],
)
def test_what_masks_have_no_use_for_is_refused(photos, more, words):
    told = CliRunner().invoke(cli, ["infer", str(engine_of("sa2vp", "linear")), str(photos), "--task", "task0", *more])
    assert told.exit_code == 2, told.output
    assert words in told.output


def test_strangers_in_a_folder_of_overlays_stay(photos, tmp_path):
    (tmp_path / "overlays").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "overlays" / "mine.png")
    settings = InferSettings(engine_of("sa2vp", "linear"), (str(photos),), (f"{tmp_path}/overlays/",), ("task0",),
                             overwrite=True)  # fmt: skip
    with pytest.raises(UsageError, match=r"mine\.png was not written by prompttune"):
        infer(settings)


def test_server_and_bench_refuse_segmentations(tmp_path):
    with pytest.raises(EngineError, match="segmentation: the server does not answer such tasks"):
        make_service(EngineSettings(str(engine_of("sa2vp", "linear"))))
    told = CliRunner().invoke(cli, ["bench", str(engine_of("sa2vp", "linear"))])
    assert told.exit_code == 1
    assert "segmentation: prompttune bench does not time such tasks" in told.output


def test_formats_that_are_not_proven_are_refused(tmp_path):
    with pytest.raises(UsageError, match="segmentation: the format aoti"):
        pt.export_engine([saved("sa2vp", "linear", 0)], tmp_path / "engine", format="aoti")
    assert not (tmp_path / "engine").exists()


def test_mixing_kinds_in_one_export_is_refused(tmp_path):
    from tests.engines import checkpoint

    with pytest.raises(EngineError, match="its task type is segmentation"):
        pt.export_engine({"a": checkpoint("sa2vp", 0), "b": saved("sa2vp", "linear", 0)}, tmp_path / "engine")


def test_manifests_of_classifications_name_no_segmentation():
    manifest = EngineFolder(exported("linear")).manifest
    values = manifest.to_dict()
    assert "segmentation" not in values
    assert Fit.of_manifest(manifest).task_type == ClassificationConfig()
    assert engine_model(manifest, tiny()).task_type == ClassificationConfig()


def test_map_figures_are_those_of_places_as_rows():
    random = np.random.default_rng(0)
    expected_ = random.standard_normal((3, 4, 5, 6), dtype=np.float32)
    found = expected_ + random.standard_normal((3, 4, 5, 6), dtype=np.float32) * 0.2
    maps, rows = MapTally(), DifferenceTally()
    maps.add(expected_, found)
    rows.add(*(one.transpose(0, 2, 3, 1).reshape(-1, 4) for one in (expected_, found)))
    one, other = maps.result("a", "state", 3), rows.result("a", "state", 3)
    assert (one.images, one.pixels, other.images) == (3, 90, 90)
    assert one.disagreements == other.disagreements > 0
    for name in ("max_abs", "mean_abs", "median_abs", "max_rel", "mean_rel", "kl_mean", "kl_max", "agreement", "margin",
                 "disagreement_margin", "decided_agreement"):  # fmt: skip
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-6), name


def test_a_place_that_is_not_finite_agrees_with_nothing():
    expected_, tally = np.zeros((1, 2, 2, 2), dtype=np.float32), MapTally(1e-4)
    found = expected_.copy()
    found[0, 0, 0, 0] = np.nan
    tally.add(expected_, found)
    result = tally.result("a", "state", 1)
    assert np.isnan(result.max_abs)
    assert result.disagreements == 1
    assert result.ties == 0


def test_more_classes_than_a_mask_tells_apart_are_not_scored():
    source = ArraySource(np.zeros((2, 8, 8, 3), np.uint8), [0, 1], ["more", "a0"], "greys")
    labels = [f"a{number}" for number in range(255)]
    chosen = Chosen([source], "val", "greys")
    made = Labelled(chosen, pt.SegmentationConfig(), labels, own=True, strict=False)
    assert made.matched is None
    assert made.load(0)[1] == 0
    with pytest.raises(DataError, match="256 classes together, masks tell 255 apart"):
        Labelled(chosen, pt.SegmentationConfig(), labels, own=True, strict=True)


def test_an_unknown_task_type_is_one_line(tmp_path):
    folder = shutil.copytree(exported("linear"), tmp_path / "engine")
    reseal(folder / "engine.json", lambda values: values.update(task_type={"name": "depth"}))
    with pytest.raises(EngineError, match="task type does not fit this prompttune: unknown task type 'depth'"):
        pt.validate_engine(folder)


def test_borders_between_classes_are_ties():
    expected_ = np.zeros((1, 2, 4, 4), dtype=np.float32)
    expected_[0, 0], expected_[0, 1] = 1.0, 0.5
    expected_[0, 1, 0, 0] = 1.0 - 1e-6
    found = expected_.copy()
    found[0, 1, 0, 0] = 1.0 + 1e-6
    gate = Gate().suiting(pt.SegmentationConfig())
    tally = MapTally(gate.noise)
    tally.add(expected_, found)
    result = tally.result("a", "state", 1)
    assert (result.disagreements, result.ties, result.decided_agreement) == (1, 1, 1.0)
    found[0, 1, 1, 1] = 2.0
    tally.add(expected_, found)
    assert tally.result("a", "state", 1).decided_agreement == pytest.approx(1 - 1 / 32)


@pytest.mark.parametrize(
    ("settings", "size", "box"),
    [
        ({}, (100, 80), (0, 0, 100, 80)),
        ({"crop_pct": 0.5}, (100, 80), (25, 20, 75, 60)),
        ({"crop_mode": "center"}, (100, 80), (10, 0, 90, 80)),
    ],
)
def test_masks_lie_where_the_task_looked(settings, size, box):
    preprocess = Preprocess(8, (0.5,) * 3, (0.5,) * 3, **settings)
    assert seen_box(preprocess, *size) == box
    mask = mask_of_image(np.ones((8, 8), np.uint8), preprocess, *size)
    assert mask.shape == (80, 100)
    rows, columns = np.nonzero(mask == 1)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == box
    assert (mask != 1).sum() == (mask == 255).sum()


@pytest.mark.parametrize("crop_mode", ["squash", "center"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.01])
def test_of_a_strip_the_task_sees_at_least_a_pixel(crop_mode, crop_pct):
    preprocess = Preprocess(8, (0.5,) * 3, (0.5,) * 3, crop_pct=crop_pct, crop_mode=crop_mode)
    for width, height in [(100, 1), (1, 100), (101, 1), (1, 1), (2, 3)]:
        left, upper, right, lower = seen_box(preprocess, width, height)
        assert 0 <= left < right <= width
        assert 0 <= upper < lower <= height
        mask = mask_of_image(np.ones((8, 8), np.uint8), preprocess, width, height)
        assert (mask == 1).sum() == (right - left) * (lower - upper)


def test_colours_tell_classes_apart():
    colours = palette(150).astype(int)
    assert len(np.unique(colours, axis=0)) == 150
    assert np.abs(colours[:5, None] - colours[None, :5]).sum(axis=-1)[~np.eye(5, dtype=bool)].min() > 60
    assert np.array_equal(palette(5), palette(150)[:5])
