"""Segmentation heads and the maps that methods give them: seam, equations, mixed batches, checkpoints."""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prompttune as pt
from prompttune.errors import BackboneError, CheckpointError, UsageError
from prompttune.task_types.segmentation.config import output_size
from prompttune.task_types.segmentation.pyramid import POOLED, depthwise
from prompttune.task_types.segmentation.resize import Resize
from tests.drawing import default_configs
from tests.engines import config_of
from tests.segmenting import GIVES_MAPS, drawn_segmentation, other_backbone, tiny
from tests.swins import ON_SWIN, SWINS

HEADS = ("linear", "pyramid")
CASES = [(method, "test_vit", head) for method, head in itertools.product(GIVES_MAPS, HEADS)]
# A register, average pooling and LayerScale; RMS norms; rotary embedding.
CASES += [(method, name, "linear") for method in ("sa2vp", "lspt", "linear") for name in ("test_vit2", "test_vit4")]
CASES += [(method, "test_eva", "linear") for method in ("sa2vp", "vpt-deep")]
CASES += [("sa2vp", "test_vit2", "pyramid")]


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def over(name):
    return tiny(name) if name == "test_vit" else other_backbone(name, 64)


@pytest.mark.parametrize(("method", "name", "head"), CASES)
class TestSeam:
    def test_state_has_the_declared_layout(self, method, name, head):
        model = drawn_segmentation(over(name), method, head)
        state, layout = model.task_state(), model.state_layout()
        assert list(state) == list(layout)
        sizes = {"rank": getattr(model.config, "rank", 0), "classes": 5}
        for key, tensor in state.items():
            assert tuple(tensor.shape) == (1, *(sizes.get(size, size) for size in layout[key])), key
        assert layout["head.bias"] == ("classes",)

    def test_a_mixed_batch_equals_single_runs(self, method, name, head, images):
        models = [drawn_segmentation(over(name), method, head, seed) for seed in range(1)]
        models += [drawn_segmentation(over(name), method, head) for _ in range(2)]
        for number, model in enumerate(models):
            for parameter in model.task_parameters().values():
                parameter.data.mul_(1 + 0.3 * number)
        with torch.no_grad():
            states = [model.task_state() for model in models]
            mixed = {key: torch.cat([state[key] for state in states]) for key in states[0]}
            together = models[0].forward_state(images, mixed).logits
            single = torch.cat([model(images[row : row + 1]).logits for row, model in enumerate(models)])
        assert together.shape == (3, 5, 16, 16)
        torch.testing.assert_close(together, single, atol=5e-5, rtol=1e-4)
        assert (single[1] - models[0](images[1:2]).logits[0]).abs().max() > 1e-3, "the tasks must differ"

    def test_gradients_reach_what_is_read(self, method, name, head, images):
        model = drawn_segmentation(over(name), method, head).train()
        out = model(images, aux=True)
        loss = out.logits.square().mean()
        if out.aux_logits is not None:
            assert out.aux_logits.shape == out.logits.shape
            loss = loss + out.aux_logits.square().mean()
        loss.backward()
        without = [key for key, one in model.task_parameters().items() if one.grad is None or not one.grad.any()]
        assert without == []
        assert all(one.grad is None for one in model.backbone.parameters())


def test_maps_are_the_plain_models_own(images):
    backbone = tiny()
    method = drawn_segmentation(backbone, "linear", "pyramid").method
    found = method(method.image_state(images, (1, 5)), {}, False, (1, 5)).maps
    _, wanted = backbone.model.forward_intermediates(images, indices=[1, 5], norm=True, output_fmt="NLC")
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", GIVES_MAPS)
def test_asking_for_maps_leaves_the_features_alone(method, images):
    model = drawn_segmentation(tiny(), method, "linear")
    with torch.no_grad():
        state = {key: value for key, value in model.task_state().items() if not key.startswith("head.")}
        method = model.method
        plain = method(method.image_state(images), state)
        whole = method(method.image_state(images, (0, 5)), state, False, (0, 5))
    torch.testing.assert_close(plain.features, whole.features, atol=2e-5, rtol=1e-4)
    assert plain.maps == ()
    assert len(whole.maps) == 2
    assert whole.maps[0].shape == (3, 16, 64)


def test_linear_head_is_a_convolution_and_an_interpolation(images):
    model = drawn_segmentation(tiny(), "linear", "linear")
    with torch.no_grad():
        _, (tokens,) = model.backbone.model.forward_intermediates(images, indices=[5], norm=True, output_fmt="NCHW")
        scores = F.conv2d(tokens, model.head.weight[:, :, None, None], model.head.bias)
        wanted = F.interpolate(scores, size=(16, 16), mode="bilinear", align_corners=False)
        torch.testing.assert_close(model(images).logits, wanted, atol=1e-5, rtol=1e-4)


def test_pyramid_head_is_its_equations(images):
    """Straight from the docstring, with PyTorch's convolutions, interpolation and pooling."""
    model = drawn_segmentation(tiny(), "linear", "pyramid")
    head, p = model.head, dict(model.head.named_parameters())

    def point(x, weight):  # [K_in, K_out]
        return F.conv2d(x, weight.T[:, :, None, None])

    def norm(x, number):
        normed = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return (normed * p["scale"][number][:, None, None] + p["shift"][number][:, None, None]).relu()

    def up(x, size):
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    with torch.no_grad():
        levels = model.levels
        levels = model.levels
        assert levels == (1, 2, 4, 5)  # of six blocks
        _, maps = model.backbone.model.forward_intermediates(images, indices=list(levels), norm=True, output_fmt="NCHW")
        laterals = [norm(point(one, p["lateral"][level]), level) for level, one in enumerate(maps)]
        pools = [side for side in POOLED if side <= 4]
        assert pools == [1, 2, 3]
        parts = [laterals[3]]
        for number, side in enumerate(pools):
            pooled = norm(point(F.adaptive_avg_pool2d(laterals[3], side), p["pooled"][number]), 4 + number)
            parts.append(up(pooled, (4, 4)))
        top = norm(point(torch.cat(parts, 1), p["top"].flatten(0, 1)), 7)
        f4 = top
        f3 = laterals[2] + f4
        f2 = up(laterals[1], (8, 8)) + up(f3, (8, 8))
        f1 = up(laterals[0], (16, 16)) + up(f2, (16, 16))
        smoothed = []
        for level, one in enumerate((f1, f2, f3, f4)):
            kernel = p["depthwise"][level].view(8, 1, 3, 3)
            convolved = F.conv2d(one, kernel, padding=1, groups=8)
            smoothed.append(up(norm(point(convolved, p["pointwise"][level]), 8 + level), (16, 16)))
        fused = norm(point(torch.cat(smoothed, 1), p["fuse"].flatten(0, 1)), 12)
        wanted = F.conv2d(fused, head.weight[:, :, None, None], head.bias)
        torch.testing.assert_close(model(images).logits, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("source", "target"), [((4, 4), (16, 16)), ((8, 8), (28, 28)), ((5, 7), (3, 11))])
def test_resizing_is_bilinear_interpolation(source, target):
    maps = torch.randn(2, 3, *source)
    wanted = F.interpolate(maps, size=target, mode="bilinear", align_corners=False)
    torch.testing.assert_close(Resize.bilinear(source, target)(maps), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(Resize.pooled(source, 3)(maps), F.adaptive_avg_pool2d(maps, 3), atol=1e-5, rtol=1e-5)


def test_depthwise_takes_a_kernel_a_row():
    maps, kernels = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 9)
    found = depthwise(maps, kernels[..., None, None])
    for row in range(2):
        wanted = F.conv2d(maps[row : row + 1], kernels[row].view(3, 1, 3, 3), padding=1, groups=3)
        torch.testing.assert_close(found[row : row + 1], wanted, atol=1e-5, rtol=1e-5)


def test_sizes_and_levels():
    assert output_size(64) == (16, 16)
    assert output_size(126) == (32, 32)
    assert pt.SegmentationConfig("linear").levels(12) == (11,)
    assert pt.SegmentationConfig("pyramid").levels(12) == (2, 5, 8, 11)
    with pytest.raises(UsageError, match="reads 4 blocks, the backbone has 3"):
        pt.SegmentationConfig("pyramid").levels(3)


def test_bad_settings_are_refused():
    with pytest.raises(UsageError, match="unknown head 'conv'"):
        pt.SegmentationConfig("conv")
    for channels in (0, 10**9, "8", 8.0, True):
        with pytest.raises(UsageError, match="from 1 to 4096 channels"):
            pt.SegmentationConfig("pyramid", channels)
    with pytest.raises(UsageError, match="at most 255 classes"):
        pt.PromptModel(tiny(), config_of("linear"), 256, task_type=pt.SegmentationConfig())


@pytest.mark.parametrize("config", default_configs(), ids=lambda config: config.method)
def test_a_method_gives_maps_or_says_that_it_does_not(config):
    method = config.resolved(tiny()).build(tiny())
    assert method.gives_maps == (config.method in GIVES_MAPS)
    if not method.gives_maps:
        with pytest.raises(BackboneError, match=f"segmentation: method {config.method} gives no maps"):
            pt.PromptModel(tiny(), config, 3, task_type=pt.SegmentationConfig())


@pytest.mark.parametrize("method", ON_SWIN)
def test_swin_is_refused(method):
    swin = other_backbone(SWINS[0], 64)
    made = config_of(method).resolved(swin).build(swin)
    with pytest.raises(BackboneError, match=f"method {method} gives no maps of patch tokens on SwinBackbone"):
        pt.SegmentationConfig().check_method(made, method, swin)


@pytest.mark.parametrize("head", HEADS)
def test_a_checkpoint_comes_back(head, tmp_path, images):
    model = drawn_segmentation(tiny(), "lspt", head)
    model.save(tmp_path / "run", {"val_miou": 0.5})
    loaded = pt.PromptModel.load(tmp_path / "run", backbone=tiny())
    assert loaded.task_type == model.task_type
    assert loaded.task_type.name == "segmentation"
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images).logits)
    config = json.loads((tmp_path / "run" / "prompt_config.json").read_text())
    assert config["format_version"] == 2
    assert not any("upsample" in name or "rows" in name for name in loaded.task_parameters())


def test_classifications_keep_their_format(tmp_path):
    pt.PromptModel(tiny(), config_of("linear"), 3).save(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "prompt_config.json").read_text())
    assert config["format_version"] == 1
    assert "segmentation" not in config
    config["format_version"] = 2
    (tmp_path / "run" / "prompt_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="lacks task_type"):
        pt.PromptModel.load(tmp_path / "run", backbone=tiny())


def test_padding_classes_never_win():
    """In a bank, a smaller head's rows are zeros and its biases -inf: neither may spoil the others' logits."""
    head = drawn_segmentation(tiny(), "linear", "linear").head
    tokens = (torch.randn(1, 16, 64),)
    state = {key: value.detach().clone() for key, value in head.task_state().items()}
    wanted = head(None, tokens, state)
    padded = {
        "head.weight": torch.cat((state["head.weight"], torch.zeros(1, 2, 64)), dim=1),
        "head.bias": torch.cat((state["head.bias"], torch.full((1, 2), -torch.inf)), dim=1),
    }
    found = head(None, tokens, padded).detach()
    assert torch.equal(found[:, :5], wanted.detach())
    assert np.isneginf(found[:, 5:].numpy()).all()
