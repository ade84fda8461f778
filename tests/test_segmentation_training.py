"""Masks, their transforms, the figures of a segmentation, and a training that learns."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import prompttune as pt
from prompttune.cli.main import cli
from prompttune.data import Augment, load_data, make_loader
from prompttune.errors import DataError, UsageError
from prompttune.images.joint import JointTransform
from prompttune.images.masks import indexed
from prompttune.images.preprocess import Preprocess
from prompttune.task_types.segmentation.figures import PixelScores
from prompttune.training import TrainConfig, evaluate, train
from tests.segmenting import write_ade20k, write_blocks

GREY = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def settings(output, **own):
    values = {
        "backbone": "test_vit",
        "weights": "random",
        "image_size": 64,
        "method": "linear",
        "task_type": "segmentation",
        "data": "demo/shapes-seg",
        "output": str(output),
        "epochs": 1,
        "batch_size": 16,
        "device": "cpu",
        "tensorboard": False,
    }
    return TrainConfig.from_flat({**values, **own})


def test_figures_by_hand():
    tally = PixelScores(3)
    #            right, right, 1 for 0, ignored, 2 for 1
    tally.count(np.array([[[0, 1, 1, 2, 2]]]), np.array([[[0, 1, 0, 255, 1]]]))
    found = tally.result(["a", "b", "c"])
    assert found.confusion.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert found.iou == {"a": 1 / 2, "b": 1 / 3, "c": 0.0}
    assert found.miou == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert found.pixel_accuracy == 2 / 4
    assert found.pixels == 4
    assert found.n == 1


def test_a_class_that_is_nowhere_has_no_iou():
    tally = PixelScores(2)
    tally.count(np.zeros((2, 1, 3), dtype=int), np.zeros((2, 1, 3), dtype=int))
    assert tally.result(["a", "b"]).iou == {"a": 1.0, "b": None}
    assert tally.result(["a", "b"]).miou == 1.0


def test_nothing_to_score_is_told():
    tally = PixelScores(2)
    tally.count(np.zeros((1, 2, 2), dtype=int), np.full((1, 2, 2), 255))
    with pytest.raises(DataError, match="no pixel could be scored"):
        tally.result(["a", "b"])


def test_loss_is_the_mean_of_known_pixels():
    logits = torch.randn(2, 3, 4, 4)
    targets = torch.randint(0, 3, (2, 4, 4))
    targets[0, :2] = 255
    known = [-logits[b, :, y, x].log_softmax(0)[targets[b, y, x]]
             for b in range(2) for y in range(4) for x in range(4) if targets[b, y, x] != 255]  # fmt: skip
    assert len(known) == 24
    assert pt.SegmentationConfig().loss(logits, targets).item() == pytest.approx(
        torch.stack(known).mean().item(), rel=1e-5
    )
    assert pt.SegmentationConfig().loss(logits, torch.full_like(targets, 255)).item() == 0
    scores = PixelScores(3)
    scores.add(logits, targets)
    assert scores.result(["a", "b", "c"]).loss == pytest.approx(torch.stack(known).mean().item(), rel=1e-5)


def test_shapes_have_exact_masks():
    splits = load_data("demo/shapes-seg", target="mask")
    assert (len(splits.train), len(splits.val)) == (600, 200)
    assert splits.classes == ["background", "square", "ellipse", "heart", "arrow"]
    seen = set()
    for index in range(8):
        image, mask = splits.val.load(index)
        pixels = np.asarray(image).astype(int)
        assert mask.shape == (64, 64)
        assert image.size == (64, 64)
        assert 1 + index % 4 in np.unique(mask)
        # A pixel that is wholly background has the colour of one corner that is background.
        background = np.median(pixels[mask == 0], axis=0)
        inside = mask > 0
        away = np.abs(pixels - background).sum(axis=-1) > 60
        assert (away == inside).mean() > 0.97
        seen |= set(np.unique(mask).tolist())
    assert seen == {0, 1, 2, 3, 4}
    assert np.array_equal(splits.val.load(3)[1], load_data("demo/shapes-seg", target="mask").val.load(3)[1])


@pytest.mark.parametrize("names", ["classes.txt", "objectInfo150.txt", None])
def test_ade20k_folders(tmp_path, names):
    splits = load_data(str(write_ade20k(tmp_path, names)), target="mask")
    assert splits.classes == (["1", "2"] if names is None else ["wall", "floor"])
    assert (len(splits.train), len(splits.val)) == (2, 1)
    image, mask = splits.train.load(1)
    assert image.size == (40, 30)
    assert mask.shape == (30, 40)
    assert mask[0, 0] == 0
    assert mask[-1, 0] == 1
    assert mask[-1, -1] == 255


def test_zero_can_be_a_class(tmp_path):
    folder = write_ade20k(tmp_path)
    (folder / "classes.txt").write_text("nothing\nwall\nfloor\n")
    splits = load_data(str(folder), reduce_zero_label=False, target="mask")
    assert np.unique(splits.val.load(0)[1]).tolist() == [0, 1, 2]
    assert indexed(np.array([[0, 5, 255]]), True).tolist() == [[255, 4, 255]]
    assert indexed(np.array([[0, 5, 255]]), False).tolist() == [[0, 5, 255]]


def test_bad_data_is_told_in_one_line(tmp_path):
    with pytest.raises(DataError, match=r"no data at .*/nowhere; give a folder with images/training"):
        load_data(str(tmp_path / "nowhere"), target="mask")
    with pytest.raises(UsageError, match="demo/digits has a class for each image, and the task needs a mask"):
        load_data("demo/digits", target="mask")
    folder = write_ade20k(tmp_path / "data")
    (folder / "annotations" / "training" / "1.png").unlink()
    with pytest.raises(DataError, match=r"1\.jpg has no annotation 1\.png"):
        load_data(str(folder), target="mask")
    folder = write_ade20k(tmp_path / "other")
    (folder / "annotations" / "validation").rename(folder / "aside")
    with pytest.raises(DataError, match=r"no folder .*annotations/validation"):
        load_data(str(folder), target="mask")


@pytest.mark.parametrize("names", ["classes.txt", "objectInfo150.txt"])
def test_class_names_in_another_encoding_are_told_in_one_line(tmp_path, names):
    folder = write_ade20k(tmp_path, names)
    with (folder / names).open("a", encoding="latin-1") as stream:
        stream.write("3\t.5\t1\t1\tTür\n")
    with pytest.raises(DataError, match=rf"{names} line \d+ is not in UTF-8: save") as caught:
        load_data(str(folder), target="mask")
    assert "\n" not in str(caught.value)


def declare(path, width, height):
    """A PNG whose header promises more pixels than it has."""
    Image.new("L", (1, 1)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: Image.new("RGB", (40, 30)).save(path), "has colours (RGB)"),
        (lambda path: Image.new("L", (30, 30)).save(path), "has 30 x 30 pixels, the image 40 x 30"),
        (lambda path: Image.new("L", (40, 30), 9).save(path), "has the number 9, which is not a class"),
        (lambda path: path.write_bytes(b"no picture"), "the annotation 0.png cannot be read (not an image"),
        (lambda path: declare(path, 60_000, 60_000), "the annotation 0.png cannot be read (Image size (3600000000"),
    ],
)
def test_a_bad_annotation_is_one_unreadable_image(tmp_path, write, words):
    folder = write_ade20k(tmp_path)
    write(folder / "annotations" / "training" / "0.png")
    source = load_data(str(folder), target="mask").train
    loader = make_loader(source, JointTransform(Preprocess(16, **GREY)), batch_size=4, shuffle=False, seed=0)
    (batch,) = list(loader)
    assert batch.targets.shape == (1, 16, 16)
    assert len(batch.corrupt) == 1
    assert words in batch.corrupt[0]


def test_annotations_that_declare_too_much_are_left_out_of_the_numbers(tmp_path):
    folder = write_ade20k(tmp_path, None)
    declare(folder / "annotations" / "training" / "0.png", 60_000, 60_000)
    assert load_data(str(folder), target="mask").classes == ["1", "2"]


def oriented(path, orientation):
    """Write a picture again with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(path) as picture:
        picture.load()
        picture.save(path, exif=exif)


def test_image_and_annotation_are_turned_together(tmp_path):
    folder = write_ade20k(tmp_path)
    expected_image, expected_mask = load_data(str(folder), target="mask").train.load(1)
    for path in (folder / "images" / "training" / "1.jpg", folder / "annotations" / "training" / "1.png"):
        oriented(path, 6)
    image, mask = load_data(str(folder), target="mask").train.load(1)
    assert image.size == expected_image.size[::-1]
    assert np.array_equal(mask, np.rot90(expected_mask, -1))


@pytest.mark.parametrize(("turned", "found"), [("images", (3, 1)), ("annotations", (1, 3)), (None, (1, 1))])
def test_an_orientation_of_one_of_both_is_one_unreadable_image(tmp_path, turned, found):
    folder = write_ade20k(tmp_path)
    oriented(folder / "images" / "training" / "0.jpg", 3 if turned == "images" else 1)  # 3 keeps the sides
    oriented(folder / "annotations" / "training" / "0.png", 3 if turned == "annotations" else 1)
    source = load_data(str(folder), target="mask").train
    joint = JointTransform(Preprocess(16, **GREY))
    (batch,) = list(make_loader(source, joint, batch_size=4, shuffle=False, seed=0))
    if turned is None:
        assert batch.corrupt == []
    else:
        (line,) = batch.corrupt
        assert f"the image has EXIF orientation {found[0]}, the annotation 0.png has {found[1]}; store both" in line


def test_a_strip_is_one_unreadable_image(tmp_path, monkeypatch):
    folder = write_ade20k(tmp_path)
    for part, kind in (("images", "jpg"), ("annotations", "png")):
        path = folder / part / "training" / f"0.{kind}"
        with Image.open(path) as picture:
            picture.resize((120, 1)).save(path)
    joint = JointTransform(Preprocess(16, **GREY, crop_mode="center"))
    source = load_data(str(folder), target="mask").train
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 16 * 50)
    (batch,) = list(make_loader(source, joint, batch_size=4, shuffle=False, seed=0))
    assert batch.corrupt == [f"{source.describe(0)}: sides of 120 x 1 pixels differ too much to be resized"]
    assert batch.targets.shape == (1, 16, 16)


def coordinates(width, height):
    """An image whose red and green tell where a pixel is, and a mask of the same four quarters."""
    y, x = np.mgrid[:height, :width]
    mask = ((x >= width // 2) + 2 * (y >= height // 2)).astype(np.uint8)
    picture = np.stack(((x >= width // 2) * 255, (y >= height // 2) * 255, 0 * x), axis=-1)
    return Image.fromarray(picture.astype(np.uint8)), mask


def quarters(image):
    """The mask that a transformed image of :func:`coordinates` shows."""
    return (image[0] > 0).int() + 2 * (image[1] > 0).int()


@pytest.mark.parametrize(
    ("preprocess", "augment"),
    [
        ({}, None),
        ({"crop_mode": "center"}, None),
        ({"crop_mode": "center", "crop_pct": 0.8}, None),
        ({"crop_pct": 0.7}, None),
        ({}, Augment(hflip=1.0)),
        ({}, Augment(vflip=1.0)),
        ({}, Augment(scale_min=0.3, hflip=0.5)),
    ],
)
def test_masks_move_with_their_image(preprocess, augment):
    transform = JointTransform(Preprocess(32, **GREY, interpolation="bilinear", **preprocess), augment)
    torch.manual_seed(3)
    for _ in range(3):
        image, mask = transform(*coordinates(60, 48))
        assert image.shape == (3, 32, 32)
        assert mask.shape == (32, 32)
        assert mask.dtype == torch.int64
        assert (quarters(image) == mask).float().mean() > 0.93  # all but the borders, which interpolation blurs
    assert transform.is_exact == (augment is None)


def test_augmentation_that_masks_cannot_follow_is_refused():
    with pytest.raises(UsageError, match="do not follow masks"):
        JointTransform(Preprocess(32, **GREY), Augment.preset("strong"))
    with pytest.raises(UsageError, match="crop_mode squash or center"):
        JointTransform(Preprocess(32, **GREY, crop_mode="border"))


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (
            {"task_type": "classification", "head": "pyramid", "data": "demo/digits"},
            "head pyramid is not for a classification",
        ),
        ({"class_weights": "balanced"}, "class_weights need a class per image"),
        ({"task_type": "depth"}, "unknown task type 'depth'"),
        ({"head": "conv"}, "unknown head 'conv'"),
    ],
)
def test_bad_settings_are_refused(tmp_path, own, words):
    with pytest.raises(UsageError, match=words):
        settings(tmp_path, **own)


def test_runs_from_before_segmentation_can_be_resumed(tmp_path):
    config = settings(tmp_path, task_type="classification", data="demo/digits")
    before = {key: value for key, value in config.to_flat().items()
              if key not in ("task_type", "head", "head_channels", "reduce_zero_label")}  # fmt: skip
    assert config.differences(before) == []
    assert settings(tmp_path).differences(before) != []


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    return write_blocks(tmp_path_factory.mktemp("data") / "blocks")


@pytest.fixture(scope="module")
def learned(blocks, tmp_path_factory):
    """A run that has learned something, and the lines that it told."""
    lines = []
    output = tmp_path_factory.mktemp("runs") / "blocks"
    config = settings(output, data=str(blocks), epochs=6, lr=3e-2, batch_size=8)
    result = train(config, on_progress=lambda news: lines.append(news) if news.phase == "epoch" else None)
    return output, result, lines


def test_a_training_beats_the_largest_class(learned, blocks):
    output, result, _ = learned
    scored = evaluate(output, str(blocks))
    floors = []
    source = load_data(str(blocks), target="mask").val
    for kind in range(3):
        tally = PixelScores(3)
        for index in range(len(source)):
            mask = source.load(index)[1]
            tally.count(np.full_like(mask, kind)[None], mask[None])
        floors.append(tally.result(scored.labels))
    assert max(one.miou for one in floors) < 0.2
    assert scored.miou > 0.5
    assert scored.miou == pytest.approx(result.best_score)
    assert scored.pixel_accuracy > max(one.pixel_accuracy for one in floors) + 0.2


def test_figures_have_their_own_names(learned):
    output, result, lines = learned
    metrics = json.loads((output / "metrics.json").read_text())
    assert {"val_miou", "val_pixel_accuracy", "train_pixel_accuracy"} <= set(metrics["history"][0])
    assert not any("top1" in key for key in metrics["history"][0])
    assert set(metrics["best"]) == {"epoch", "miou", "loss"}
    assert metrics["final"]["miou"] == result.best_score
    assert set(metrics["final"]["iou"]) == {"red", "green", "blue"}
    from prompttune.training.progress import epoch_line

    assert "val mIoU" in epoch_line(lines[0])
    assert "pixel accuracy" in epoch_line(lines[0])
    assert json.loads((output / "prompt_config.json").read_text())["metrics"]["val_miou"] == result.best_score


def test_the_command_line_tells_iou(learned, tmp_path):
    output, result, _ = learned
    told = CliRunner().invoke(cli, ["evaluate", str(output), "--json", "--output", str(tmp_path), "--quiet"])
    assert told.exit_code == 0, told.output
    document = json.loads(told.stdout)
    assert document["miou"] == pytest.approx(result.best_score)
    assert document["pixels"] == 12 * 64 * 64
    assert json.loads((tmp_path / "evaluation.json").read_text()) == document
    assert (tmp_path / "confusion_matrix.png").exists()
    refused = CliRunner().invoke(cli, ["evaluate", str(output), "--report", str(tmp_path)])
    assert refused.exit_code == 2
    assert "--report is for classifications" in refused.output


def test_data_of_other_classes_is_refused(learned, tmp_path):
    with pytest.raises(DataError, match="no class of the data is one of the model's"):
        evaluate(learned[0], str(write_ade20k(tmp_path)))


def test_a_stopped_run_goes_on_to_the_same_end(blocks, tmp_path):
    own = {"data": str(blocks), "epochs": 2, "augment": "light"}
    whole, config = train(settings(tmp_path / "whole", **own)), settings(tmp_path / "parts", **own)

    def stop(news):
        if news.phase == "epoch":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, on_progress=stop)
    parts = train(config, resume=True)
    assert parts.metrics["final"] == whole.metrics["final"]
