"""The linear probe: which blocks it reads and how, and the head in closed form."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prompttune as pt
from prompttune.errors import BackboneError, UsageError
from prompttune.methods import config_from_dict
from prompttune.training import train
from prompttune.training.solving import STRENGTHS, solve_head
from tests import engines
from tests.drawing import VITS, drawn_model
from tests.engines import config_of, noise
from tests.training_helpers import config, no_pictures, one_thread, write_folder  # noqa: F401

LAYERS = (0, 2, 5)


@pytest.fixture(scope="module")
def vit():
    return engines.backbone("test_vit")


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(noise(3))


def expected(backbone, images, layers, pool):
    """Straight from timm's blocks: norm, then pooling, for each layer."""
    timm, found, tokens = backbone.model, [], backbone.embed(images)
    prefix, (rows, columns) = backbone.num_prefix_tokens, backbone.grid
    for index, block in enumerate(backbone.blocks):
        tokens = block.run_timm(tokens)
        if index not in layers:
            continue
        normed = timm.norm(tokens)
        if pool == "backbone":
            found.append(timm.fc_norm(timm.pool(normed)))
            continue
        normed = timm.fc_norm(normed)
        if pool == "map":
            patches = normed[:, prefix:].transpose(1, 2).unflatten(2, (rows, columns))
            pooled = F.adaptive_avg_pool2d(patches, (min(rows, 4), min(columns, 4)))
            found.append(pooled.flatten(2).transpose(1, 2).flatten(1))
        else:
            found.append(normed[:, 0] if pool == "class" else normed[:, prefix:].mean(dim=1))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("pool", ["backbone", "class", "mean", "map"])
@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("size", [64, 112], ids=["4x4", "7x7"])
def test_features_are_normed_and_pooled_layer_by_layer(name, size, pool):
    backbone = engines.backbone(name, size=size)
    if pool == "class" and backbone.model.cls_token is None:
        with pytest.raises(BackboneError, match="has no class token; pool backbone, mean and map need none"):
            config_of("linear", pool=pool).build(backbone)
        return
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    model = drawn_model(backbone, config_of("linear", layers=LAYERS, pool=pool))
    with torch.no_grad():
        found, wanted = model(images).features, expected(backbone, images, LAYERS, pool)
    assert found.shape == (2, model.method.width) == (2, model.head.weight.shape[1])
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_the_last_block_is_the_default_and_keeps_old_tasks_and_engines(vit, images):
    named, default = (drawn_model(vit, config_of("linear", layers=layers)) for layers in ((5,), ()))
    assert named.config == default.config == config_from_dict("linear", {})
    assert named.config.graph_settings() == default.config.graph_settings()
    with torch.no_grad():
        assert torch.equal(named(images).features, vit(images))


def test_blocks_behind_the_last_one_read_are_not_run(vit, images, monkeypatch):
    run = []
    for block in vit.blocks:
        real = block.run_read
        monkeypatch.setattr(block, "run_read", lambda *a, b=block, real=real: run.append(b.index) or real(*a))
    model = drawn_model(vit, config_of("linear", layers=(0, 2), pool="map"))
    model(images)
    assert run == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (2, 2)}, "must rise, from 0 on"),
        ({"layers": (-1, 2)}, "must rise, from 0 on"),
        ({"layers": (0, 6)}, "do not fit 6 blocks of test_vit"),
        ({"pool": "token"}, "backbone"),
    ],
)
def test_bad_layers_are_refused_in_one_line(vit, settings, message):
    with pytest.raises(UsageError, match=message) as caught:
        config_of("linear", **settings).build(vit)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["test_swin", "test_resnet3"])
def test_other_backbones_have_the_default_alone(name):
    backbone = engines.backbone(name)
    config_of("linear").build(backbone)
    with pytest.raises(BackboneError, match=f"layers and pool need a ViT, which {name} is not; leave them out"):
        config_of("linear", pool="mean").build(backbone)


def test_tasks_that_read_maps_share_an_engine(vit, tmp_path):
    models = [drawn_model(vit, config_of("linear", layers=(1, 3), pool="map"), n + 2, seed=n) for n in range(3)]
    for number, model in enumerate(models):
        model.save(tmp_path / f"t{number}")
    drawn_model(vit, config_of("linear", layers=(1, 4), pool="map")).save(tmp_path / "other")
    pt.export_engine([tmp_path / "t0", tmp_path / "t1"], tmp_path / "engine", batch_sizes=(1, 3))
    engine, batch = pt.Engine(tmp_path / "engine"), noise(3)
    engine.add_task("t2", tmp_path / "t2")
    found = engine.logits(batch, ["t0", "t1", "t2"])
    for row, model in enumerate(models):
        with torch.no_grad():
            wanted = model(torch.from_numpy(batch[row : row + 1])).logits.numpy()[0]
        assert np.abs(found[row, : row + 2] - wanted).max() <= 1e-5 * max(1, np.abs(wanted).max())
    with pytest.raises(pt.errors.EngineError, match=r"its layers is \[1, 4\], .* has \[1, 3\]"):
        engine.add_task("other", tmp_path / "other")


@pytest.mark.parametrize(("count", "width"), [(24, 6), (12, 40)])
def test_a_solved_head_is_ridge_regression_and_each_image_is_really_left_out(count, width):
    torch.manual_seed(0)
    centres, targets = torch.randn(3, width), torch.arange(count) % 3
    features = centres[targets] + 1.5 * torch.randn(count, width) + 3
    features[:, 0] = 7.0  # a channel that never changes
    found = solve_head(features, targets, 3)
    assert found.strength in STRENGTHS

    x = features.double()
    x = (x - x.mean(dim=0)) / x.std(dim=0, correction=0).clamp(min=1e-6) / width**0.5
    wanted = F.one_hot(targets, 3).double()

    def fit(rows):
        mean, target_mean = x[rows].mean(dim=0), wanted[rows].mean(dim=0)
        near = (x[rows] - mean).T @ (x[rows] - mean) + found.strength * torch.eye(width, dtype=torch.double)
        weight = torch.linalg.solve(near, (x[rows] - mean).T @ (wanted[rows] - target_mean))
        return lambda new: (new - mean) @ weight + target_mean

    plain, logits = fit(torch.arange(count))(x), F.linear(features, found.weight, found.bias).double()
    factor = (plain * logits).sum() / plain.square().sum()
    assert factor >= 1
    torch.testing.assert_close(logits, factor * plain, atol=1e-4, rtol=1e-4)
    answers = [fit(torch.tensor([i for i in range(count) if i != row]))(x[row]).argmax() for row in range(count)]
    assert found.top1 == pytest.approx((torch.stack(answers) == targets).double().mean().item())


@pytest.mark.usefixtures("one_thread", "no_pictures")
def test_a_solved_run_is_over_after_one_pass(tmp_path):
    data, told = write_folder(tmp_path / "data"), []
    run = config(data, tmp_path / "run", method="linear", solve=True, pool="map", layers=(2, 5), epochs=50)
    assert run.epochs == 1
    result = train(run, on_progress=told.append)
    assert (result.status, result.epochs) == ("finished", 1)
    assert result.best_score == 1
    record = json.loads((tmp_path / "run/metrics.json").read_text())["history"][0]
    assert record["train_top1"] == 1
    assert record["train_loss"] < 0.2
    assert any("ridge regression of strength" in news.text for news in told)

    model = pt.PromptModel.load(result.path)
    seen = pt.features(model, data, split="train")
    solution = solve_head(torch.from_numpy(seen.features), torch.from_numpy(seen.labels), 4)
    torch.testing.assert_close(model.head.weight, solution.weight, atol=1e-3, rtol=1e-3)
    again = train(config(data, tmp_path / "run", method="linear", solve=True, pool="map", layers=(2, 5)), resume=True)
    assert again.was_over


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 2}, "solve runs on one device"),
        ({"class_weights": "balanced"}, "weighs all images alike"),
        ({"method": "vpt-deep"}, "vpt-deep also trains method.prompts"),
        ({"task_type": "segmentation", "data": "demo/shapes-seg"}, "solve needs a class for each image"),
    ],
)
def test_what_cannot_be_solved_is_refused_in_one_line(tmp_path, changes, message):
    values = {"method": "linear", "solve": True, "limit": 8, **changes}
    data = values.pop("data", None) or write_folder(tmp_path / "data", 2, 2)
    with pytest.raises(UsageError, match=message) as caught:
        train(config(data, tmp_path / "run", **values))
    assert "\n" not in str(caught.value)
