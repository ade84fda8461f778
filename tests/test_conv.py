"""Convolutions: the opened-up backbone is timm's, the methods over it are their equations, everything else refuses."""

import copy
import shutil

import numpy as np
import onnx
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import prompttune as pt
from prompttune.backbones import ConvBackbone
from prompttune.errors import BackboneError, EngineError, UsageError
from prompttune.export import EngineFolder
from prompttune.export.folder import ONNX_FILE
from prompttune.export.formats import ExportSettings
from prompttune.export.formats.onnx import write_onnx
from prompttune.export.formats.onnx_int8 import quantise
from prompttune.export.precision.casting import typed_model
from prompttune.export.runtimes import RuntimeOptions, open_runtime
from prompttune.methods import METHODS
from prompttune.methods.sa2vp.conv import ConvSA2VP, tokens_of
from prompttune.serve.bench.plain import export_plain, plain_settings
from tests.convs import CONVS, ON_CONV
from tests.drawing import default_configs, drawn_backbone, drawn_model, drawn_weights
from tests.engines import build_request, exported, model_of
from tests.engines import noise as pictures
from tests.equations_conv import conv_features

SIZE = 64
TIMMS = ("test_resnet", "test_convnext", "test_convnext3", "resnet18", "resnet10t", "convnextv2_atto")
every_conv = pytest.mark.parametrize("name", CONVS)


@pytest.fixture(scope="module", params=CONVS)
def backbone(request, tmp_path_factory):
    return drawn_backbone(request.param, tmp_path_factory.mktemp("weights"), SIZE)


def noise(size=SIZE):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------- backbones


@pytest.mark.parametrize(
    ("name", "size"),
    [*((name, SIZE) for name in (*CONVS, *TIMMS)), *((name, size) for name in CONVS for size in (50, 33, 97))],
)
@torch.no_grad()
def test_features_are_timms(name, size, tmp_path):
    path = drawn_weights(name, tmp_path)
    backbone = pt.load_backbone(name, size, path)
    plain = timm.create_model(name, num_classes=0).eval()
    plain.load_state_dict(load_file(path))
    expected = plain(noise(size))
    torch.testing.assert_close(backbone(noise(size)), expected, atol=2e-6, rtol=1e-5)
    assert expected.std() > 1e-3
    assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()
    assert (backbone.width, backbone.image_size) == (expected.shape[1], size)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@every_conv
@torch.no_grad()
def test_stages_are_what_they_say(name, tmp_path):
    backbone = drawn_backbone(name, tmp_path, 97)
    x = backbone.embed(noise(97))
    assert tuple(x.shape) == (3, backbone.stem_width, *backbone.grid)
    for number, stage in enumerate(backbone.stages):
        x = backbone.run_stages(x, range(number, number + 1))
        assert tuple(x.shape) == (3, stage.width, *stage.grid)
        assert stage.num_tokens == tokens_of(x).shape[1]
    assert [block.index for stage in backbone.stages for block in stage.blocks] == list(range(backbone.depth))


def test_the_size_of_the_weights_is_taken_by_default():
    assert pt.load_backbone("resnet18", weights="random").image_size == 224
    assert pt.load_backbone("test_resnet3", weights="random").grid == (16, 16)


def test_batch_norms_keep_their_statistics(tmp_path):
    backbone = drawn_backbone("test_resnet3", tmp_path, SIZE)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    model = drawn_model(backbone, pt.SA2VPConfig(rank=2)).train()
    model(noise()).logits.sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert any(name.endswith("running_mean") for name in before)


def test_fingerprint_sees_the_statistics_and_not_the_size(tmp_path):
    path = drawn_weights("test_resnet3", tmp_path)
    wanted = pt.load_backbone("test_resnet3", 64, path).fingerprint
    assert pt.load_backbone("test_resnet3", 96, path).fingerprint == wanted
    tensors = load_file(path)
    tensors["layer3.1.bn2.running_var"][0] += 1e-6
    save_file(tensors, tmp_path / "other.safetensors")
    assert pt.load_backbone("test_resnet3", 64, tmp_path / "other.safetensors").fingerprint != wanted


@every_conv
def test_classifiers_are_left_out_and_a_heads_norm_is_not(name, tmp_path):
    """As the models are published: with their classifier; MoCo v3 wraps a ResNet as it wraps a ViT."""
    plain = timm.create_model(name, num_classes=7)
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    wrapped = {f"module.base_encoder.{key}": value for key, value in plain.state_dict().items()}
    torch.save({"state_dict": wrapped, "arch": name}, tmp_path / "wrapped.pth")
    found = [pt.load_backbone(name, SIZE, tmp_path / file) for file in ("plain.safetensors", "wrapped.pth")]
    assert found[0].fingerprint == found[1].fingerprint
    own = found[0].model.state_dict()
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in own.items())
    assert len(own) == len(plain.state_dict()) - 2


def test_a_convnext_as_its_authors_publish_it(tmp_path):
    expected = pt.load_backbone("convnextv2_atto", SIZE, "random:3")
    theirs = {}
    for name, value in expected.model.state_dict().items():
        key = name.replace("stem.", "downsample_layers.0.").replace("head.norm", "norm").replace("conv_dw", "dwconv")
        key = key.replace("mlp.grn.weight", "grn.gamma").replace("mlp.grn.bias", "grn.beta").replace("mlp.fc", "pwconv")
        key = key.replace(".blocks.", ".")
        if ".downsample." in key:
            _, stage, _, rest = key.split(".", 3)
            key = f"downsample_layers.{stage}.{rest}"
        theirs[key] = value.reshape(1, 1, 1, -1) if ".grn." in key else value
    torch.save({"model": theirs | {"head.weight": torch.zeros(2, 320)}}, tmp_path / "convnext.pth")
    assert pt.load_backbone("convnextv2_atto", SIZE, tmp_path / "convnext.pth").fingerprint == expected.fingerprint


@pytest.mark.parametrize(
    ("name", "size", "error", "message"),
    [
        ("test_convnext4", 16, UsageError, "image size 16 is too small"),
        ("test_resnet3", 0, UsageError, "above 0, not 0"),
        ("resnet19", 64, UsageError, "did you mean resnet18"),
    ],
)
def test_what_is_not_supported_is_refused(name, size, error, message):
    with pytest.raises(error, match=message) as caught:
        pt.load_backbone(name, size, "random")
    assert "\n" not in str(caught.value)


@every_conv
def test_weights_of_a_vit_are_refused(name, tmp_path):
    path = drawn_weights("test_vit", tmp_path)
    with pytest.raises(BackboneError, match="does not fit"):
        pt.load_backbone(name, SIZE, path)


# --------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", sorted(METHODS.keys() - set(ON_CONV)))
def test_all_other_methods_refuse_convolutions_by_name(backbone, method):
    config = next(config for config in default_configs() if config.method == method)
    with pytest.raises(BackboneError, match=rf"{method} runs on .*not on ConvBackbone"):
        pt.PromptModel(backbone, config, num_classes=3)


SA2VP_VARIANTS = [
    {},
    {"prompt_layers": (0, 2)},  # the base does not read behind the stage's last block
    {"prompt_layers": (0, 1)},
    {"window": 1},
    {"window": 5},
    {"attention": "global"},
    {"adapter": False},
    {"activation": "relu"},
    {"map_scale": 0.5},
    {"map_scale": 0.2},
]
OWN_GRIDS = {0.5: (8, 8), 0.2: (3, 3)}
"""Grid of the learnable map; the stem's is 16 x 16."""


@pytest.mark.parametrize("settings", SA2VP_VARIANTS, ids=str)
@torch.no_grad()
def test_sa2vp_equals_its_equations(backbone, settings):
    model = drawn_model(backbone, pt.SA2VPConfig(rank=4, **settings))
    own = OWN_GRIDS.get(settings.get("map_scale", 1.0), (16, 16))
    base, prompt = conv_features(model, noise(), heads=2, own=own)  # 96 channels, 48 a head
    both, alone = model(noise(), aux=True), model(noise())
    for found, expected in ((alone.features, base), (both.features, base), (both.aux_features, prompt)):
        assert (found - expected).abs().max() <= 2e-5 * max(1, expected.abs().max().item())


@torch.no_grad()
def test_every_sa2vp_switch_changes_the_answer(backbone):
    answers = [drawn_model(backbone, pt.SA2VPConfig(rank=4, **one))(noise()).features for one in SA2VP_VARIANTS]
    for first in range(len(answers)):
        for second in range(first):
            if {first, second} == {4, 5}:  # a window of 5 sees all but the far corners of a map of 4 x 4
                continue
            apart = (answers[first] - answers[second]).abs().max()
            assert apart > 1e-4, (SA2VP_VARIANTS[first], SA2VP_VARIANTS[second])


@torch.no_grad()
def test_sa2vp_starts_from_the_plain_backbone(backbone):
    fresh = pt.PromptModel(backbone, pt.SA2VPConfig(), num_classes=3).eval()
    torch.testing.assert_close(fresh(noise()).features, backbone(noise()), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "prompt_layers", "head_dim", "parameters"),
    # tokens of the stem's map + its projection + for each block norm, down and up
    [
        ("resnet18", (0,), 64, 256 * 4 + 5 * 64 + 2 * (2 * 256 + 2 * 4 * 256 + 4 + 256)),
        ("resnet50", (0,), 64, 256 * 4 + 5 * 64 + 6 * (2 * 1024 + 2 * 4 * 1024 + 4 + 1024)),
        ("convnext_tiny", (0, 6), 64, 256 * 4 + 5 * 96 + 9 * (2 * 384 + 2 * 4 * 384 + 4 + 384)),
        ("convnextv2_atto", (0,), 40, 256 * 4 + 5 * 40 + 6 * (2 * 160 + 2 * 4 * 160 + 4 + 160)),
    ],
)
def test_shapes_over_full_size_models(name, prompt_layers, head_dim, parameters):
    backbone = pt.load_backbone(name, SIZE, "random")
    config = pt.SA2VPConfig(rank=4).resolved(backbone)
    method = config.build(backbone)
    assert isinstance(method, ConvSA2VP)
    assert (config.prompt_layers, method.head_dim) == (prompt_layers, head_dim)
    assert sum(parameter.numel() for parameter in method.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("test_resnet3", {"fusion": "paper"}, "no effect on test_resnet3: new prompt maps"),
        ("test_resnet3", {"prompt_layers": (0, 3)}, "do not fit 3"),
        ("test_resnet", {}, "test_resnet has one block in stage 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(name, settings, message):
    backbone = pt.load_backbone(name, SIZE, "random")
    with pytest.raises(UsageError, match=message):
        pt.PromptModel(backbone, pt.SA2VPConfig(**settings), num_classes=3)


# ---------------------------------------------------------------------------------------------------------- export


@every_conv
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@torch.no_grad()
def test_lower_precision_keeps_norms_and_the_callers_model(name, precision):
    model, images = copy.deepcopy(model_of("linear", 0, name)), torch.from_numpy(pictures(3))
    before = {key: tensor.clone() for key, tensor in model.backbone.state_dict().items()}
    typed = typed_model(model, precision)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.backbone.state_dict().items())
    found, wanted = typed.backbone(images), model.backbone(images)
    assert found.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert 0 < (found.float() - wanted).abs().max() <= (0.01 if precision == "fp16" else 0.06) * wanted.abs().max()


@torch.no_grad()
def test_a_variance_that_float16_cannot_hold(tmp_path):
    model = copy.deepcopy(model_of("linear", 0, "test_resnet3"))
    norm = model.backbone.model.layer1[0].bn1
    model.backbone.model.layer1[0].conv1.weight.mul_(400.0)
    norm.running_var.fill_(1e6)
    wanted, images = model.backbone(torch.from_numpy(pictures(3))), torch.from_numpy(pictures(3))
    found = typed_model(model, "fp16").backbone(images).float()
    assert (found - wanted).abs().max() <= 0.01 * wanted.abs().max()


@every_conv
def test_bfloat16_has_no_convolution_in_onnx(name, tmp_path):
    with pytest.raises(EngineError, match=f"no bfloat16 convolution .* {name} .* choose fp16, or the format aoti"):
        write_onnx(build_request("sa2vp", ExportSettings("onnx", "bf16"), name), tmp_path)


def quantised(name, kind, folder):
    for file in exported("sa2vp", name).glob(f"{ONNX_FILE}*"):
        shutil.copy(file, folder)
    quantise(build_request("sa2vp", ExportSettings("onnx", "int8", quantization=kind), name), folder)
    return onnx.load(str(folder / ONNX_FILE), load_external_data=False).graph


def test_int8_of_a_resnet_has_nothing_to_quantise(tmp_path):
    with pytest.raises(EngineError, match=r"int8 quantises products .* test_resnet3 has none: choose fp16"):
        quantised("test_resnet3", "dynamic", tmp_path)


def test_int8_of_a_convnext_is_its_mlps(tmp_path):
    """Both products of seven blocks."""
    graph = quantised("test_convnext4", "dynamic", tmp_path)
    weights = {one.input[1] for one in graph.node if one.op_type == "MatMulIntegerToFloat"}
    assert len(weights) == 14
    assert weights <= {one.name for one in graph.initializer}


@every_conv
def test_the_plain_backbone_of_the_benchmark_gives_the_pooled_features(name, tmp_path):
    manifest = EngineFolder(exported("sa2vp", name)).manifest
    frozen = model_of("sa2vp", 0, name).backbone
    assert isinstance(frozen, ConvBackbone)
    options = RuntimeOptions("cpu", 1)
    written = export_plain(manifest, frozen, plain_settings(manifest), tmp_path)
    with torch.no_grad():
        wanted = frozen(torch.from_numpy(pictures(3))).numpy()
    index = {"task_index": np.zeros((3, 1), np.int64)}
    found = open_runtime(tmp_path, written, options).logits(pictures(3), index, {})[:, 0]
    assert np.abs(found - wanted).max() <= 1e-4
