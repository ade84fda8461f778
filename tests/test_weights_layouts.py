"""Folders and files that other libraries write, loaded and compared with these libraries' own features."""

import json
import re

import open_clip
import pytest
import timm
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torchvision.models import VisionTransformer as TorchvisionViT

import prompttune as pt
from prompttune.backbones.names import FAMILIES, join_args, split_args
from prompttune.errors import BackboneError, UsageError
from tests.test_weights_files import IMAGENET, drawn, same, stored

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
TALL = SIZES | {"intermediate_size": 80}
STAGES = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 12, 16, 24]}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 99,
        "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
PAIR = {"vision_config": TALL, "text_config": TEXT}


def first(output):
    return output.last_hidden_state[:, 0]


def pooled(output):
    return output.pooler_output.flatten(1)


MODELS = {
    "vit": (hf.ViTModel, hf.ViTConfig(**TALL), first),
    "vit of a classifier": (hf.ViTForImageClassification, hf.ViTConfig(**TALL), first),
    "deit": (hf.DeiTModel, hf.DeiTConfig(**TALL), first),
    "dinov2": (hf.Dinov2Model, hf.Dinov2Config(**SIZES), pooled),
    "dinov2 giant": (hf.Dinov2Model, hf.Dinov2Config(**SIZES, use_swiglu_ffn=True), pooled),
    "dinov2 with registers": (hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig(**SIZES), pooled),
    "dinov3": (hf.DINOv3ViTModel, hf.DINOv3ViTConfig(**TALL, num_register_tokens=4), pooled),
    "dinov3 of a gated MLP": (hf.DINOv3ViTModel, hf.DINOv3ViTConfig(
        **TALL, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"), pooled),
    "clip's tower": (hf.CLIPVisionModel, hf.CLIPVisionConfig(**TALL), pooled),
    "clip": (hf.CLIPModel, hf.CLIPConfig(**PAIR), pooled),
    "siglip's tower": (hf.SiglipVisionModel, hf.SiglipVisionConfig(**TALL), pooled),
    "siglip": (hf.SiglipModel, hf.SiglipConfig(**PAIR), pooled),
    "swin": (hf.SwinModel, hf.SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8],
                                         window_size=2), pooled),
    "resnet": (hf.ResNetModel, hf.ResNetConfig(depths=[1, 1, 1, 1]), pooled),
    "resnet of two layers a block": (hf.ResNetModel, hf.ResNetConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[64, 128, 256, 512], layer_type="basic"), pooled),
    "convnext": (hf.ConvNextModel, hf.ConvNextConfig(**STAGES), pooled),
    "convnext v2": (hf.ConvNextV2Model, hf.ConvNextV2Config(**STAGES), pooled),
    "dinov3 convnext": (hf.DINOv3ConvNextModel, hf.DINOv3ConvNextConfig(**STAGES), pooled),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_of_transformers(kind, tmp_path):
    made, config, features = MODELS[kind]
    model = drawn(made(config))
    model.save_pretrained(tmp_path)
    images = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    backbone = pt.load_backbone(str(tmp_path), 64)
    assert backbone.mean == (0.1, 0.2, 0.3)
    assert (backbone.std, backbone.interpolation) == ((0.4, 0.5, 0.6), "bilinear")
    tower = getattr(model, "vision_model", None) or (model.vit if "classifier" in kind else model)
    size = 32 if hasattr(backbone, "num_tokens") else 64  # positions as stored
    backbone = pt.load_backbone(str(tmp_path), size)
    same(backbone, lambda images: features(tower(images)))
    again = pt.load_backbone(backbone.name, size, backbone.weights)
    assert (again.name, again.fingerprint) == (backbone.name, backbone.fingerprint)


@pytest.mark.parametrize("safe", [True, False])
def test_a_model_in_several_files(safe, tmp_path):
    model = drawn(hf.Dinov2Model(hf.Dinov2Config(**SIZES)))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 2
    if not safe:  # as older versions of transformers save it
        listed = json.loads(index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin"))
        for part in parts:
            torch.save(load_file(part), tmp_path / f"pytorch_{part.stem}.bin")
            part.unlink()
        index.unlink()
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps(listed))
    for source in ({}, {"weights": index}, {"weights": tmp_path}):
        same(pt.load_backbone(str(tmp_path), 32, **source), lambda images: pooled(model(images)))
    last = sorted(tmp_path.glob("*.safetensors" if safe else "*.bin"))[-1]
    last.unlink()
    with pytest.raises(BackboneError, match=f"cannot read .*{last.name}"):
        pt.load_backbone(str(tmp_path))
    for damaged in (
        '{"weight_map": {"a": "../b.safetensors"}}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        "[]",
    ):
        index.write_text(damaged)
        with pytest.raises(BackboneError, match="is not an index of tensors: its weight_map names no files beside it"):
            pt.load_backbone("vit_small_patch14_dinov2", weights=index)


def test_a_convnext_before_fine_tuning_has_no_last_norm(tmp_path, caplog):
    model = drawn(timm.create_model("convnextv2_atto", num_classes=0, depths=(1, 1, 1, 1)))
    tensors = {name: value for name, value in model.state_dict().items() if not name.startswith("head.norm")}
    torch.save({"model": tensors}, tmp_path / "convnextv2_atto_1k_224_fcmae.pt")
    torch.nn.init.ones_(model.head.norm.weight)
    torch.nn.init.zeros_(model.head.norm.bias)
    name = "convnextv2_atto?depths=[1,1,1,1]"
    same(pt.load_backbone(name, 64, tmp_path / "convnextv2_atto_1k_224_fcmae.pt"), model)
    assert "has no last norm" in caplog.text
    torch.save({"model": {n: v for n, v in tensors.items() if n != "stem.1.bias"}}, tmp_path / "a.pt")
    with pytest.raises(BackboneError, match=r"missing stem\.1\.bias"):
        pt.load_backbone(name, 64, tmp_path / "a.pt")


def test_defaults_are_those_of_transformers():
    """A configuration on the hub leaves out what has its default value."""
    for kind, (_, defaults) in FAMILIES.items():
        own = hf.CONFIG_MAPPING[kind]().to_dict() | ({"num_register_tokens": 1} if kind == "deit" else {})
        assert defaults == {key: own.get(key, 4) for key in defaults}, kind  # a ViT's mlp_ratio comes from its sizes


def test_a_configuration_beside_a_file_decides_what_no_tensor_shows(tmp_path, caplog):
    config = hf.CLIPVisionConfig(image_size=32, patch_size=32, num_hidden_layers=1)
    model = drawn(hf.CLIPVisionModel(config))
    model.save_pretrained(tmp_path)
    backbone = pt.load_backbone("vit_base_patch32_clip_224?depth=1", 32, tmp_path)
    same(backbone, lambda images: pooled(model(images)))
    assert "has {'act_layer': 'quick_gelu'}, where" in caplog.text


def test_a_folder_of_open_clip(tmp_path):
    tower = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 99, "width": 16, "heads": 2, "layers": 1}
    model = drawn(open_clip.CLIP(16, tower, text, quick_gelu=True))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    sizes = {"vision_cfg": tower, "text_cfg": text, "quick_gelu": True}
    about = {"model_cfg": sizes, "preprocess_cfg": {"mean": [0.4] * 3, "std": [0.2] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    backbone = pt.load_backbone(f"local-dir:{tmp_path}")
    model.visual.proj = None
    same(backbone, model.visual)
    assert backbone.mean == (0.4, 0.4, 0.4)


def test_a_folder_of_timm_with_arguments_as_pathology_models_have(tmp_path):
    args = {"init_values": 1e-5, "reg_tokens": 2, "img_size": 32, "global_pool": ""}
    layers = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
    model = drawn(timm.create_model("test_vit", num_classes=0, **args | layers | {"global_pool": "token"}))
    images = {"mean": IMAGENET, "std": [0.2] * 3, "input_size": [3, 32, 32]}
    config = {"architecture": "test_vit", "model_args": args, "pretrained_cfg": images}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored(model, tmp_path / "pytorch_model.bin")
    backbone = pt.load_backbone(f"{tmp_path}?mlp_layer=SwiGLUPacked&act_layer=SiLU")
    same(backbone, model)
    assert (backbone.image_size, backbone.mean) == (32, IMAGENET)
    task = pt.PromptModel(backbone, "linear", 2)
    task.save(tmp_path / "task")
    (tmp_path / "config.json").unlink()
    assert pt.PromptModel.load(tmp_path / "task").backbone.fingerprint == backbone.fingerprint


@pytest.mark.parametrize(
    ("prefix", "around"),
    [("timm_model.", {}), ("model.", {"pytorch-lightning_version": "2"}), ("module.model.backbone.", {"epoch": 1})],
)
def test_wrappings(prefix, around, tmp_path):
    model = drawn(timm.create_model("test_vit", num_classes=0))
    same(pt.load_backbone("test_vit", weights=stored(model, tmp_path / "a.ckpt", prefix, **around)), model)


def test_mae_fine_tuned_pools_the_average(tmp_path):
    model = drawn(timm.create_model("test_vit", num_classes=3, global_pool="avg"))
    backbone = pt.load_backbone("test_vit", weights=stored(model, tmp_path / "a.pth"))
    model.reset_classifier(0, "avg")
    same(backbone, model)


@pytest.mark.parametrize(
    ("args", "pattern", "name"),
    [({"init_values": 1.0}, r"ls(\d)\.gamma", r"gamma_\1"), ({}, r"^blocks\.(\d)", r"blocks.0.\1")],
    ids=["DeiT III", "DINOv2's teacher"],
)
def test_names_of_authors(args, pattern, name, tmp_path):
    model = drawn(timm.create_model("test_vit", num_classes=0, **args))
    theirs = {re.sub(pattern, name, key): value for key, value in model.state_dict().items()}
    torch.save({"teacher": {f"backbone.{key}": value for key, value in theirs.items()}}, tmp_path / "a.pth")
    same(pt.load_backbone(join_args("test_vit", args), weights=tmp_path / "a.pth"), model)


def test_moco_v2(tmp_path):
    model = drawn(timm.create_model("resnet18", num_classes=0, layers=(1, 1, 1, 1)))
    queries = {f"module.encoder_q.{name}": value for name, value in model.state_dict().items()}
    keys = {f"module.encoder_k.{name}": value + 1 for name, value in model.state_dict().items()}
    torch.save({"state_dict": queries | keys | {"module.queue": torch.zeros(2)}}, tmp_path / "moco.pth.tar")
    same(pt.load_backbone("resnet18?layers=[1,1,1,1]", 64, tmp_path / "moco.pth.tar"), model)


def test_torchvisions_vit(tmp_path):
    model = drawn(TorchvisionViT(32, 8, 2, 4, 32, 80))
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    model.heads = torch.nn.Identity()
    args = {"embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.5, "patch_size": 8}
    backbone = pt.load_backbone(join_args("vit_base_patch16_224", args), 32, tmp_path / "vit.pth")
    same(backbone, model)
    assert backbone.mean == IMAGENET


def test_names_people_type(monkeypatch, tmp_path):
    for name in ("timm/test_vit", "hf-hub:timm/test_vit", "test_vit"):
        assert (
            pt.load_backbone(name, 32, "random").fingerprint == pt.load_backbone("test_vit", 32, "random").fingerprint
        )
    hf.ViTConfig(**TALL).save_pretrained(tmp_path)
    monkeypatch.setattr("prompttune.backbones.names.hub_answers", lambda: False)
    files = {"config.json": str(tmp_path / "config.json")}
    monkeypatch.setattr("prompttune.backbones.names.try_to_load_from_cache", lambda _repo, file, **_: files.get(file))
    backbone = pt.load_backbone("google/vit-base-patch16-224", weights="random")
    assert (backbone.name, backbone.width) == ("google/vit-base-patch16-224", 32)
    with pytest.raises(BackboneError, match="no weights found for google/vit"):
        pt.load_backbone("google/vit-base-patch16-224")
    hf.ViTModel(hf.ViTConfig(**TALL)).save_pretrained(tmp_path)
    files["model.safetensors"] = str(tmp_path / "model.safetensors")
    backbone = pt.load_backbone("google/vit-base-patch16-224")
    assert backbone.weights == "auto"
    files.clear()
    file = tmp_path / "model.safetensors"
    assert pt.load_backbone("google/vit-base-patch16-224", weights=file).fingerprint == backbone.fingerprint


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("test_vit?init_values", UsageError, "give NAME=VALUE"),
        ("test_vit?colour=1", BackboneError, "colour"),
        ("local-dir:/nowhere", BackboneError, "no folder at /nowhere"),
        ("nobody/nothing", BackboneError, "hub is out of reach"),
        ("FOLDER", BackboneError, "is a bert of transformers; known: vit, deit"),
    ],
)
def test_names_that_stand_for_nothing(name, error, message, monkeypatch, tmp_path):
    monkeypatch.setattr("prompttune.backbones.names.hub_answers", lambda: False)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(error, match=message) as caught:
        pt.load_backbone(name.replace("FOLDER", str(tmp_path)), weights="random")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "vit", "hidden_size": 0, "intermediate_size": 8}, "is damaged: ZeroDivisionError"),
        ({"architecture": "test_vit", "mean": [1]}, "is damaged: ValueError"),
        ({"architecture": "test_vit"}, "no weights found for .*the folder holds none of model.safetensors"),
    ],
)
def test_folders_that_do_not_load(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=message):
        pt.load_backbone(str(tmp_path))
    weights = stored(timm.create_model("test_vit", num_classes=0), tmp_path / "any.pth")
    assert pt.load_backbone("test_vit", weights=weights).width == 64  # what lies beside a file may be of something else


def test_a_tensor_too_many_names_the_argument(tmp_path):
    path = stored(timm.create_model("test_vit", num_classes=0, init_values=1.0), tmp_path / "uni.bin")
    with pytest.raises(BackboneError, match=r"unknown blocks\.0\.ls1\.gamma.*try --backbone-arg init_values=1e-5"):
        pt.load_backbone("test_vit", weights=path)
    meta = timm.create_model("vit_small_patch16_dinov3", num_classes=0, depth=1, qkv_bias=True)
    tensors = {re.sub(r"gamma_(\d)", r"ls\1.gamma", key): value for key, value in meta.state_dict().items()}
    tensors["blocks.0.attn.qkv.bias"] = torch.cat([torch.full((384,), fill) for fill in (1.0, 0.0, 1.0)])
    tensors = {key: value for key, value in tensors.items() if not key.endswith(("q_bias", "v_bias"))}
    torch.save(tensors | {"storage_tokens": tensors.pop("reg_token")}, tmp_path / "dinov3.pth")
    with pytest.raises(BackboneError, match=r"unknown blocks\.0\.attn\.qkv\.bias; try --backbone-arg qkv_bias=true"):
        pt.load_backbone("vit_small_patch16_dinov3?depth=1", 32, tmp_path / "dinov3.pth")
    backbone = pt.load_backbone("vit_small_patch16_dinov3?depth=1&qkv_bias=true", 32, tmp_path / "dinov3.pth")
    assert backbone.model.blocks[0].attn.v_bias[0] == 1
    assert split_args(join_args("a", {"b": 1e-5, "c": [1, 2], "d": "e"})) == ("a", {"b": 1e-5, "c": [1, 2], "d": "e"})


def test_arguments_become_a_part_of_the_name(tmp_path):
    from prompttune.training.config import TrainConfig

    values = {"data": "demo/digits", "output": str(tmp_path), "backbone": "test_vit"}
    config = TrainConfig.from_flat(values | {"backbone_arg": ["init_values=1e-5", "reg_tokens=2"]})
    assert config.backbone == "test_vit?init_values=1e-5&reg_tokens=2"
    assert TrainConfig.from_flat(config.to_flat()).to_flat() == config.to_flat()
    backbone = pt.load_backbone(config.backbone, 32, "random")
    assert backbone.num_prefix_tokens == 3
    assert backbone.name == config.backbone
