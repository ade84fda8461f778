"""What ``prompttune explain`` leaves out, with its reason, and what convolutions and segmentations show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor

from prompttune.backbones import ConvBackbone
from prompttune.cli.main import cli
from prompttune.errors import DataError
from prompttune.explanation.cam import grad_cam, last_layer
from prompttune.explanation.inputs import read_pictures, view
from prompttune.explanation.similarity import cosine_map, grid_of, record_maps
from prompttune.images.preprocess import Preprocess
from prompttune.layers.probe import recording
from prompttune.methods import LinearConfig, SA2VPConfig
from tests.convs import CONVS
from tests.drawing import default_configs, drawn_backbone, drawn_model
from tests.segmenting import drawn_segmentation
from tests.training_helpers import write_folder

SIDE = 64
CONFIGS = {config.method: config for config in default_configs()}
OF_IMAGES = ("attention", "grad-cam", "similarity")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs over a ViT and a ResNet, a segmentation, two images, labelled images."""
    folder = tmp_path_factory.mktemp("explanation-parts")
    vit = drawn_backbone("test_vit", folder, SIDE)
    resnet = drawn_backbone("test_resnet3", folder, SIDE)
    drawn_model(vit, LinearConfig()).save(folder / "runs/lin")
    drawn_model(vit, SA2VPConfig(rank=4)).save(folder / "runs/vit")
    drawn_model(resnet, SA2VPConfig(rank=4)).save(folder / "runs/resnet")
    drawn_segmentation(vit, "sa2vp", "linear", rank=4).save(folder / "runs/seg")
    for name in "ab":
        Image.effect_noise((90, 70), 60).convert("RGB").save(folder / f"{name}.png")
    write_folder(folder / "labelled", train=2, val=3)
    return folder


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def run(folder: Path, words: str, output: str) -> Result:
    """The command; what lies in the folder is named by its path there."""
    paths = [str(folder / word) if (folder / word).exists() else word for word in words.split()]
    report = str(folder / output)
    return CliRunner().invoke(cli, ["explain", *paths, "--output", report, "--quiet", "--device", "cpu", "--json"])


def notes_of(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    notes: list[str] = json.loads(result.stdout)["notes"]
    assert result.stderr.splitlines() == notes
    return notes


# --------------------------------------------------------------- segmentation


def test_a_segmentation_shows_all_but_grad_cam(folder: Path) -> None:
    result = run(folder, "runs/seg runs/lin a.png --data labelled --layers 0", "seg-report")
    assert notes_of(result) == [
        "no grad-cam of seg: a segmentation does not predict a class for the whole image",
        "no values: none of the runs' methods has learned values of one a block, such as GaPT's gates",
    ]
    (first,) = json.loads(result.stdout)["images"]
    assert set(first["predictions"]) == set(first["grad_cam"]) == {"lin"}
    assert set(first["attention"]) == {"plain backbone", "seg", "lin"}
    assert set(first["similarity"]) == {"seg"}
    assert {one.name for one in (folder / "seg-report").glob("*.png")} == {
        *(f"000-a-{part}.png" for part in OF_IMAGES),
        "tsne.png",
    }


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("runs/lin runs/seg a.png --show grad-cam", "no grad-cam of seg: a segmentation does not predict a class"),
        ("runs/seg a.png --label sky", "label 'sky': none of the runs predicts a class of the whole image"),
        ("runs/resnet a.png --show attention", "no attention of resnet: test_resnet3 has no attention"),
        ("runs/resnet a.png --show similarity --layers 0,6", "of resnet: its prompt map is in layers 3 to 5"),
        ("runs/resnet a.png --token 4,0", "outside the map of 4 x 4"),
        ("runs/lin --data labelled --show attention", "no attention: it needs images; give files or folders"),
        ("runs/lin --data labelled --show grad-cam", "no grad-cam: it needs images"),
        ("runs/vit --data labelled --show tsne --show similarity", "no similarity: it needs images"),
        ("runs/vit --data labelled --token 1,1", "no similarity: it needs images"),
        ("runs/lin a.png --show tsne", "no tsne: it needs labelled images; give --data"),
        ("runs/lin a.png --show similarity", "no similarity: none of the runs has a prompt map"),
    ],
)
def test_what_is_asked_for_and_cannot_be_drawn_is_an_error(folder: Path, words: str, line: str) -> None:
    result = run(folder, words, "refused")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert line in result.stderr


@pytest.mark.parametrize(
    ("words", "left_out"),
    [
        ("runs/lin --data labelled", [*OF_IMAGES, "values"]),
        ("runs/resnet --data labelled", [*OF_IMAGES, "values"]),
        ("runs/vit --data labelled --show tsne", []),
        ("runs/lin runs/lin a.png b.png --layers 0", ["tsne", "similarity", "values"]),
    ],
)
def test_each_part_that_is_left_out_has_one_note(folder: Path, words: str, left_out: list[str]) -> None:
    notes = notes_of(run(folder, words, "left-out"))
    assert [note.partition(":")[0] for note in notes] == [f"no {part}" for part in left_out]


# --------------------------------------------------------------- convolutions


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("method", ["sa2vp", "dam-vp"])
def test_grad_cam_of_a_convolution_is_the_hand_written_one(
    name: str, method: str, folder: Path, images: Tensor
) -> None:
    model = drawn_model(drawn_backbone(name, folder, SIDE), CONFIGS[method])
    state = {key: value.detach() for key, value in model.task_state().items()}
    layer, grid = last_layer(model.backbone)
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda *values: kept.append(values[2]))
    logits = model.forward_state(images.clone().requires_grad_(), state).logits
    handle.remove()
    shown = 0
    for target in range(logits.shape[1]):
        (slope,) = torch.autograd.grad(logits[:, target].sum(), kept[-1], retain_graph=True)
        expected = (kept[-1] * slope.mean(dim=(2, 3), keepdim=True)).sum(1).relu().detach()
        assert expected.shape[1:] == grid
        found = grad_cam(model, state, images, target)
        assert torch.allclose(found, expected, atol=1e-5 * max(1.0, float(expected.max())))
        shown += bool(expected.max() > 1e-4)
    assert shown  # a comparison of zeros would prove nothing


@pytest.mark.parametrize("name", CONVS)
def test_the_prompt_map_of_a_convolution_is_compared_place_by_place(name: str, folder: Path, images: Tensor) -> None:
    backbone = drawn_backbone(name, folder, SIDE)
    assert isinstance(backbone, ConvBackbone)
    model = drawn_model(backbone, SA2VPConfig(rank=4))
    state = model.task_state()
    with torch.no_grad(), recording() as recorded:
        model.forward_state(images[:1], state, aux=True)
    image, prompts = record_maps(model, state, images[:1])
    assert list(image) == list(prompts) == [block.index for block in backbone.stages[2].blocks]
    for layer in image:
        whole, asked = recorded[f"block{layer}"][0], recorded[f"block{layer}.prompts"][0]  # [D, R, C]
        grid = grid_of(backbone, layer)
        assert grid == backbone.stages[2].grid == whole.shape[1:]
        found = cosine_map(image[layer], prompts[layer], 1 * grid[1] + 2, grid)
        assert torch.allclose(found, torch.cosine_similarity(whole[:, 1:2, 2:3], asked, dim=0), atol=1e-6)


def test_a_resnet_is_explained_without_attention(folder: Path) -> None:
    result = run(folder, "runs/resnet a.png --point 80,60", "resnet-report")
    assert "no attention of resnet: test_resnet3 has no attention" in notes_of(result)
    assert "windows" not in result.stderr
    assert {one.name for one in (folder / "resnet-report").glob("*.png")} == {
        "000-a-grad-cam.png",
        "000-a-similarity.png",
    }
    (first,) = json.loads(result.stdout)["images"]
    assert first["similarity"]["resnet"]["token"] == [3, 3]


# --------------------------------------------------------------------- strips


@pytest.mark.parametrize(("mode", "refused"), [("center", True), ("border", True), ("squash", False)])
@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_an_image_that_cannot_be_resized_is_unreadable(
    mode: str, refused: bool, size: tuple[int, int], tmp_path: Path
) -> None:
    strip, plain = tmp_path / "strip.png", tmp_path / "z.png"
    Image.new("RGB", size).save(strip)
    Image.new("RGB", (40, 30)).save(plain)
    transform = Preprocess(SIDE, (0.5,) * 3, (0.5,) * 3, crop_mode=mode)
    pictures, corrupt = read_pictures([strip, plain], 9, [Preprocess(SIDE, (0.5,) * 3, (0.5,) * 3), transform])
    assert [one.source for one in pictures] == [str(plain)] if refused else [str(strip), str(plain)]
    line = f"{strip}: sides of {size[0]} x {size[1]} pixels differ too much to be resized"
    assert corrupt == ([line] if refused else [])


def test_the_picture_that_is_shown_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (10, 100)).save(tmp_path / "tall.png")
    transform = Preprocess(56, (0.5,) * 3, (0.5,) * 3, crop_mode="center")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 56 * 56 * 10)  # what the model itself takes is below that
    assert transform.transform()(Image.new("RGB", (10, 100))).shape == (3, 56, 56)
    with pytest.raises(DataError, match="differ too much"):
        read_pictures([tmp_path / "tall.png"], 9, [transform])


def test_a_transform_near_its_bound_is_shown_as_large_as_it_may_be() -> None:
    settings: dict[str, Any] = {"crop_pct": 0.05, "crop_mode": "squash"}
    seen = view(Preprocess(224, (0.5,) * 3, (0.5,) * 3, **settings), Image.new("RGB", (8, 8)))
    assert seen.shape == (224, 224, 3)
