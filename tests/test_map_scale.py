"""Prompt maps of fewer rows and columns than the patches: resized before anything reads them, on every backbone."""

import pytest
import torch

import prompttune as pt
from prompttune.errors import UsageError
from prompttune.methods.sa2vp.parts import scaled_grid
from tests.drawing import drawn_model
from tests.engines import backbone
from tests.equations_conv import prompt_map

KINDS = ("test_vit", "test_vit2", "test_swin", "test_resnet3", "test_convnext4")
GRIDS = {"test_vit": (4, 4, 1), "test_vit2": (4, 4, 1), "test_swin": (16, 16, 0)}
"""Rows and columns of the token map at 64 pixels, and its prefix tokens; those of a stem are Swin's."""
SCALES = (0.75, 0.5, 0.01)


def noise():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def own_grid(name, scale):
    rows, columns, prefix = GRIDS.get(name, GRIDS["test_swin"])
    return (max(1, round(rows * scale)), max(1, round(columns * scale))), (rows, columns), prefix


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_every_map_is_its_interpolation(name, scale):
    model = drawn_model(backbone(name), pt.SA2VPConfig(rank=4, map_scale=scale))
    own, grid, prefix = own_grid(name, scale)
    for prompt in model.method.prompts.values():
        assert prompt.tokens.shape == (1, prefix + own[0] * own[1], 4)
        torch.testing.assert_close(prompt(), prompt_map(prompt, grid, own, prefix), atol=1e-5, rtol=1e-5)
    assert len(model.method.prompts) == (2 if "vit" in name else 1)  # the deep map is one of them


@pytest.mark.parametrize("name", KINDS)
def test_gradients_reach_the_small_map(name):
    model = drawn_model(backbone(name), pt.SA2VPConfig(rank=4, map_scale=0.5)).train()
    out = model(noise())
    (out.logits.square().mean() + out.aux_logits.square().mean()).backward()
    for key, parameter in model.task_parameters().items():
        assert parameter.grad.abs().max() > 0, key
    for key, prompt in model.method.prompts.items():
        assert (prompt.tokens.grad.abs().amax(dim=-1) > 0).all(), f"a place of map {key} is read by nothing"


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_tasks_of_every_scale_have_the_same_layout_and_mix(name):
    models = [drawn_model(backbone(name), pt.SA2VPConfig(rank=4, map_scale=one), seed=2) for one in (1.0, *SCALES[:2])]
    states = [model.task_state() for model in models]
    mixed = {key: torch.cat([state[key] for state in states]) for key in states[0]}
    together = models[0].forward_state(noise(), mixed).logits
    single = torch.cat([model(noise()[row : row + 1]).logits for row, model in enumerate(models)])
    torch.testing.assert_close(together, single, atol=2e-5, rtol=1e-5)
    assert models[0].config.graph_settings() == models[1].config.graph_settings()
    assert not torch.allclose(models[0](noise()).logits, models[1](noise()).logits, atol=1e-3)


@torch.no_grad()
def test_at_scale_one_nothing_is_resized():
    prompt = drawn_model(backbone("test_vit"), pt.SA2VPConfig(rank=4)).method.prompts["0"]
    assert torch.equal(prompt(), prompt.proj(prompt.tokens))


def test_a_uniform_map_stays_uniform():
    prompt = drawn_model(backbone("test_vit"), pt.SA2VPConfig(rank=4, map_scale=0.5)).method.prompts["0"]
    prompt.tokens.data[:, 1:] = prompt.tokens.data[:, 1:2]
    patches = prompt()[:, 1:]
    torch.testing.assert_close(patches, patches[:, :1].expand_as(patches))


def test_a_smaller_map_has_fewer_parameters(tmp_path):
    frozen = backbone("test_vit")
    sizes = [
        sum(parameter.numel() for parameter in pt.SA2VPConfig(rank=4, map_scale=one).build(frozen).parameters())
        for one in (1.0, 0.5)
    ]
    assert sizes[0] - sizes[1] == 2 * 4 * (16 - 4)  # two maps of rank 4
    model = drawn_model(frozen, pt.SA2VPConfig(rank=4, map_scale=0.5))
    model.save(tmp_path / "task")
    loaded = pt.PromptModel.load(tmp_path / "task", frozen)
    assert loaded.config.map_scale == 0.5
    assert torch.equal(loaded(noise()).logits, model(noise()).logits)


@pytest.mark.parametrize("scale", [0, -0.5, 1.01, float("nan")])
def test_a_scale_that_makes_no_sense_is_refused(scale):
    with pytest.raises(UsageError, match="map_scale must be above 0 and at most 1"):
        pt.SA2VPConfig(map_scale=scale)


def test_rounding():
    assert [scaled_grid((7, 14), scale) for scale in (1.0, 0.5, 0.34, 0.01)] == [(7, 14), (4, 7), (2, 5), (1, 1)]
