"""Any timm model runs as a whole under the methods that need only its features."""

import pytest
import timm
import torch
from safetensors.torch import save_file

import prompttune as pt
from prompttune.backbones import PlainBackbone
from prompttune.errors import BackboneError, EngineError, UsageError
from prompttune.export.formats import ExportSettings
from prompttune.export.formats.onnx import write_onnx
from prompttune.methods import METHODS
from tests.drawing import drawn_backbone
from tests.engines import build_request, checkpoint, exported
from tests.plains import ON_PLAIN

NAMES = (
    "test_efficientnet",
    "test_efficientnet_ln",
    "test_byobnet",
    "test_mambaout",
    "test_nfnet",
    "test_vit_relpos",
    "test_coatnet",
    "test_maxvit",
    "convit_tiny",
)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_are_timms(name, tmp_path):
    donor = timm.create_model(name, num_classes=0)
    save_file(donor.state_dict(), tmp_path / "weights.safetensors")
    backbone = pt.load_backbone(name, weights=tmp_path / "weights.safetensors")
    assert isinstance(backbone, PlainBackbone)
    plain = donor.eval()
    images = torch.randn(2, 3, backbone.image_size, backbone.image_size, generator=torch.Generator().manual_seed(0))
    expected = plain(images)
    assert expected.shape == (2, backbone.width)
    torch.testing.assert_close(backbone(images), expected, atol=1e-6, rtol=1e-5)


def test_a_size_without_a_patch_size():
    """EfficientViT's patch embedding is a row of convolutions."""
    assert pt.load_backbone("efficientvit_m0", 192, "random").image_size == 192


@torch.no_grad()
def test_names_that_begin_with_encoder(tmp_path):
    """The encoders of other authors' files lose this prefix, which some of timm's own models have."""
    donor = timm.create_model("qwen3_vit_88m", num_classes=0, depth=1, embed_dim=32, num_heads=2).eval()
    save_file(donor.state_dict(), tmp_path / "weights.safetensors")
    name = "qwen3_vit_88m?depth=1&embed_dim=32&num_heads=2"
    backbone = pt.load_backbone(name, weights=tmp_path / "weights.safetensors")
    assert all(torch.equal(value, donor.state_dict()[key]) for key, value in backbone.model.state_dict().items())


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit_relpos"])
def test_an_engine_agrees_with_pytorch(name):
    report = pt.Engine(exported("linear", name)).folder.manifest.parity
    assert report is not None
    assert all(one["max_abs"] <= 1e-4 for one in report["comparisons"])


def test_a_model_that_clamps_twice_is_exported(tmp_path):
    name = "gemma4_vit_167m?depth=1&embed_dim=64&num_heads=1&head_dim=64&intermediate_size=64"
    pt.PromptModel(pt.load_backbone(name, weights="random"), "linear", 3).save(tmp_path / "run")
    folder = pt.export_engine([tmp_path / "run"], tmp_path / "engine", batch_sizes=(1,), images=1)
    assert folder.manifest.parity["passed"]


@pytest.mark.parametrize(("precision", "name"), [("fp16", "test_efficientnet_ln"), ("int8", "test_vit_relpos")])
def test_engines_of_low_precision_agree(precision, name, tmp_path):
    runs = [checkpoint("linear", number, name) for number in (0, 1)]
    settings = ExportSettings("onnx", precision)
    pt.export_engine(runs, tmp_path / "engine", format=settings, batch_sizes=(1, 2))


def test_attention_over_windows_is_exported(tmp_path):
    """Hiera's queries have five axes, which ONNX's fused attention does not take."""
    backbone = pt.load_backbone("hiera_tiny_224?embed_dim=8&stages=[1,1,1,1]", weights="random")
    pt.PromptModel(backbone, "linear", 3).save(tmp_path / "run")
    pt.export_engine([tmp_path / "run"], tmp_path / "engine", batch_sizes=(1,), images=1)


def test_bfloat16_has_no_convolution_in_onnx(tmp_path):
    with pytest.raises(EngineError, match=r"no bfloat16 convolution .* test_efficientnet .* choose fp16"):
        write_onnx(build_request("linear", ExportSettings("onnx", "bf16"), "test_efficientnet"), tmp_path)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_other_methods_refuse_and_say_why(method, tmp_path):
    backbone = drawn_backbone("test_vit_relpos", tmp_path, 64)
    if method in ON_PLAIN:
        pt.PromptModel(backbone, METHODS[method](), num_classes=2)
        return
    with pytest.raises(
        BackboneError, match=f"^{method} runs on .*, not on PlainBackbone: VisionTransformerRelPos runs only as a whole"
    ):
        pt.PromptModel(backbone, METHODS[method](), num_classes=2)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("levit_128s", 64, "levit_128s takes images of 224 pixels, not of 64"),
        ("test_efficientnet", 0, "image size must be above 0, not 0"),
        ("test_vit_relpos", 65, "image size 65 is not a multiple of test_vit_relpos's patch size 16; nearest: 64"),
        ("test_maxvit", 65, "test_maxvit does not run on images of 65 pixels, its own size is 160: "),
    ],
)
def test_sizes_that_a_model_does_not_take(name, size, message):
    with pytest.raises(UsageError, match=message) as caught:
        pt.load_backbone(name, size, "random")
    assert "\n" not in str(caught.value)
