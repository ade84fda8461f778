"""AdaptFormer, serial adapters, LoRA, SSF and GaPT, beside the matrix of all methods: counts, starts, ranks."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import prompttune as pt
from prompttune.backbones.vit import VitBlock
from prompttune.errors import BackboneError
from prompttune.methods import METHODS
from tests import engines, equations_weights
from tests.drawing import VITS, drawn_model
from tests.engines import noise


@pytest.fixture(params=VITS)
def backbone(request):
    return engines.backbone(request.param)


@pytest.fixture(scope="module")
def vit():
    return engines.backbone("test_vit")


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(noise(2))


# The published counts of ViT-B/16 at 224, the head aside.
COUNTS = [
    ("adaptformer", {"rank": 64}, 1_189_632),
    ("lora", {"rank": 4}, 147_456),
    ("lora", {"rank": 4, "targets": "qkv"}, 147_456 * 3 // 2),
    ("ssf", {}, 205_824),
    ("gapt", {"num_prompts": 100}, 76_823),
    ("vpt-deep", {"num_prompts": 1}, 9_216),
    ("adapter", {"rank": 64}, 2 * 1_189_632),
]


@pytest.fixture(scope="module")
def vit_b():
    return pt.load_backbone("vit_base_patch16_224", 224, weights="random")


@pytest.mark.parametrize(("method", "settings", "count"), COUNTS, ids=lambda value: str(value))
def test_trainable_parameters_of_vit_b(vit_b, method, settings, count):
    built = METHODS[method](**settings).build(vit_b)
    assert sum(parameter.numel() for parameter in built.parameters()) == count


@pytest.mark.parametrize("method", ["adaptformer", "lora"])
def test_a_new_task_is_the_plain_backbone(backbone, method, images):
    fresh = pt.PromptModel(backbone, METHODS[method](), num_classes=3).eval()
    torch.testing.assert_close(fresh(images).features, backbone(images), atol=2e-5, rtol=1e-4)


def test_new_serial_adapters_are_close_to_the_plain_backbone(vit, images):
    fresh = pt.PromptModel(vit, pt.AdapterConfig(), num_classes=3).eval()
    off = (fresh(images).features - vit(images)).abs().max()
    assert 0 < off < 1e-2
    assert max(parameter.abs().max() for parameter in fresh.method.parameters()) <= 2e-3


def test_ssf_starts_near_one_and_zero_and_is_the_plain_backbone_there(backbone, images):
    fresh = pt.PromptModel(backbone, pt.SSFConfig(), num_classes=3).eval()
    for place, scale in fresh.method.scale.items():
        assert abs(scale.mean() - 1) < 0.02
        assert 0.01 < scale.std() < 0.03
        assert 0.01 < fresh.method.shift[place].std() < 0.03
    for parameter in fresh.method.scale.values():
        parameter.data.fill_(1)
    for parameter in fresh.method.shift.values():
        parameter.data.zero_()
    torch.testing.assert_close(fresh(images).features, backbone(images), atol=2e-5, rtol=1e-4)


def test_gapt_starts_with_closed_gates_and_plain_attention(vit):
    state = pt.GaPTConfig(num_prompts=3, gate_init=5).build(vit).task_state()
    torch.testing.assert_close(state["gates"], torch.full((1, vit.depth - 1), 1 / (1 + np.exp(5))).float())
    assert torch.equal(state["sharpness"], torch.ones(1, vit.depth))


def test_gapt_with_open_gates_is_vpt_shallow(vit, images):
    gapt, vpt = (drawn_model(vit, config(num_prompts=3)) for config in (pt.GaPTConfig, pt.VPTShallowConfig))
    vpt.method.prompts.data.copy_(gapt.method.prompts.data.unsqueeze(0))
    gapt.method.gates.data.fill_(100.0)
    gapt.method.temperatures.data.fill_(1.0)
    torch.testing.assert_close(gapt(images).features, vpt(images).features, atol=2e-5, rtol=1e-4)


def test_gapt_temperatures_are_bounded_and_come_back(vit):
    """Training bounds the parameter itself: behind the bound it would go on drifting, and take as long to come back."""
    method = pt.GaPTConfig(num_prompts=2).build(vit).eval()
    method.temperatures.data[:3] = torch.tensor([-3.0, 0.5, 50.0])
    torch.testing.assert_close(method.task_state()["sharpness"][0, :3], torch.tensor([100.0, 2.0, 0.1]))
    assert method.temperatures[2] == 50, "evaluation changes no parameter"
    method.train()
    optimiser = torch.optim.SGD(method.parameters(), lr=0.5)

    def steps(count, wanted):
        for _ in range(count):
            optimiser.zero_grad()
            (1 / method.task_state()["sharpness"] - wanted).square().mean().backward()
            optimiser.step()
        return method.values_by_block()["temperature"]

    assert (steps(60, 1000.0) == 10).all()
    torch.testing.assert_close(steps(60, 2.0), torch.full((vit.depth,), 2.0), atol=0.01, rtol=0)


def test_a_task_of_lower_rank_is_padded_with_zeros(vit, images):
    for method, key in (("adaptformer", "adapters"), ("adapter", "mlp"), ("lora", "query")):
        model = drawn_model(vit, METHODS[method](rank=2))
        layout, state = model.state_layout(), model.task_state()
        assert layout[f"{key}.down"] == (vit.depth, vit.width, "rank")
        wide = {}
        for name, tensor in state.items():
            shape = [5 if axis == "rank" else size for axis, size in zip(layout[name], tensor.shape[1:], strict=True)]
            wide[name] = torch.zeros(1, *shape)
            wide[name][tuple(slice(size) for size in tensor.shape)] = tensor
        with torch.no_grad():
            padded = model.forward_state(images, wide).features
            torch.testing.assert_close(padded, model(images).features, atol=1e-5, rtol=1e-5)


def test_the_last_block_is_computed_for_the_class_token_alone(vit, images, monkeypatch):
    rows, project = [], VitBlock.project

    def counted(block, attended):
        rows.append(attended.shape[1])
        return project(block, attended)

    monkeypatch.setattr(VitBlock, "project", counted)
    for method, settings in equations_weights.CASES[:-1]:
        rows.clear()
        drawn_model(vit, METHODS[method](**settings))(images)
        assert len(rows) == vit.depth
        assert rows[-1] == 1
        assert min(rows[:-1]) >= vit.num_tokens


def test_the_halves_of_a_block_are_timms_own(backbone, images):
    tokens = backbone.embed(images)
    with torch.no_grad():
        block = backbone.blocks[1]
        ours = tokens + block.self_attention(tokens, whole=True)
        torch.testing.assert_close(ours + block.mlp(ours), block.timm(tokens), atol=2e-5, rtol=1e-4)


def test_ssf_refuses_a_gated_mlp(vit, monkeypatch):
    gated = SimpleNamespace(timm=SimpleNamespace(mlp=torch.nn.Identity()))
    monkeypatch.setattr(vit, "blocks", (gated,))
    with pytest.raises(BackboneError, match=re.escape("ssf needs blocks with a plain MLP; test_vit has Identity")):
        pt.SSFConfig().build(vit)
