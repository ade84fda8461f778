"""Swin: the opened-up backbone is timm's, the methods over it are their equations, everything else refuses it."""

import pytest
import timm
import torch
from timm.models.swin_transformer import window_partition

import prompttune as pt
from prompttune.backbones.windows import merging_order, window_order
from prompttune.errors import BackboneError, UsageError
from prompttune.methods import METHODS
from tests import equations
from tests.drawing import default_configs, drawn_backbone, drawn_model, drawn_weights
from tests.swins import ON_SWIN, SWINS, as_v1
from tests.test_backbones import google_npz

SIZE = 64


@pytest.fixture(scope="module", params=SWINS)
def backbone(request, tmp_path_factory):
    return drawn_backbone(request.param, tmp_path_factory.mktemp("weights"), SIZE)


@pytest.fixture(scope="module")
def swin(tmp_path_factory):
    return drawn_backbone("test_swin", tmp_path_factory.mktemp("weights"), SIZE)


def noise(size=SIZE):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SWINS)
@pytest.mark.parametrize("size", [SIZE, 96, 60, 92])  # 92: a map of 23, odd in every stage
def test_features_are_timms(name, size, tmp_path):
    backbone = drawn_backbone(name, tmp_path, size)
    assert (backbone.image_size, backbone.grid) == (size, (size // 4, size // 4))
    with torch.no_grad():
        expected = backbone.model(noise(size))
        torch.testing.assert_close(backbone(noise(size)), expected, atol=2e-6, rtol=1e-5)
    assert expected.std() > 0.1
    assert backbone.width == expected.shape[1]
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("name", SWINS)
def test_each_block_is_timms(name, tmp_path):
    backbone = drawn_backbone(name, tmp_path, SIZE)
    masked = 0
    for stage in backbone.stages:
        tokens = torch.randn(2, stage.num_tokens, stage.width, generator=torch.Generator().manual_seed(1))
        for block in stage.blocks:
            masked += block.timm.attn_mask is not None
            with torch.no_grad():
                expected = block.timm(tokens.unflatten(1, stage.grid)).flatten(1, 2)
                torch.testing.assert_close(block.run(tokens), expected, atol=2e-6, rtol=1e-5)
    assert masked == 2


@pytest.mark.parametrize(("grid", "window", "shift"), [((4, 4), (2, 2), (1, 1)), ((5, 7), (3, 2), (1, 0))])
def test_windows_are_cut_as_timm_cuts_them(grid, window, shift):
    """To the bit: both only move values."""
    tokens = torch.randn(2, *grid, 3)
    shifted = tokens.roll((-shift[0], -shift[1]), dims=(1, 2))
    padded = torch.nn.functional.pad(shifted, (0, 0, 0, -grid[1] % window[1], 0, -grid[0] % window[0]))
    expected = window_partition(padded, window).reshape(2, -1, 3)
    order, places = window_order(grid, window, shift)
    extended = torch.cat((tokens.flatten(1, 2), torch.zeros(2, 1, 3)), dim=1)
    assert torch.equal(extended[:, order], expected)
    assert torch.equal(extended[:, order][:, places], tokens.flatten(1, 2))


def test_odd_maps_merge_as_timms(swin):
    order, grid = merging_order((3, 5))
    assert (grid, order.numel()) == ((2, 3), 24)
    stage = swin.model.layers[1]
    tokens = torch.randn(2, 3, 5, swin.stages[0].width)
    extended = torch.cat((tokens.flatten(1, 2), torch.zeros(2, 1, tokens.shape[-1])), dim=1)
    four = extended[:, order].unflatten(1, (6, 4)).flatten(2)
    merging = stage.downsample
    assert torch.equal(merging.reduction(merging.norm(four)).unflatten(1, grid), merging(tokens))


@pytest.mark.parametrize("bias", [True, False])
def test_a_padded_place_answers_with_the_biases(bias):
    model = timm.create_model("test_swin2", num_classes=0, qkv_bias=bias).eval()
    backbone = pt.backbones.SwinBackbone(model)
    block = backbone.blocks[2]
    for part in block.padding:
        assert tuple(part.shape) == (block.num_heads, 1, block.head_dim)
    with torch.no_grad():
        torch.testing.assert_close(backbone(noise()), model(noise()), atol=2e-6, rtol=1e-5)


def test_stages_of_a_full_size_model():
    backbone = pt.load_backbone("swin_tiny_patch4_window7_224", 64, "random")
    assert [(len(stage.blocks), stage.blocks[-1].index, stage.grid) for stage in backbone.stages] == [
        (2, 1, (16, 16)),
        (2, 3, (8, 8)),
        (6, 9, (4, 4)),
        (2, 11, (2, 2)),
    ]
    assert (backbone.depth, backbone.width) == (12, 768)
    assert pt.SA2VPConfig().resolved(backbone).prompt_layers == (0,)


def test_fingerprint_is_of_the_source(tmp_path):
    path = drawn_weights("test_swin", tmp_path)
    small, large = (pt.load_backbone("test_swin", size, path) for size in (64, 96))
    assert small.fingerprint == large.fingerprint
    assert small.model.layers[0].blocks[0].window_size == large.model.layers[0].blocks[0].window_size


def test_weights_as_the_authors_publish_them(tmp_path):
    """Wrapped, with buffers, and with patch merging named after the stage before it."""
    expected = pt.load_backbone("test_swin", SIZE, "random:7")
    state = {}
    for name, value in expected.model.state_dict().items():
        parts = name.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        state[".".join(parts)] = value
    buffers = {"layers.0.blocks.1.attn_mask": torch.zeros(2), "head.weight": torch.zeros(2)}
    torch.save({"model": state | buffers}, tmp_path / "swin.pth")
    assert pt.load_backbone("test_swin", SIZE, tmp_path / "swin.pth").fingerprint == expected.fingerprint


@pytest.mark.parametrize(
    ("file", "message"),
    [("vit.npz", "hold ViTs, test_swin is a SwinTransformer"), ("vit.safetensors", "does not fit")],
)
def test_weights_of_a_vit_are_refused(file, message, tmp_path):
    path = drawn_weights("test_vit", tmp_path).rename(tmp_path / file)
    if file == "vit.npz":
        google_npz(pt.load_backbone("test_vit", weights="random").model, path)
    with pytest.raises(BackboneError, match=message):
        pt.load_backbone("test_swin", SIZE, path)


@pytest.mark.parametrize(
    ("name", "size", "error", "message"),
    [
        ("test_swin", 66, UsageError, "nearest: 64"),
        ("swin_tiny_patch4_window7_225", None, UsageError, "did you mean swin_tiny_patch4_window7_224"),
    ],
)
def test_what_is_not_supported_is_refused(name, size, error, message):
    with pytest.raises(error, match=message):
        pt.load_backbone(name, size, "random")


@pytest.mark.parametrize("method", sorted(METHODS.keys() - set(ON_SWIN)))
def test_all_other_methods_refuse_a_swin_by_name(swin, method):
    config = next(config for config in default_configs() if config.method == method)
    with pytest.raises(BackboneError, match=rf"{method} runs on VitBackbone, not on SwinBackbone"):
        pt.PromptModel(swin, config, num_classes=3)


SA2VP_VARIANTS = [
    {},
    {"prompt_layers": (0, 2)},  # the base does not read in the stage's last block
    {"prompt_layers": (0, 1)},
    {"window": 1},
    {"window": 5},
    {"attention": "global"},
    {"adapter": False},
    {"activation": "relu"},
    {"map_scale": 0.5},
]


@pytest.mark.parametrize("settings", SA2VP_VARIANTS, ids=str)
def test_sa2vp_equals_its_equations(backbone, settings):
    model = drawn_model(backbone, pt.SA2VPConfig(rank=4, **settings))
    with torch.no_grad():
        base, prompt = equations.swin_features(drawn_model(as_v1(backbone), model.config), noise())
        both, alone = model(noise(), aux=True), model(noise())
    for found, expected in ((alone.features, base), (both.features, base), (both.aux_features, prompt)):
        assert (found - expected).abs().max() <= 2e-5 * max(1, expected.abs().max().item())


def test_every_sa2vp_switch_changes_the_answer(swin):
    answers = [drawn_model(swin, pt.SA2VPConfig(rank=4, **settings))(noise()).features for settings in SA2VP_VARIANTS]
    for first in range(len(answers)):
        for second in range(first):
            assert (answers[first] - answers[second]).abs().max() > 1e-4, (SA2VP_VARIANTS[first], second)


def test_sa2vp_starts_from_the_plain_backbone(backbone):
    fresh = pt.PromptModel(backbone, pt.SA2VPConfig(), num_classes=3).eval()
    torch.testing.assert_close(fresh(noise()).features, backbone(noise()), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"fusion": "paper"}, "no effect on .*: new prompt maps"), ({"prompt_layers": (0, 3)}, "do not fit 3")],
)
def test_settings_that_do_not_fit_a_swin(swin, settings, message):
    with pytest.raises(UsageError, match=message):
        pt.PromptModel(swin, pt.SA2VPConfig(**settings), num_classes=3)


@pytest.mark.parametrize("config", [pt.VPTShallowConfig(num_prompts=3), pt.VPTDeepConfig(num_prompts=3)], ids=str)
def test_vpt_equals_its_equations(backbone, config):
    model = drawn_model(backbone, config)
    with torch.no_grad():
        expected = equations.swin_vpt_features(drawn_model(as_v1(backbone), config), noise())
        torch.testing.assert_close(model(noise()).features, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [pt.VPTShallowConfig(dropout=0.5), pt.VPTDeepConfig(dropout=0.5)], ids=str)
def test_vpt_dropout_acts_in_training_alone(swin, config):
    model = drawn_model(swin, config)
    assert torch.equal(model(noise()).logits, model(noise()).logits)
    model.train()
    assert not torch.equal(model(noise()).logits, model(noise()).logits)


def test_vpt_parameters(swin):
    shallow, deep = pt.VPTShallowConfig(num_prompts=3).build(swin), pt.VPTDeepConfig(num_prompts=3).build(swin)
    assert {name: tuple(p.shape) for name, p in shallow.named_parameters()} == {"prompts.0": (1, 3, 16)}
    sizes = {f"prompts.{i}": (blocks, 3, 16 * 2**i) for i, blocks in enumerate((2, 1, 3, 1))}
    assert {name: tuple(p.shape) for name, p in deep.named_parameters()} == sizes


def test_full_trains_what_swin_v2_computes_once(tmp_path):
    """The MLP of the position bias and the scale of the scores."""
    swin = drawn_backbone("test_swinv2", tmp_path, SIZE)
    model = drawn_model(swin, pt.FullConfig()).train()
    model(noise()).logits.square().mean().backward()
    own = model.method.backbone.model
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if "cpb_mlp" in name or "logit_scale" in name:
                assert parameter.grad.abs().max() > 0, name
                parameter.add_(0.1)
        expected = own(noise())
        for tuned in (model.method.backbone, model.method.own_backbone()):
            torch.testing.assert_close(tuned(noise()), expected, atol=1e-5, rtol=1e-5)
        assert (swin(noise()) - expected).abs().max() > 1e-3
