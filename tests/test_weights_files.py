"""Weights files against timm with the same tensors: they come in as they are stored, or are refused."""

import logging
from functools import partial

import pytest
import timm
import torch
from safetensors.torch import save_file

import prompttune as pt
from prompttune.errors import BackboneError
from prompttune.images.preprocess import Preprocess
from tests.swins import SWINS
from tests.test_backbones import google_npz

IMAGENET, CLIP = (0.485, 0.456, 0.406), (0.48145466, 0.4578275, 0.40821073)


@pytest.fixture
def one_block(monkeypatch):
    """Let timm build its ViTs with one block; returns this ``create_model``."""
    short = partial(timm.create_model, depth=1, num_classes=0)
    monkeypatch.setattr(timm, "create_model", lambda name, **settings: short(name, **settings))
    return short


def drawn(model):
    """The model with tensors far from their initial values."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator) * (0.5 if "embed" in name else 0.1)
        value.copy_(noise.abs() + 1 if "running_var" in name else noise + (value.ndim == 1) * ("weight" in name))
    return model.eval()


def stored(model, path, prefix="", **around):
    tensors = {prefix + name: value.clone() for name, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({**around, "state_dict": tensors} if around else tensors, path)
    return path


def same(backbone, model):
    images = torch.randn(2, 3, backbone.image_size, backbone.image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(images)
        assert (backbone(images) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_positions_at_the_asked_size_come_in_as_they_are(tmp_path):
    tuned = drawn(timm.create_model("test_vit", num_classes=0, img_size=64))
    path = stored(tuned, tmp_path / "tuned.safetensors")
    backbone = pt.load_backbone("test_vit", 64, path)
    assert torch.equal(backbone.model.pos_embed, tuned.pos_embed)
    same(backbone, tuned)
    assert pt.load_backbone("test_vit", weights=path).image_size == 160


@pytest.mark.parametrize("name", ["flexivit_small", "vit_base_patch16_radio_v3"])
def test_positions_are_resampled_by_the_filter_of_the_variant(name, one_block, tmp_path):
    path = stored(drawn(one_block(name)), tmp_path / "native.safetensors")
    overlay = {"file": str(path), "num_classes": 0}
    same(
        pt.load_backbone(name, 64, path),
        one_block(name, img_size=64, pretrained=True, pretrained_cfg_overlay=overlay).eval(),
    )


@pytest.mark.parametrize("name", SWINS)
def test_a_swin_keeps_its_windows_at_another_size(name, tmp_path):
    small = drawn(timm.create_model(name, num_classes=0))
    path = stored(small, tmp_path / "native.safetensors")
    overlay = {"file": str(path), "num_classes": 0}
    plain = partial(timm.create_model, name, num_classes=0, pretrained=True, pretrained_cfg_overlay=overlay)
    size = 2 * small.patch_embed.img_size[0]
    same(pt.load_backbone(name, size, path), plain(img_size=size).eval())


def test_mocos_small_vit_has_12_heads(one_block, tmp_path):
    model = drawn(one_block("vit_small_patch16_224", num_heads=12))
    path = stored(model, tmp_path / "vit-s-300ep.pth.tar", "module.base_encoder.", arch="vit_small")
    backbone = pt.load_backbone("vit_small_patch16_224", weights=path)
    same(backbone, model)
    assert backbone.default_preprocess().mean == IMAGENET


def test_another_patch_size_is_refused_with_a_name_that_fits(one_block, tmp_path):
    path = stored(one_block("vit_small_patch8_224", img_size=32), tmp_path / "s8.safetensors")
    with pytest.raises(BackboneError, match=r"8 pixels, the model's 16.*such as vit_small_patch8_224$"):
        pt.load_backbone("vit_small_patch16_224.dino", weights=path)


@pytest.mark.parametrize("missing", [{"init_values": 1e-5}, {"pre_norm": True}])
def test_an_npz_that_lacks_tensors_is_refused(missing, monkeypatch, tmp_path):
    google_npz(pt.load_backbone("test_vit", weights="random").model, tmp_path / "vit.npz")
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **missing))
    with pytest.raises(BackboneError, match=r"missing|of this architecture"):
        pt.load_backbone("test_vit", weights=tmp_path / "vit.npz")


@pytest.mark.parametrize("other", [{"depth": 5}, {"num_heads": 4}])
def test_an_npz_of_more_blocks_or_other_heads_is_refused(other, monkeypatch, tmp_path):
    google_npz(pt.load_backbone("test_vit", weights="random").model, tmp_path / "vit.npz")
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **other))
    with pytest.raises(BackboneError, match=r"it holds \{'blocks': 6, 'heads': 2\}, the model"):
        pt.load_backbone("test_vit", weights=tmp_path / "vit.npz")


def test_averaged_weights_are_taken_as_timm_does(tmp_path):
    plain, averaged = (timm.create_model("test_vit", num_classes=3) for _ in range(2))
    path = stored(plain, tmp_path / "last.pth.tar", arch="test_vit", state_dict_ema=averaged.state_dict())
    assert torch.equal(pt.load_backbone("test_vit", weights=path).model.norm.weight, averaged.norm.weight)
    assert torch.equal(pt.load_backbone("test_vit", weights=path).model.pos_embed, averaged.pos_embed)


def test_the_file_decides_on_the_normalisation(tmp_path, caplog):
    model = timm.create_model("test_vit", num_classes=0)
    state = model.state_dict()
    text = {"text.positions": torch.zeros(2), "logit_scale": torch.zeros(1)}
    for name, content, mean in (
        ("mae_pretrain_vit_base.pth", {"model": state}, IMAGENET),
        ("mae.pth", {"model": {**state, "decoder_embed.weight": torch.zeros(2)}}, IMAGENET),
        ("dino.pth", {"teacher": {f"backbone.{key}": value for key, value in state.items()}}, IMAGENET),
        ("biomedclip.bin", {f"visual.trunk.{key}": value for key, value in state.items()} | text, CLIP),
        ("plain.pth", state, (0.5, 0.5, 0.5)),
    ):
        caplog.clear()
        torch.save(content, tmp_path / name)
        backbone = pt.load_backbone("test_vit", weights=tmp_path / name)
        assert backbone.mean == mean, name
        assert ("images are normalised with mean" in caplog.text) == (name != "plain.pth")
    assert Preprocess(8, *[(0.5, 0.5, 0.5)] * 2).normalised("clip").mean == CLIP


def test_the_activation_of_clip_is_decided_or_asked_for(one_block, tmp_path, caplog):
    quick = drawn(one_block("vit_base_patch32_clip_quickgelu_224", img_size=32))
    swaps = (("patch_embed.proj", "conv1"), ("norm_pre", "ln_pre"), ("blocks.", "transformer.resblocks."),
             ("attn.qkv.", "attn.in_proj_"), ("attn.proj", "attn.out_proj"), ("norm1", "ln_1"), ("norm2", "ln_2"),
             ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("norm.", "ln_post."))  # fmt: skip
    tensors = {}
    for key, value in quick.state_dict().items():
        for ours, theirs in swaps:
            key = key.replace(ours, theirs)
        key = {"cls_token": "class_embedding", "pos_embed": "positional_embedding"}.get(key, key)
        tensors[f"visual.{key}"] = value.squeeze() if key == "class_embedding" else value.squeeze(0)
    torch.save(tensors, tmp_path / "open_clip.pt")
    pt.load_backbone("vit_base_patch32_clip_224", weights=tmp_path / "open_clip.pt")
    assert "name vit_base_patch32_clip_quickgelu_224" in caplog.text
    torch.save(tensors | {"input_resolution": torch.tensor(224)}, tmp_path / "ViT-B-32.pt")
    same(pt.load_backbone("vit_base_patch32_clip_224", 32, tmp_path / "ViT-B-32.pt"), quick)


def test_what_a_file_of_timm_says_of_its_model_is_compared(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "prompttune")
    path = stored(timm.create_model("test_vit", num_classes=0), tmp_path / "a.pth", arch="test_vit4")
    pt.load_backbone("test_vit", weights=path)
    assert "a.pth says that its model is test_vit4, not test_vit" in caplog.text
