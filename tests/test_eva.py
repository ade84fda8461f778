"""Eva: the opened-up backbone is timm's, every method over it is that over a ViT whose queries and keys are turned."""

import copy

import pytest
import timm
import torch

import prompttune as pt
from prompttune.backbones.eva import EVA
from prompttune.backbones.loading import ARCHITECTURES
from prompttune.methods import METHODS
from tests.drawing import default_configs, drawn_backbone, drawn_model, drawn_weights
from tests.evas import EVAS, as_vit

SIZE = 64
NAMES = ("eva02_tiny_patch14_224", "vit_pe_core_tiny_patch16_384", "vit_tiny_patch16_dinov3_qkvb")
"""SwiGLU without LayerScale; attention pooling and a norm before the blocks; DINOv3 with biases."""


def noise(size=SIZE):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def eva(tmp_path_factory):
    return drawn_backbone("test_eva2", tmp_path_factory.mktemp("weights"), SIZE)


def deep_prompted(model, images, prompts):
    """timm's own blocks with new prompts [L, P, D] after the prefix tokens in front of each, without any at the end."""
    prefix, count = model.num_prefix_tokens, prompts.shape[1]
    tokens, rope = model._pos_embed(model.patch_embed(images))
    tokens = model.norm_pre(tokens)
    before, patches = tokens[:, :prefix], tokens[:, prefix:]
    for index, block in enumerate(model.blocks):
        tokens = torch.cat((before, prompts[index].expand(len(tokens), -1, -1), patches), dim=1)
        block.attn.num_prefix_tokens = prefix + count
        tokens = block(tokens, rope=rope[index] if model.rope_mixed else rope)
        before, patches = tokens[:, :prefix], tokens[:, prefix + count :]
    return model.forward_head(model.norm(torch.cat((before, patches), dim=1)), pre_logits=True)


@pytest.mark.parametrize("name", [*EVAS, *NAMES])
@pytest.mark.parametrize("grid", [4, 3])
@torch.no_grad()
def test_features_and_vpt_are_timms(name, grid, tmp_path):
    path = drawn_weights(name, tmp_path)
    size = grid * timm.create_model(name).patch_embed.patch_size[0]
    backbone = pt.load_backbone(name, size, path)
    overlay = {"file": str(path), "num_classes": 0}
    plain = timm.create_model(
        name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, img_size=size, dynamic_img_size=False
    ).eval()
    expected = plain.forward_head(plain.forward_features(noise(size)), pre_logits=True)
    torch.testing.assert_close(backbone(noise(size)), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1
    model = drawn_model(backbone, pt.VPTDeepConfig(num_prompts=3))
    expected = deep_prompted(plain, noise(size), model.method.prompts)
    torch.testing.assert_close(model(noise(size)).features, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [one for one in default_configs() if one.shares_backbone and one.method != "bitfit"],
    ids=lambda one: one.method,
)
def test_every_method_is_that_of_a_vit_with_turned_queries_and_keys(eva, config):
    with torch.no_grad():
        found, wanted = (drawn_model(one, config)(noise(), aux=True) for one in (eva, as_vit(eva)))
        torch.testing.assert_close(found.features, wanted.features, atol=2e-5, rtol=1e-5)
        if wanted.aux_features is not None:
            torch.testing.assert_close(found.aux_features, wanted.aux_features, atol=2e-5, rtol=1e-5)


def test_full_trains_the_rotation(eva):
    model = drawn_model(eva, METHODS["full"]()).train()
    model(noise()).logits.square().mean().backward()
    own = model.method.backbone.model
    assert own.rope.freqs.grad.abs().max() > 0
    with torch.no_grad():
        own.rope.freqs.add_(0.1)
        plain = copy.deepcopy(own)
        expected = plain.forward_head(plain.forward_features(noise()), pre_logits=True)
        for tuned in (model.method.backbone, model.method.own_backbone()):
            torch.testing.assert_close(tuned(noise()), expected, atol=1e-5, rtol=1e-5)
    assert (eva(noise()) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("test_eva", {"rope_type": "mrope", "embed_dim": 128}, "its rotary embedding has three axes"),
        ("test_eva", {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1}, "its heads share keys and values"),
        ("test_eva2", {"use_post_norm": True}, "its blocks are EvaBlockPostNorm"),
        ("test_eva2", {"global_pool": ""}, "it has no pooling"),
        ("vit_small_patch16_18x2_224", {"depth": 1}, "its blocks are ParallelThingsBlock"),
    ],
)
def test_what_cannot_be_driven_is_refused_with_its_reason(name, settings, reason):
    model = timm.create_model(name, num_classes=0, **settings)
    assert next(one for one in ARCHITECTURES if isinstance(model, one.models)).problem(model) == reason


def test_gated_attention_is_refused(eva):
    model = copy.deepcopy(eva.model)
    model.blocks[-1].attn.gate = torch.nn.Identity()
    assert EVA.problem(model) == "its attention is gated"
