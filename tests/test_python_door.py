"""What researchers do with the package in Python: models by name, the loss, frozen backbones, wrong tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import prompttune as pt
from prompttune.errors import UsageError
from prompttune.export.graph import trace
from prompttune.methods import METHODS
from prompttune.training.optim import Objective
from prompttune.training.progress import Display, Progress
from tests.drawing import default_configs, drawn_model

SIZE = 32


@pytest.fixture(scope="module")
def backbone() -> pt.Backbone:
    return pt.load_backbone("test_vit", SIZE, "random:0")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def test_a_model_by_the_name_of_its_method(backbone: pt.Backbone) -> None:
    model = pt.PromptModel(backbone, "sa2vp", 10, rank=4)
    assert model.config == pt.SA2VPConfig(rank=4).resolved(backbone)
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ("sa2v", {}, "unknown method 'sa2v'; did you mean sa2vp"),
        ("sa2vp", {"rnak": 4}, "method sa2vp has no setting 'rnak'"),
        (pt.SA2VPConfig(), {"rank": 4}, "a config has its settings in it"),
        (pt.SA2VPConfig, {}, "given by its name or its config"),
    ]
    for method, settings, message in wrong:
        with pytest.raises(UsageError, match=message):
            pt.PromptModel(backbone, method, 10, **settings)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, SIZE, SIZE), r"takes normalised float images \[B, 3, 32, 32\], not \[3, 32, 32\]: add the batch axis"),
        ((2, 3, 48, 48), r"not \[2, 3, 48, 48\]: make them with model.preprocess.transform\(\), or load the backbone"),
        ((2, SIZE, SIZE, 3), r"not \[2, 32, 32, 3\]: put the channels second"),
        ((2, 1, SIZE, SIZE), r"not \[2, 1, 32, 32\]"),
        ((), r"not \[\]"),
    ],
)
@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_images_of_a_wrong_shape_are_one_line(name: str, shape: tuple[int, ...], message: str) -> None:
    frozen = pt.load_backbone(name, SIZE, "random")
    for run in (frozen, pt.PromptModel(frozen, "linear", 2)):
        with pytest.raises(UsageError, match=f"^{name} .*{message}"):
            run(torch.zeros(shape))


def test_images_of_a_wrong_type_are_one_line(backbone: pt.Backbone, images: torch.Tensor) -> None:
    for wrong, message in (
        (torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), "not torch.uint8"),
        (images.numpy(), "not ndarray"),
    ):
        with pytest.raises(UsageError, match=message):
            backbone(wrong)


def test_checks_of_images_leave_nothing_in_the_graph(backbone: pt.Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pt.PromptModel(backbone, "linear", 3).eval()
    checked = trace(model).program.graph_module.code
    monkeypatch.setattr(pt.Backbone, "check_images", lambda *_: None)
    assert trace(model).program.graph_module.code == checked


@pytest.mark.parametrize("config", default_configs(), ids=lambda config: config.method)
def test_nothing_that_is_done_to_a_model_trains_its_backbone(
    config: Any, backbone: pt.Backbone, images: torch.Tensor
) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    model = drawn_model(backbone, config)
    trained = model.trained_parameters().keys()
    model.requires_grad_(False)
    assert not model.trained_parameters()
    model.train().requires_grad_(True)
    assert model.trained_parameters().keys() == trained  # what the method sets itself stays fixed too
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    pt.loss(model(images), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert not backbone(images).requires_grad


def test_the_loss_is_the_one_of_training(backbone: pt.Backbone, images: torch.Tensor) -> None:
    model = drawn_model(backbone, pt.SA2VPConfig(rank=4, base_weight=0.7, dropout=0.0)).train()
    targets, weights = torch.tensor([0, 1, 2, 0]), torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0])
    output = model(images)
    ours = pt.loss(output, targets, class_weights=weights, label_smoothing=0.1)
    assert output.aux_logits is not None
    base, aux = (
        F.cross_entropy(logits, targets, weights, label_smoothing=0.1) for logits in (output.logits, output.aux_logits)
    )
    assert ours.item() == pytest.approx((0.7 * base + 0.3 * aux).item(), rel=1e-6)
    assert torch.equal(Objective(model, weights, 0.1)(images, targets)[0], ours)
    assert torch.equal(pt.loss(model.eval()(images), targets), F.cross_entropy(model(images).logits, targets))
    with pytest.raises(UsageError, match="what a model returns and a tensor of class indices, not Tensor and list"):
        pt.loss(output.logits, [0, 1, 2, 0])  # type: ignore[arg-type]
    for wrong in (targets[:3], targets.float(), targets[None]):
        with pytest.raises(UsageError, match=r"the loss takes class indices int64 \[4\], not "):
            pt.loss(output, wrong)


def test_methods_and_their_settings_are_told() -> None:
    assert list(pt.methods()) == list(METHODS)
    assert all(pt.methods()[config.method] for config in default_configs())
    assert "sa2vp        Prompt map" in repr(pt.methods())
    told = pt.describe("sa2vp")
    assert told.paper == "https://arxiv.org/abs/2312.10376"
    settings = {one["name"]: one for one in told.to_dict()["settings"]}
    rank, dropout = settings["rank"], settings["dropout"]
    assert (rank["name"], rank["type"], rank["default"], rank["bounds"]) == ("rank", "int", 16, "above 0")
    assert (dropout["default"], dropout["bounds"]) == (0.1, "at least 0 and below 1")
    assert "prompt_layers  tuple[int, ...] | None" in repr(told)
    assert "<td>aligned or global</td>" in told._repr_html_()
    assert "no settings" in repr(pt.describe("full"))
    with pytest.raises(UsageError, match="unknown method 'vpt'; did you mean"):
        pt.describe("vpt")


def test_a_notebook_shows_the_lines_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("rich.jupyter.display", lambda _segments, text: shown.append(text))
    with Display(Console(force_jupyter=True)) as display:
        display(Progress("note", text="linear over test_vit"))
        display(Progress("train", step=1, steps=2))
    assert shown == ["linear over test_vit\n"]  # the live bar is a widget, where ipywidgets are installed
