"""Methods that join in at the modules of a timm model, against models with the same changes in their weights."""

import copy
import threading

import pytest
import torch
from torch import nn

import prompttune as pt
from prompttune.errors import BackboneError, UsageError
from prompttune.methods import METHODS
from tests import engines
from tests.drawing import drawn_model
from tests.engines import config_of, noise
from tests.plains import OVER_MODULES, PLAINS, TINY

SAME = "tf_mobilenetv3_small_minimal_100"
"""Convolutions that pad as TensorFlow does, unevenly."""
MERGING = ("test_swin2", "test_swinv2", "test_convnext4", "test_resnet3", "lcnet_035", SAME)


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(noise(2))


def merged(method, change):
    """A copy of the backbone's model in which ``change`` has altered each site's weights."""
    model = copy.deepcopy(method.driven.model)
    begin = 0
    for site in method.sites:
        owner = site.name.removesuffix(".drop")
        change(model.get_submodule(owner), slice(begin, begin + site.width))
        begin += site.width
    return model


def features(model, images):
    with torch.no_grad():
        return model.forward_head(model.forward_features(images), pre_logits=True)


def agree(found, wanted):
    assert (found - wanted).abs().max() <= 2e-5 * max(1, wanted.abs().max().item())


@pytest.mark.parametrize("name", MERGING)
def test_lora_equals_merged_weights(name, images):
    model = drawn_model(engines.backbone(name), config_of("lora", alpha=8.0))
    down, up = model.method.down.detach(), model.method.up.detach()
    read = 0

    def change(layer, outputs):
        nonlocal read
        inputs = layer.weight[0].numel()
        update = 2.0 * up[:, outputs].T @ down[read : read + inputs].T  # α / r is 2
        layer.weight.data += update.reshape(layer.weight.shape)
        read += inputs

    agree(model(images).features.detach(), features(merged(model.method, change), images))
    assert (model(images).features - engines.backbone(name)(images)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["test_swinv2", f"beit_base_patch16_224?{TINY}"])
def test_layers_that_timm_does_not_call_by_default(name):
    """In Swin v2 and BEiT timm adds the biases in one product with the weights of the joint projection."""
    for method in ("lora", "ssf", "bitfit"):
        model = pt.PromptModel(engines.backbone(name), config_of(method), 3)
        joint = {name for name, _ in model.backbone.model.named_modules() if name.endswith(".qkv")}
        assert joint
        assert joint <= {site.name for site in model.method.sites}


def test_a_method_leaves_the_backbone_of_others_as_it_is(images):
    """Models share a backbone: the bits of one must not depend on which were built before."""
    backbone = pt.load_backbone(f"beit_base_patch16_224?{TINY}", 64, "random")
    before = backbone(images)
    pt.PromptModel(backbone, config_of("lora"), 3)
    assert torch.equal(backbone(images), before)


@pytest.mark.parametrize("method", ["ssf", "bitfit"])
@pytest.mark.parametrize("name", MERGING)
def test_scales_and_shifts_equal_merged_weights(name, method, images):
    model = drawn_model(engines.backbone(name), config_of(method))
    shift = model.method.shift.detach()
    scale = model.method.scale.detach() if method == "ssf" else torch.ones_like(shift)

    def change(layer, channels):
        by = scale[channels]
        bias = 0.0 if layer.bias is None else layer.bias
        layer.weight.data *= by.reshape(-1, *[1] * (layer.weight.ndim - 1))
        layer.bias = nn.Parameter(bias * by + shift[channels])

    agree(model(images).features.detach(), features(merged(model.method, change), images))


@pytest.mark.parametrize("method", ["lora", "bitfit", "adaptformer"])
@pytest.mark.parametrize("name", ["test_swin2", "test_swinv2", "test_convnext4", "test_resnet3", *PLAINS])
def test_a_new_task_is_the_plain_model(name, method, images):
    backbone = engines.backbone(name)
    model = pt.PromptModel(backbone, config_of(method), 3).eval()
    with torch.no_grad():
        found = model(images).features
        assert torch.equal(found, backbone.run_timm(images))
        agree(found, backbone(images))
    assert not any(one._forward_hooks for one in backbone.model.modules())


def test_hooks_leave_other_threads_alone(images):
    backbone = engines.backbone("test_resnet3")
    model, plain, seen = drawn_model(backbone, config_of("ssf")), backbone(images), []
    join = model.method.join

    def joining(*arguments):
        other = threading.Thread(target=lambda: seen.append(backbone(images)))
        other.start()
        other.join()
        return join(*arguments)

    model.method.join = joining
    model(images)
    assert len(seen) == len(model.method.sites)
    assert all(torch.equal(one, plain) for one in seen)


@pytest.mark.parametrize("method", OVER_MODULES[:5])
def test_a_model_that_mixes_images_is_refused_in_one_line(method):
    backbone = copy.deepcopy(engines.backbone("test_resnet3"))
    backbone.model.layer2.register_forward_hook(lambda _module, _args, output: output.flip(0))
    with pytest.raises(BackboneError, match=r"^test_resnet3: NaN in one image does not stay in its own rows") as caught:
        pt.PromptModel(backbone, METHODS[method](), 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["adapter", "adaptformer"])
def test_a_model_without_parts_is_refused(method):
    backbone = pt.load_backbone("test_efficientnet", 64, "random")
    with pytest.raises(BackboneError, match=f"^{method} finds no module of test_efficientnet that a task could join$"):
        pt.PromptModel(backbone, METHODS[method](), 3)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("lora", {"targets": "qkv"}, "lora: targets needs a ViT"),
        ("side", {"layers": (0, 5)}, r"side: layers \(0, 5\) do not fit 5 maps"),
        ("vpt-shallow", {"num_prompts": 32}, "32 pixels a side leave nothing of an image of 64"),
        ("adapter", {"first_block": 1}, "first_block needs a ViT"),
    ],
)
def test_settings_that_do_not_fit(method, settings, message):
    with pytest.raises(UsageError, match=message):
        pt.PromptModel(engines.backbone("test_resnet3"), METHODS[method](**settings), 3)
