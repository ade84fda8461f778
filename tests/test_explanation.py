"""What ``prompttune explain`` draws: against timm's own tensors, hand-written references, and planted cases."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image, ImageDraw
from torch import Tensor, nn

import prompttune as pt
from prompttune.backbones import VitBackbone
from prompttune.cli.main import cli
from prompttune.errors import DataError, UsageError
from prompttune.evaluation.plots import DPI
from prompttune.explanation import ExplainSettings, drawing
from prompttune.explanation.attention import block_attention
from prompttune.explanation.cam import grad_cam, last_layer
from prompttune.explanation.embedding import embed
from prompttune.explanation.inputs import model_input, token_of, view
from prompttune.explanation.similarity import cosine_map, record_maps
from prompttune.explanation.subjects import ExplainedModel, load_subjects
from prompttune.images.preprocess import Preprocess
from prompttune.layers.probe import recording
from prompttune.methods import METHODS, GaPTConfig, LSPTConfig, SA2VPConfig
from tests.drawing import default_configs, drawn_backbone, drawn_model
from tests.evas import as_vit
from tests.test_report import Page
from tests.training_helpers import write_folder

SIDE = 64
CONFIGS = {config.method: config for config in default_configs()}
PROMPTED = ("lspt", "gapt", "vpt-shallow", "vpt-deep", "e2vpt", "expres")
"""Methods whose prompts are tokens, or keys, beside the image's."""
SPATIAL = ("sa2vp", "lspt", "vpt-shallow", "adaptformer", "adapter")
"""Methods whose probes are what enters the next block unchanged."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("explanation")


@pytest.fixture(scope="module")
def vit(folder: Path) -> pt.Backbone:
    return drawn_backbone("test_vit", folder, SIDE)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def subject_of(model: pt.PromptModel) -> ExplainedModel:
    return load_subjects([model], torch.device("cpu"))[1]


def timm_weights(backbone: pt.Backbone, layer: int, tokens: Tensor) -> Tensor:
    """Softmax from the output of timm's own qkv layer, [B, H, N, N]."""
    assert isinstance(backbone, VitBackbone)
    block = backbone.blocks[layer].timm
    kept: list[Tensor] = []
    handle = block.attn.qkv.register_forward_hook(lambda *values: kept.append(values[2]))
    with torch.no_grad():
        block(tokens)
    handle.remove()
    heads = block.attn.num_heads
    q, k, _ = kept[0].unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, N, d] each
    q, k = block.attn.q_norm(q), block.attn.k_norm(k)
    return torch.einsum("bhnd,bhmd->bhnm", q, k).div(q.shape[-1] ** 0.5).softmax(dim=-1).detach()


# ------------------------------------------------------------------ attention


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_eva"])
def test_the_plain_backbones_attention_is_timms(name: str, folder: Path, images: Tensor) -> None:
    backbone = drawn_backbone(name, folder, SIDE)
    plain = ExplainedModel("plain", backbone, backbone.default_preprocess())
    assert isinstance(backbone, VitBackbone)
    found = block_attention(plain, images, list(range(backbone.depth)))
    tokens = backbone.embed(images)
    for layer in range(backbone.depth):
        weights = timm_weights(as_vit(backbone), layer, tokens)
        pooled = weights[:, :, 0] if backbone.pools_class_token else weights[:, :, backbone.num_prefix_tokens :].mean(2)
        assert torch.allclose(found[layer].weights, pooled, atol=1e-5)
        assert torch.allclose(found[layer].weights.sum(-1), torch.ones(()), atol=1e-5)
        assert torch.equal(found[layer].maps.flatten(2), found[layer].weights[..., backbone.num_prefix_tokens :])
        with torch.no_grad():
            tokens = backbone.blocks[layer].run_timm(tokens)


@pytest.mark.parametrize("method", SPATIAL)
def test_a_runs_attention_is_timms_on_what_enters_the_block(method: str, vit: pt.Backbone, images: Tensor) -> None:
    model = drawn_model(vit, CONFIGS[method])
    with torch.no_grad(), recording() as recorded:
        model.forward_state(images, model.task_state())
    found = block_attention(subject_of(model), images, list(range(1, vit.depth)))
    for layer in range(1, vit.depth):
        weights = timm_weights(vit, layer, recorded[f"block{layer - 1}"])
        assert torch.allclose(found[layer].weights, weights[:, :, 0], atol=1e-5)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "bitfit"])  # it runs timm's own attention
def test_every_method_shows_its_attention_and_answers_the_same(method: str, vit: pt.Backbone, images: Tensor) -> None:
    subject = subject_of(drawn_model(vit, CONFIGS[method]))
    with torch.no_grad():
        before = subject.features(images)
    found = block_attention(subject, images, list(range(vit.depth)))
    with torch.no_grad():
        assert torch.equal(subject.features(images), before)
    for block in found.values():
        assert torch.allclose(block.weights.sum(-1), torch.ones(()), atol=1e-5)
        shares = block.shares()
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert (shares["prompts"] > 0) == (method in PROMPTED)


@pytest.mark.parametrize("method", ["sa2vp", "gapt"])
def test_watching_changes_no_bit(
    method: str, vit: pt.Backbone, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_of(drawn_model(vit, CONFIGS[method]))
    with torch.no_grad():
        plain = subject.features(images)
    watched: list[Tensor] = []
    monkeypatch.setattr(ExplainedModel, "features", _keeping(ExplainedModel.features, watched))
    block_attention(subject, images, [0, vit.depth - 1])
    assert len(watched) == 1
    assert torch.equal(watched[0], plain)


def _keeping(features: Any, kept: list[Tensor]) -> Any:
    def keep(subject: ExplainedModel, images: Tensor) -> Tensor:
        kept.append(features(subject, images))
        return kept[-1]

    return keep


def test_a_temperature_sharpens_gapts_attention(vit: pt.Backbone, images: Tensor) -> None:
    model = drawn_model(vit, GaPTConfig(num_prompts=3))
    model.method.temperatures.data.fill_(1.0)
    warm = block_attention(subject_of(model), images, [0])[0].weights
    model.method.temperatures.data[0] = 0.1
    cold = block_attention(subject_of(model), images, [0])[0].weights
    expected = (warm.log() * 10).softmax(dim=-1)
    assert torch.allclose(cold, expected, atol=1e-4)
    assert not torch.allclose(cold, warm, atol=1e-2)


# ------------------------------------------------------------------- Grad-CAM


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("test_vit", "lspt"),
        ("test_vit", "sa2vp"),
        ("test_vit2", "vpt-deep"),
        ("test_eva", "sa2vp"),
        ("test_swin", "sa2vp"),
    ],
)
def test_grad_cam_is_the_hand_written_one(name: str, method: str, folder: Path, images: Tensor) -> None:
    model = drawn_model(drawn_backbone(name, folder, SIDE), CONFIGS[method])
    state = {key: value.detach() for key, value in model.task_state().items()}
    layer, (rows, columns) = last_layer(model.backbone)
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda *values: kept.append(values[2]))
    logits = model.forward_state(images.clone().requires_grad_(), state).logits
    handle.remove()
    shown = 0
    for target in range(logits.shape[1]):
        (gradient,) = torch.autograd.grad(logits[:, target].sum(), kept[-1], retain_graph=True)
        tokens, slope = (one[0] if one.ndim == 4 else one for one in (kept[-1].detach(), gradient))
        tokens, slope = tokens[:, -rows * columns :], slope[:, -rows * columns :]
        expected = (tokens * slope.mean(dim=1, keepdim=True)).sum(-1).relu().reshape(-1, rows, columns)
        found = grad_cam(model, state, images, target)
        assert torch.allclose(found, expected, atol=1e-5 * max(1.0, float(expected.max())))
        shown += bool(expected.max() > 1e-4)
    assert shown  # a comparison of zeros would prove nothing
    assert not layer._forward_hooks


# ----------------------------------------------------------------- similarity


def test_a_token_planted_in_the_prompt_map_is_found_at_its_place(vit: pt.Backbone, images: Tensor) -> None:
    model = drawn_model(vit, SA2VPConfig(rank=4))
    image, prompts = record_maps(model, model.task_state(), images[:1])
    assert sorted(image) == list(range(vit.depth - 1))  # of the last block only the class token is computed
    rows, columns = vit.grid
    for layer in image:
        plain = cosine_map(image[layer], prompts[layer], 5, vit.grid)
        expected = torch.nn.functional.cosine_similarity(image[layer][1 + 5], prompts[layer][1:], dim=-1)
        assert torch.allclose(plain.flatten(), expected, atol=1e-6)
        planted = prompts[layer].clone()
        planted[1 + 9] = 3 * image[layer][1 + 5]
        found = cosine_map(image[layer], planted, 5, vit.grid)
        assert found[divmod(9, columns)] == pytest.approx(1, abs=1e-5)
        assert found.argmax() == 9
        rest = torch.arange(rows * columns) != 9
        assert torch.equal(found.flatten()[rest], plain.flatten()[rest])


@pytest.mark.parametrize(
    ("mode", "crop_pct"), [("squash", 1.0), ("squash", 0.8), ("center", 0.9), ("center", 1.0), ("border", 1.0)]
)
@pytest.mark.parametrize("size", [(300, 200), (180, 320)])
def test_a_pixel_is_found_in_its_token(mode: str, crop_pct: float, size: tuple[int, int]) -> None:
    preprocess = Preprocess(128, (0.5,) * 3, (0.5,) * 3, "bilinear", crop_pct, mode)
    for point in [(150, 100), (100, 130), (120, 100)]:
        image = Image.new("RGB", size)
        ImageDraw.Draw(image).ellipse([point[0] - 6, point[1] - 6, point[0] + 6, point[1] + 6], fill="white")
        seen = (model_input(preprocess, image, torch.device("cpu"))[0].mean(0) > 0.3).float()  # white is 1, a border 0
        weight = seen.sum()
        place = [float((seen.sum(axis) * torch.arange(128)).sum() / weight) for axis in (0, 1)]  # x, y of the dot
        found = token_of(preprocess, size, point, (16, 16))
        assert abs(found % 16 - place[0] / 8 + 0.5) <= 0.8
        assert abs(found // 16 - place[1] / 8 + 0.5) <= 0.8


def test_points_outside_are_refused() -> None:
    preprocess = Preprocess(64, (0.5,) * 3, (0.5,) * 3, crop_mode="center")
    with pytest.raises(UsageError, match="outside an image of 100 x 50 pixels"):
        token_of(preprocess, (100, 50), (100, 3), (4, 4))
    with pytest.raises(UsageError, match="the transform cuts off"):
        token_of(preprocess, (100, 50), (3, 3), (4, 4))


# ---------------------------------------------------------------------- t-SNE


def test_tsne_repeats_itself_and_counts_neighbours() -> None:
    rng = np.random.default_rng(0)
    targets = np.arange(40) % 2
    features = (rng.standard_normal((40, 8)) + 20 * targets[:, None]).astype(np.float32)
    first, again = (embed("a", features, targets, ["x", "y"], 3) for _ in range(2))
    assert np.array_equal(first.places, again.places)
    assert first.nearest_accuracy == 1.0
    features[:2] = 500  # now 0 and 1, of two classes, are each other's nearest and nobody else's
    assert embed("a", features, targets, ["x", "y"], 3).nearest_accuracy == pytest.approx(38 / 40)
    left, right = (first.places[targets == one] for one in (0, 1))
    assert np.linalg.norm(left.mean(0) - right.mean(0)) > left.std() / 2
    with pytest.raises(DataError, match="needs 5"):
        embed("a", features[:4], targets[:4], ["x", "y"], 0)


# -------------------------------------------------------------------- drawing


def test_the_brightest_place_of_an_overlay_is_the_maps() -> None:
    heat = torch.zeros(4, 4)
    heat[1, 2] = 1.0
    grey = np.full((64, 64, 3), 0.5, dtype=np.float32)
    drawn = drawing.overlay(grey, heat).sum(-1)
    assert np.unravel_index(drawn.argmax(), drawn.shape)[0] // 16 == 1
    assert np.unravel_index(drawn.argmax(), drawn.shape)[1] // 16 == 2
    flat = drawing.overlay(grey, torch.ones(4, 4))
    assert np.ptp(flat) == 0
    assert flat.max() < 0.5


def test_what_is_seen_is_the_whole_image_and_large_enough() -> None:
    image = Image.new("RGB", (90, 40), (255, 0, 0))
    image.paste((0, 0, 255), (45, 0, 90, 40))
    seen = view(Preprocess(56, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)), image)
    assert seen.shape == (336, 336, 3)
    assert np.allclose(seen[:, :160], [1, 0, 0], atol=0.01)
    assert np.allclose(seen[:, 176:], [0, 0, 1], atol=0.01)


def test_layers_are_checked_and_spread() -> None:
    assert ExplainSettings().layers_of(12) == list(range(12))
    spread = ExplainSettings().layers_of(32)
    assert (len(spread), spread[0], spread[-1]) == (12, 0, 31)
    assert ExplainSettings(layers=(3, 1)).layers_of(4) == [1, 3]


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def workplace(folder: Path, vit: pt.Backbone) -> Path:
    """Runs, a Swin's run, images of which one is broken, labelled images."""
    for name, config in (
        ("first", SA2VPConfig(rank=4)),
        ("second", GaPTConfig(num_prompts=3)),
        ("third", LSPTConfig()),
    ):
        drawn_model(vit, config).save(folder / "runs" / name)
    drawn_model(drawn_backbone("test_swin", folder, SIDE), SA2VPConfig(rank=4)).save(folder / "runs" / "swin")
    pictures = folder / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a b", (80, 60)), ("z", (50, 90))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(pictures / f"{name}.png")
    (pictures / "broken.jpg").write_bytes(b"no image")
    write_folder(folder / "labelled", train=2, val=3)
    (folder / "empty").mkdir()
    return folder


def run(*words: Any) -> Result:
    return CliRunner().invoke(cli, ["explain", *map(str, words), "--quiet", "--device", "cpu"])


@pytest.mark.slow
def test_the_command_writes_a_page_that_holds_everything(workplace: Path) -> None:
    output = workplace / "report"
    words = (workplace / "runs/first", workplace / "runs/second", workplace / "pictures", "--output", output)
    result = run(*words, "--data", workplace / "labelled", "--layers", "0,2", "--json")
    assert result.exit_code == 0, result.output
    assert "broken.jpg: not an image" in result.stderr
    values = json.loads(result.stdout)
    assert sorted(map(Path, values["files"])) == sorted(output.iterdir())
    assert json.loads((output / "explanation.json").read_text()) == values
    assert [one["name"] for one in values["subjects"]] == ["plain backbone", "first", "second"]
    first = values["images"][0]
    assert Path(first["image"]).name == "a b.png"
    assert set(first["attention"]) == {"plain backbone", "first", "second"}
    assert set(first["attention"]["first"]) == {"0", "2"}
    assert set(first["similarity"]) == {"first"}
    assert first["similarity"]["first"]["token"] == [2, 2]
    assert set(first["grad_cam"]) == {"first", "second"}
    assert set(values["values_by_block"]) == {"gate", "temperature"}
    assert set(values["tsne"]["nearest_neighbour_accuracy"]) == {"plain backbone", "first", "second"}
    model = pt.PromptModel.load(workplace / "runs/second")
    assert values["values_by_block"]["gate"]["second"] == pytest.approx(model.task_state()["gates"][0].tolist())
    assert [1 / one for one in values["values_by_block"]["temperature"]["second"]] == pytest.approx(
        model.task_state()["sharpness"][0].tolist()
    )
    with torch.no_grad():
        given = model.preprocess.transform()(Image.open(workplace / "pictures/a b.png"))[None]
        assert first["predictions"]["second"]["label"] == model.labels[int(model(given).logits.argmax())]

    expected = {"attention", "grad-cam", "similarity"}
    names = {f"{number}-{part}.png" for number in ("000-a_b", "001-z") for part in expected}
    assert {one.name for one in output.glob("*.png")} == names | {"attention-on-prompts.png", "values.png", "tsne.png"}
    for file in output.glob("*.png"):
        with Image.open(file) as png:
            png.load()
            assert min(png.size) > 200, file
    with Image.open(output / "000-a_b-attention.png") as png:  # three rows, the picture and two layers
        side = drawing.PANEL * DPI
        assert png.size == (int(3 * side + 0.35 * DPI), int(3 * side + 0.55 * DPI))

    text = (output / "explanation.html").read_text()
    page = Page(text)
    assert "http" not in text.replace("http-equiv", "")
    assert page.count("img") == len(names) + 3
    assert all(one.startswith("data:image/png;base64,") for one in page.references)
    assert any("broken.jpg" in word for word in page.words)


def test_each_head_has_a_row(workplace: Path) -> None:
    found = pt.explain(
        workplace / "runs/first",
        workplace / "pictures/z.png",
        output=workplace / "heads",
        show=("attention",),
        heads="each",
        layers=(1,),
        device="cpu",
    )
    assert [one.file for one in found.pictures] == ["000-z-attention-plain_backbone.png", "000-z-attention-first.png"]
    heads = pt.PromptModel.load(workplace / "runs/first").backbone.num_heads
    with Image.open(io.BytesIO(found.pictures[0].png)) as png:
        assert png.size[1] == int((heads * drawing.PANEL + 0.55) * DPI)


def test_a_swin_is_explained_without_attention(workplace: Path) -> None:
    output = workplace / "swin-report"
    result = run(workplace / "runs/swin", workplace / "pictures/z.png", "--output", output)
    assert result.exit_code == 0, result.output
    assert "no attention of swin: test_swin attends within windows" in result.stderr
    assert {one.name for one in output.glob("*.png")} == {"000-z-grad-cam.png", "000-z-similarity.png"}
    refused = run(workplace / "runs/swin", workplace / "pictures/z.png", "--output", output, "--show", "attention")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "attends within windows" in refused.stderr


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["pictures"], 2, "none of .*pictures is the folder of a checkpoint"),
        (["runs/first"], 2, "nothing to explain"),
        (["runs/first", "missing.png"], 2, "no file or folder .*missing.png"),
        (["runs/first", "empty"], 1, "no images below .*empty"),
        (["runs/first", "pictures/broken.jpg"], 1, "none of the 1 images can be read"),
        (["runs/first", "pictures/z.png", "--layers", "0,99"], 2, "no layer 99: the backbone has 6"),
        (["runs/first", "pictures/z.png", "--layers", "2,2"], 2, "each named once"),
        (["runs/first", "pictures/z.png", "--heads", "9"], 2, "no head 9"),
        (["runs/first", "pictures/z.png", "--heads", "meen"], 2, "did you mean mean"),
        (["runs/first", "pictures/z.png", "--token", "4,0"], 2, "outside the map of 4 x 4"),
        (["runs/first", "pictures/z.png", "--point", "500,0"], 2, "z.png: point 500,0 lies outside"),
        (["runs/first", "pictures/z.png", "--point", "1,1", "--token", "1,1"], 2, "give only one"),
        (["runs/third", "pictures/z.png", "--token", "1,1"], 2, "none of the runs has a prompt map"),
        (["runs/third", "pictures/z.png", "--show", "similarity"], 2, "none of the runs has a prompt map"),
        (["runs/third", "pictures/z.png", "--show", "values"], 2, "none of the runs' methods has learned values"),
        (["runs/third", "pictures/z.png", "--show", "tsne"], 2, "give --data"),
        (["runs/third", "pictures/z.png", "--label", "cat"], 2, "unknown label of third 'cat'"),
        (["runs/third", "pictures/z.png", "--device", "tpu"], 2, "unknown device"),
    ],
)
def test_bad_input_gives_one_line(workplace: Path, words: list[str], code: int, line: str) -> None:
    paths = [
        workplace / word if "/" in word or word in ("pictures", "empty", "missing.png") else word for word in words
    ]
    result = CliRunner().invoke(cli, ["explain", *map(str, paths), "--output", str(workplace / "bad"), "--quiet"])
    assert result.exit_code == code
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: ")
    assert len(re.findall(line, result.stderr)) == 1


@pytest.mark.parametrize("words", [["--token", "1"], ["--token", "a,b"], ["--layers", "one"], ["--show", "all"]])
def test_malformed_options_are_refused_as_click_does(workplace: Path, words: list[str]) -> None:
    result = run(workplace / "runs/first", workplace / "pictures", "--output", workplace / "bad", *words)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_runs_share_a_backbone_and_have_names_of_their_own(workplace: Path, vit: pt.Backbone) -> None:
    runs = [workplace / "runs/first", workplace / "runs/third", workplace / "runs/first"]
    subjects = load_subjects(runs, torch.device("cpu"))
    assert len({id(one.backbone) for one in subjects}) == 1
    assert len({one.name for one in subjects}) == 4
    assert not isinstance(subjects[0].model, nn.Module)
