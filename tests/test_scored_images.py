"""Which images are scored: those that a run held out, those of the data that were given, classes that differ."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from prompttune.cli.main import cli
from prompttune.data import load_parts
from prompttune.errors import CheckpointError, DataError, UsageError
from prompttune.evaluation import Tally
from prompttune.evaluation.scored import choose_split, match_classes
from prompttune.training import TrainConfig, evaluate, train
from prompttune.training.held_out import HeldOut
from tests.data_helpers import picture, write_classes
from tests.segmenting import write_blocks
from tests.training_helpers import config, no_pictures, one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

CLASSES = {"cat": 10, "dog": 10}


def settings(data: Path, output: Path, **changes: Any) -> TrainConfig:
    return config(data, output, **{"method": "linear", "epochs": 1, **changes})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("data") / "pets", CLASSES)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(settings(data, tmp_path_factory.mktemp("runs") / "pets")).path


@pytest.fixture
def own(data: Path, run: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Data and run of a test's own."""
    copy = shutil.copytree(data, tmp_path / "pets")
    kept = shutil.copytree(run, tmp_path / "run")
    file = kept / "train_config.yaml"
    file.write_text(file.read_text().replace(str(data), str(copy)))
    return copy, kept


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [*map(str, arguments), "--quiet"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def scored(*arguments: object) -> dict[str, Any]:
    result = invoke("evaluate", *arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


# -- the images that a run held out


def test_a_run_lists_its_held_out_images_with_digests(data: Path, run: Path) -> None:
    listed = json.loads((run / "held_out.json").read_text())
    assert (listed["format_version"], listed["train_images"], len(listed["images"])) == (1, 16, 4)
    for one in listed["images"]:
        assert one["label"] == one["image"].split("/")[0]
        assert one["sha256"] == hashlib.sha256((data / one["image"]).read_bytes()).hexdigest()


def test_a_grown_folder_changes_nothing_about_what_a_run_is_scored_on(own: tuple[Path, Path]) -> None:
    folder, kept = own
    held = {one["image"] for one in json.loads((kept / "held_out.json").read_text())["images"]}
    before = scored(kept)
    for number in range(7):
        picture(900 + number).save(folder / "cat" / f"0-new-{number}.png")
        picture(950 + number).save(folder / "dog" / f"z{number}.png")
    (folder / "emu").mkdir()
    picture(999).save(folder / "emu" / "a.png")
    after = scored(kept)
    assert (after["n"], after["top1"], after["loss"]) == (4, before["top1"], before["loss"])
    assert (after["notes"], after["unseen"]) == ([], {})
    train_part = scored(kept, "--split", "train")
    assert train_part["n"] == 20 + 14 + 1 - len(held)
    assert "trained on 16 images, and now 31 are there" in train_part["notes"][0]
    assert scored(kept, "--split", "all")["n"] == 35


def test_training_images_are_scored_without_those_held_out(run: Path) -> None:
    result = scored(run, "--split", "train")
    assert (result["n"], result["notes"], result["split"]) == (16, [], "train")
    assert scored(run, "--split", "all")["n"] == 20
    assert scored(run, "--limit", "2")["n"] == 2
    failed = invoke("evaluate", run, "--split", "test")
    assert (failed.exit_code, failed.stderr.count("\n")) == (1, 1)
    assert "has no split test, it has no splits" in failed.stderr


@pytest.mark.parametrize("change", ["missing", "changed"])
def test_a_held_out_image_that_is_missing_or_another_one_is_named(own: tuple[Path, Path], change: str) -> None:
    folder, kept = own
    name = json.loads((kept / "held_out.json").read_text())["images"][1]["image"]
    if change == "missing":
        (folder / name).unlink()
    else:
        picture(77).save(folder / name)
    failed = invoke("evaluate", kept)
    assert (failed.exit_code, failed.stderr.count("\n")) == (1, 1)
    assert f"1 of the 4 images that the run held out are {change} in {folder}: {name}; restore" in failed.stderr
    assert scored(kept, "--data", folder)["n"] >= 19


def test_a_held_out_image_of_a_table_that_is_labelled_anew_is_named(tmp_path: Path, data: Path) -> None:
    table = data.parent / "pets.csv"
    names = sorted(path.relative_to(data.parent).as_posix() for path in data.glob("*/*.png"))
    rows = {name: name.split("/")[1] for name in names}
    table.write_text("path,label\n" + "".join(f"{name},{label}\n" for name, label in rows.items()))
    kept = train(settings(table, tmp_path / "run")).path
    assert scored(kept)["n"] == 4
    name = json.loads((kept / "held_out.json").read_text())["images"][0]["image"]
    rows[name] = "dog" if rows[name] == "cat" else "cat"
    table.write_text("path,label\n" + "".join(f"{one},{label}\n" for one, label in rows.items()))
    assert f"labelled anew in {table}: {name}" in invoke("evaluate", kept).stderr


def test_a_run_of_an_earlier_version_is_split_anew_and_says_so(own: tuple[Path, Path]) -> None:
    kept = own[1]
    before = scored(kept)
    (kept / "held_out.json").unlink()
    result = scored(kept)
    assert (result["n"], result["top1"]) == (before["n"], before["top1"])
    assert "no held_out.json, an earlier version trained it" in result["notes"][0]


@pytest.mark.parametrize("text", ["{", '{"format_version": 2}', '{"format_version": 1, "images": [1]}'])
def test_a_damaged_list_is_one_line(own: tuple[Path, Path], text: str) -> None:
    (own[1] / "held_out.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"held_out\.json") as caught:
        evaluate(own[1], device="cpu")
    assert "\n" not in str(caught.value)


def test_built_in_data_are_listed_by_name(tmp_path: Path) -> None:
    kept = train(settings(Path("demo/digits"), tmp_path / "run", limit=20)).path
    images = json.loads((kept / "held_out.json").read_text())["images"]
    assert all(one["image"].startswith("demo/digits/val[") and one["sha256"] is None for one in images)
    assert (scored(kept)["n"], scored(kept, "--split", "train")["n"]) == (20, 20)


def test_a_run_whose_validation_images_changed_is_not_resumed(own: tuple[Path, Path], tmp_path: Path) -> None:
    folder = own[0]
    train(settings(folder, tmp_path / "longer"))
    name = HeldOut.read(tmp_path / "longer").images[0].image  # type: ignore[union-attr]
    (folder / name).rename((folder / name).with_name("zzz.png"))  # as many images as before
    with pytest.raises(UsageError, match=r"cannot resume .* has changed since it began: .* held_out\.json"):
        train(settings(folder, tmp_path / "longer", epochs=2), resume=True)


def test_a_list_that_a_kill_came_before_is_written_when_the_run_goes_on(own: tuple[Path, Path], tmp_path: Path) -> None:
    kept = train(settings(own[0], tmp_path / "longer")).path
    before = (kept / "held_out.json").read_text()
    (kept / "held_out.json").unlink()
    train(settings(own[0], tmp_path / "longer", epochs=2), resume=True)
    assert (kept / "held_out.json").read_text() == before


# -- data that are given


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "splits"
    for number, (split, count) in enumerate((("train", 5), ("val", 3), ("test", 8))):
        write_classes(folder / split, {"cat": count, "dog": count}, start=300 + 100 * number)
    return folder


@pytest.mark.parametrize(
    ("given", "split", "n", "told"),
    [
        ("", None, 6, "val"),
        ("", "test", 16, "test"),
        ("", "train", 10, "train"),
        ("", "all", 32, "all"),
        ("test", None, 16, "all"),
        ("test", "all", 16, "all"),
    ],
)
def test_data_are_scored_as_they_were_given(
    run: Path, parts: Path, given: str, split: str | None, n: int, told: str
) -> None:
    result = scored(run, "--data", parts / given, *([] if split is None else ["--split", split]))
    assert (result["n"], result["split"]) == (n, told)


def test_what_was_scored_is_told(run: Path, parts: Path) -> None:
    told = invoke("evaluate", run, "--data", parts)
    assert f"scored 6 images: the split val of {parts}, which has train, val, test" in told.stderr
    told = invoke("evaluate", run, "--data", parts / "test")
    assert f"scored 16 images: all images of {parts / 'test'}" in told.stderr
    failed = invoke("evaluate", run, "--data", parts / "test", "--split", "val")
    assert f"{parts / 'test'} has no split val, it has no splits" in failed.stderr


def test_a_data_set_with_a_test_split_alone_beside_training_scores_that(run: Path, parts: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(parts / split, tmp_path / split)
    assert (scored(run, "--data", tmp_path)["n"], scored(run, "--data", tmp_path)["split"]) == (16, "test")


def test_the_runs_own_folder_as_data_is_scored_whole_with_a_word(run: Path, data: Path) -> None:
    result = scored(run, "--data", data)
    assert result["n"] == 20
    assert "trained on images of these data; without --data" in result["notes"][0]


# -- classes that differ


def test_a_test_set_that_lacks_a_class_is_scored(run: Path, tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "test", {"cat": 6}, start=500)
    result = scored(run, "--data", folder)
    assert (result["n"], result["per_class"]["dog"]) == (6, None)
    assert result["notes"] == ["no images of 1 of the 2 classes: dog; they have no figures"]
    (folder / "dog").mkdir()
    assert scored(run, "--data", folder)["top1"] == result["top1"]


def test_images_of_a_class_that_the_run_never_saw_are_wrong_everywhere(run: Path, tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "test", {"cat": 6, "dog": 6}, start=500)
    before = scored(run, "--data", folder)
    write_classes(folder, {"emu": 3, "ant": 1}, start=600)
    result = scored(run, "--data", folder)
    assert result["n"] == 16
    assert result["top1"] == pytest.approx(before["top1"] * 12 / 16)
    assert result["top5"] == pytest.approx(12 / 16)
    assert result["loss"] == pytest.approx(before["loss"])
    assert result["unseen"] == {"emu": 3, "ant": 1}
    assert result["per_class"]["emu"] == 0
    assert sum(result["confusion"]["emu"].values()) == 3
    assert result["notes"] == ["4 images of the classes ant, emu, which the model does not have, are counted as wrong"]
    assert invoke("evaluate", run, "--data", folder, "--report", tmp_path / "report").exit_code == 0
    assert "4 images of the classes ant, emu" in (tmp_path / "report" / "evaluation.html").read_text()
    alone = write_classes(tmp_path / "alone", {"emu": 3, "ant": 1}, start=600)
    failed = invoke("evaluate", run, "--data", alone)
    assert (failed.exit_code, failed.stderr.count("\n")) == (1, 1)
    assert "only in the data: ant, emu; only in the model: cat, dog" in failed.stderr


def test_unseen_classes_in_the_figures_by_hand() -> None:
    tally = Tally(2, unseen=1)
    tally.add_logits([[2.0, 0.0], [0.0, 2.0], [3.0, 0.0], [np.nan, 0.0]], [0, 0, 2, 2])
    result = tally.result(["a", "b", "c"])
    assert (result.top1, result.top5, result.n) == (0.25, 0.5, 4)
    assert result.loss == pytest.approx((np.log1p(np.exp(-2)) + np.log1p(np.exp(2))) / 2)
    assert result.report["a"].precision == 0.5
    assert result.balanced_accuracy == 0.25
    assert result.calibration.counts.sum() == 3
    with pytest.raises(ValueError, match="for 2 classes"):
        tally.add([2], [2], [0.5])


def test_classes_are_matched_by_name_in_every_source(parts: Path, tmp_path: Path) -> None:
    sources = [
        load_parts(str(parts)).named["val"],
        load_parts(str(write_classes(tmp_path, {"emu": 1, "dog": 1}))).named["all"],
    ]
    matched = match_classes(sources, ["dog", "cat"])
    assert (matched.labels, matched.unseen) == (("dog", "cat", "emu"), 1)
    assert [one.tolist() for one in matched.columns] == [[1, 0], [0, 2]]
    with pytest.raises(DataError, match="has no split test, it has only train and all"):
        choose_split({"train": 1, "all": 2}, "data", "test")


# -- segmentations


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = write_blocks(tmp_path_factory.mktemp("data") / "blocks", (4, 3))
    output = tmp_path_factory.mktemp("runs") / "blocks"
    return folder, train(settings(folder, output, task="segmentation")).path


def test_a_segmentation_is_scored_on_what_it_held_out(blocks: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(blocks[0], tmp_path / "blocks")
    kept = train(settings(folder, tmp_path / "run", task="segmentation")).path
    before = scored(kept)
    for part in ("images", "annotations"):
        shutil.copy(folder / part / "training" / "0.png", folder / part / "validation" / "9.png")
    assert (scored(kept)["n"], scored(kept)["miou"]) == (3, before["miou"])
    assert scored(kept, "--data", folder)["n"] == 4
    assert scored(kept, "--split", "train")["n"] == 4
    mask = folder / "annotations" / "validation" / "1.png"
    Image.fromarray(np.full((64, 64), 2, np.uint8)).save(mask)
    assert "are changed in" in invoke("evaluate", kept).stderr
    assert "images/validation/1.png" in invoke("evaluate", kept).stderr


def test_masks_without_splits_are_scored_whole_and_classes_may_differ(
    blocks: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, kept = blocks
    for part in ("images", "annotations"):
        shutil.copytree(folder / part / "validation", tmp_path / "test" / part)
    (tmp_path / "test" / "classes.txt").write_text("green\nred\npurple\n")  # 1, 2 and 3
    result = scored(kept, "--data", tmp_path / "test")
    assert (result["n"], result["split"]) == (3, "all")
    assert result["iou"]["purple"] == 0
    assert result["unseen"]["purple"] == result["class_pixels"]["purple"] > 0
    assert "no pixels of 1 of the 3 classes: blue" in result["notes"][0]
    assert "of class purple, which the model does not have, are counted as wrong" in result["notes"][1]
