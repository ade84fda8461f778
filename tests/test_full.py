"""Full fine-tuning: the task's weights are its own, and so is its engine."""

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

import prompttune as pt
from prompttune.backbones.base import fingerprint_of
from prompttune.errors import EngineError
from prompttune.export import EngineFolder
from prompttune.export.folder import ONNX_FILE
from tests.engines import backbone, checkpoint, exported, noise, workshop
from tests.training_helpers import config, no_pictures, one_thread, write_folder  # noqa: F401

SIZE = 32


@pytest.fixture(scope="module")
def bars(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("bars"))


@pytest.fixture(scope="module")
def tuned():
    """A checkpoint whose weights are a little off those of the drawn backbone, with a head to match."""
    folder = workshop() / "full"
    model = pt.PromptModel(backbone(), pt.FullConfig(), labels=["ant", "bee", "cat"])
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.task_parameters().items():
        noise_of = torch.randn(parameter.shape, generator=draw)
        parameter.data.add_(noise_of * (1.0 if name.startswith("head") else 0.05 * parameter.data.abs().mean()))
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def engine(tuned):
    return pt.export_engine([tuned], workshop() / "full-engine", batch_sizes=(1, 3)).path


def logits_of(folder, images):
    with torch.no_grad():
        return pt.PromptModel.load(folder, backbone())(torch.from_numpy(images)).logits.numpy()


def test_a_new_task_starts_as_the_plain_backbone():
    model, images = pt.PromptModel(backbone(), pt.FullConfig(), 3), torch.from_numpy(noise(2))
    assert torch.equal(model(images).features, backbone()(images))


@pytest.mark.usefixtures("one_thread", "no_pictures")
@pytest.mark.parametrize("name", ["test_vit", "test_swin2"])
def test_training_tunes_every_tensor_of_a_copy(bars, tmp_path, name):
    plain = pt.load_backbone(name, SIZE if name == "test_vit" else 64, "random:0")
    before = fingerprint_of(plain.model.state_dict())
    settings = config(
        bars, tmp_path / "run", method="full", epochs=2, backbone=name, image_size=plain.image_size, lr=1e-3
    )
    result = pt.train(settings, plain)
    assert fingerprint_of(plain.model.state_dict()) == before
    stored = load_file(tmp_path / "run" / "prompt_model.safetensors")
    own = dict(plain.model.named_parameters())
    assert stored.keys() == {f"method.backbone.model.{key}" for key in own} | {"head.weight", "head.bias"}
    for key, value in own.items():
        assert not torch.equal(stored[f"method.backbone.model.{key}"], value), key
    first, last = (result.metrics["history"][epoch]["train_loss"] for epoch in (0, -1))
    assert last < first


@pytest.mark.usefixtures("one_thread", "no_pictures")
def test_a_resumed_run_ends_bit_identical(bars, tmp_path):
    whole = config(bars, tmp_path / "whole", method="full", epochs=2)
    pt.train(whole)
    broken = config(bars, tmp_path / "broken", method="full", epochs=2)

    def stop(news):
        if news.phase == "epoch":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pt.train(broken, on_progress=stop)
    pt.train(broken, resume=True)
    one, other = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "broken"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_engine_has_the_tuned_weights_in_its_graph(tuned, engine):
    manifest = EngineFolder(engine).manifest
    images = noise(3)
    assert np.abs(pt.Engine(engine).logits(images, "full") - logits_of(tuned, images)).max() <= 1e-4
    untuned = pt.PromptModel(backbone(), pt.LinearConfig(), 3)
    untuned.head.load_state_dict(pt.PromptModel.load(tuned, backbone()).head.state_dict())
    assert np.abs(untuned(torch.from_numpy(images)).logits.detach().numpy() - logits_of(tuned, images)).max() > 0.1
    own = pt.PromptModel.load(tuned, backbone()).method.backbone.model
    assert manifest.backbone["fingerprint"] == fingerprint_of(own.state_dict()) != backbone().fingerprint
    assert manifest.method["name"] == "full"
    assert {one.name for one in manifest.inputs if one.name.startswith("bank.")} == {
        "bank.head.weight",
        "bank.head.bias",
    }
    assert manifest.parity["passed"]
    graph = onnx.load(str(engine / ONNX_FILE)).graph
    patches = next(tensor for tensor in graph.initializer if tensor.name.endswith("patch_embed.proj.bias"))
    assert np.array_equal(onnx.numpy_helper.to_array(patches), own.patch_embed.proj.bias.detach().numpy())


def test_the_engine_validates_against_its_checkpoint_and_no_other(engine, tuned, tmp_path):
    assert pt.validate_engine(engine, batch_sizes=(1, 3)).passed
    assert pt.validate_engine(engine, batch_sizes=(1,), weights=tuned).passed
    with pytest.raises(EngineError, match="give the right file with --weights"):
        pt.validate_engine(engine, weights=checkpoint("full", 0))
    with pytest.raises(EngineError, match=r"no checkpoint folder .* with --weights"):
        pt.validate_engine(engine, weights=tmp_path / "moved")
    with pytest.raises(EngineError, match="trained no backbone"):
        pt.validate_engine(engine, weights=checkpoint("linear", 0))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_lower_precisions_lower_the_tuned_weights(tuned, tmp_path, precision):
    settings = pt.ExportSettings("onnx", precision)
    folder = pt.export_engine([tuned], tmp_path / "engine", format=settings, batch_sizes=(1, 3))
    assert folder.manifest.parity["passed"]
    images = noise(4)
    found, exact = pt.Engine(folder.path).logits(images, "full"), logits_of(tuned, images)
    assert 0 < np.abs(found - exact).max() <= 0.1 * np.abs(exact).max()
    assert (engine_bytes := sum(one.size for one in folder.manifest.files.values())) > 0
    plain = EngineFolder(workshop() / "full-engine").manifest
    assert engine_bytes < sum(one.size for one in plain.files.values())


def test_one_engine_a_task(tuned, engine, tmp_path):
    other = checkpoint("full", 1)
    with pytest.raises(
        EngineError, match=r"task 'b' cannot join task 'a': full fine-tuning .* one engine per task"
    ) as two:
        pt.export_engine({"a": tuned, "b": other}, tmp_path / "two")
    assert "\n" not in str(two.value)
    assert not (tmp_path / "two").exists()
    with pytest.raises(EngineError, match="one engine per task"):
        pt.export_engine({"a": checkpoint("linear", 0), "b": other}, tmp_path / "two")
    for name in ("full", "linear"):
        with pytest.raises(EngineError, match="cannot join the engine: full fine-tuning"):
            pt.Engine(engine).add_task("second", checkpoint(name, 1))
    with pytest.raises(EngineError, match="one engine per task"):
        pt.Engine(exported("linear")).add_task("second", other)
