"""Numbers of the authors' released SA²VP code, reproduced through the public interface."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import prompttune as pt
from tests import released
from tests.reference.draw import draw, images

CASES = Path(__file__).parent / "reference"


def draw_like(shapes: dict[str, torch.Size], seed: int) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(draw(name, tuple(shape), seed)) for name, shape in shapes.items()}


def read_case(name: str) -> dict[str, np.ndarray]:
    with np.load(CASES / f"{name}.npz") as loaded:
        return dict(loaded)


def build(case: dict[str, np.ndarray], folder: Path) -> pt.PromptModel:
    """The case's backbone and task, every tensor drawn from its name."""
    meta = json.loads(str(case["meta"]))
    skeleton = pt.load_backbone(meta["backbone"], weights="random").model.state_dict()
    save_file(
        draw_like({name: value.shape for name, value in skeleton.items()}, meta["seed"]), folder / "drawn.safetensors"
    )
    backbone = pt.load_backbone(meta["backbone"], meta["image_size"], weights=folder / "drawn.safetensors")
    config = pt.SA2VPConfig(rank=meta["rank"], gamma=meta["gamma"], window=meta["window"])
    model = pt.PromptModel(backbone, config, num_classes=10)
    shapes = {name: value.shape for name, value in model.method.state_dict().items()}
    model.method.load_state_dict(draw_like(shapes, meta["seed"]))
    return model.eval()


@pytest.fixture(scope="module")
def case() -> dict[str, np.ndarray]:
    return read_case("sa2vp_vit_b16")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], pt.PromptModel]:
    """The models of the cases: drawing all their parameters takes seconds."""
    return functools.cache(lambda name: build(read_case(name), tmp_path_factory.mktemp("weights")))


@pytest.fixture(scope="module")
def model(built: Callable[[str], pt.PromptModel]) -> pt.PromptModel:
    return built("sa2vp_vit_b16")


def compare(case: dict[str, np.ndarray], model: pt.PromptModel) -> None:
    meta = json.loads(str(case["meta"]))
    batch = torch.from_numpy(images(meta["count"], meta["image_size"], meta["seed"]))
    with torch.no_grad():
        both, base = model(batch, aux=True), model(batch)
    assert np.abs(both.features.numpy() - case["base"]).max() <= 2e-5
    assert both.aux_features is not None
    assert np.abs(both.aux_features.numpy() - case["prompt"]).max() <= 2e-5
    assert torch.equal(both.features, base.features) or (both.features - base.features).abs().max() < 1e-5
    assert base.aux_features is None


@pytest.mark.slow
def test_features_of_both_pathways(case, model):
    compare(case, model)


@pytest.mark.slow
def test_features_of_both_pathways_on_a_swin(built):
    model = built("sa2vp_swin_b")
    compare(read_case("sa2vp_swin_b"), model)
    names = set(model.method.state_dict())
    assert {"prompts.0.tokens", "prompts.0.proj.weight", "adapters.17.up.bias"} <= names
    assert not [name for name in names if name.startswith("prompts.") and not name.startswith("prompts.0.")]
    assert sum(parameter.numel() for parameter in model.method.parameters()) == 201_488


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "write"), [("sa2vp_vit_b16", released.sa2vp_vit), ("sa2vp_swin_b", released.sa2vp_swin)]
)
def test_a_released_file_is_imported_with_its_numbers(name, write, built, tmp_path):
    """The drawn parameters under the released code's names, imported, give what that code was recorded to give."""
    case = read_case(name)
    meta, task = json.loads(str(case["meta"])), built(name)
    file = released.save_sa2vp(write(task), tmp_path / "checkpoint-99.pth")
    settings = {"gamma": meta["gamma"], "window": meta["window"]}
    made = pt.import_checkpoint("sa2vp", file, tmp_path / "task", backbone=task.backbone, settings=settings)
    assert made.assumed == {}
    imported = pt.PromptModel.load(tmp_path / "task", task.backbone)
    assert imported.config.rank == meta["rank"]
    compare(case, imported)


@pytest.mark.slow
def test_the_case_sees_the_window(case, model):
    meta = json.loads(str(case["meta"]))
    batch = torch.from_numpy(images(meta["count"], meta["image_size"], meta["seed"]))
    wider = pt.PromptModel(model.backbone, pt.SA2VPConfig(rank=16, gamma=0.5, window=5), num_classes=10).eval()
    wider.method.load_state_dict(model.method.state_dict())
    with torch.no_grad():
        assert np.abs(wider(batch).features.numpy() - case["base"]).max() > 1e-2


def test_trainable_parameters_of_the_paper(model):
    assert sum(parameter.numel() for parameter in model.method.parameters()) == 372_912


def test_neutral_names(model):
    names = set(model.method.state_dict())
    assert {"prompts.0.tokens", "prompts.4.scale", "prompts.8.proj.weight", "adapters.11.up.bias"} <= names
    assert "prompts.0.scale" not in names
    assert not [name for name in names if "backbone" in name or "mask" in name]
