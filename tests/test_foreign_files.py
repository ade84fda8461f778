"""Pickled files of other people: whatever is in them, one line, no code run, no memory for what they only claim."""

import os
from collections import OrderedDict

import numpy as np
import pytest
import torch

import prompttune as pt
from prompttune.errors import BackboneError, CheckpointError
from tests import released
from tests.drawing import drawn_backbone, drawn_model

SIZE = 64
NO_FILE = "it is not a file of torch.save, is damaged, or holds more than tensors"
KEY, PLAIN, PART = "is not a name", "is not a plain tensor", "only partly stored"


class Printing:
    """What a pickle can do."""

    def __reduce__(self):
        return (os.write, (1, b"code ran"))


class Overridden:
    """An ``OrderedDict`` whose methods are numbers."""

    def __reduce__(self):
        return (OrderedDict, (), {"items": 1, "get": 2, "keys": 3}, None, iter({"cls_token": torch.ones(2)}.items()))


class Flagged:
    """A type of float32 with flags that tell NumPy to count references to its numbers."""

    def __reduce__(self):
        return (np.dtype, ("f4", False, True), (3, "<", None, None, None, -1, -1, 63))


class FlaggedArray:
    """An array of that type."""

    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        made, arguments, (version, shape, _, by_column, data) = self.array.__reduce__()
        return (made, arguments, (version, shape, Flagged(), by_column, data))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return drawn_backbone("test_vit", tmp_path_factory.mktemp("foreign"), SIZE)


def both_refuse(file, vit, message):
    """As weights and as a released checkpoint."""
    with pytest.raises(BackboneError, match=message) as weights:
        pt.load_backbone("test_vit", SIZE, file)
    with pytest.raises(CheckpointError, match=message) as checkpoint:
        pt.import_checkpoint("vpt", file, file.parent / "x", backbone=vit)
    for caught in (weights, checkpoint):
        assert "\n" not in str(caught.value)
        assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b".", b"\x80\x02e.", b"\x80\x02h\x05.", b"\x80\x02}(K\x01u.", b"<!DOCTYPE html>\n<html></html>"],
    ids=repr,
)
def test_what_is_no_checkpoint_is_not_called_code(content, vit, tmp_path):
    (tmp_path / "file.pth").write_bytes(content)
    both_refuse(tmp_path / "file.pth", vit, NO_FILE)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_is_named_and_not_run(zipped, vit, tmp_path, capfd):
    torch.save({"model": Printing()}, tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    message = "more than tensors and plain values, posix.write, so reading it could run code"
    both_refuse(tmp_path / "file.pth", vit, message)
    assert "code ran" not in capfd.readouterr().out


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cls_token": torch.ones(1).expand(2**20, 2**20)}, PART),
        ({"cls_token": torch.ones(2, 2).to_sparse()}, PLAIN),
        ({"cls_token": torch.empty(2, device="meta")}, PLAIN),
        ({3: torch.ones(2)}, f"key of type int, which {KEY}"),
        ({torch.ones(2): torch.ones(2)}, f"key of type Tensor, which {KEY}"),
        ({"a\nb": torch.ones(2)}, KEY),
        ({"cls_token": np.array(["text"])}, f"{PLAIN}|holds no backbone weights"),
        ({"cls_token": np.array([1, "a"], dtype=object)}, f"{PLAIN}|holds no backbone weights"),
        (None, "holds no state dict but a NoneType"),
    ],
    ids=["expanded", "sparse", "meta", "number", "tensor", "line", "text", "objects", "none"],
)
def test_what_cannot_be_taken(content, message, zipped, vit, tmp_path):
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    both_refuse(tmp_path / "file.pth", vit, message)


def test_attributes_in_a_pickle_are_not_read(vit, tmp_path):
    torch.save(Overridden(), tmp_path / "file.pth")
    both_refuse(tmp_path / "file.pth", vit, "cls_token")
    tensors = released.vpt(vit)
    bias = tensors["head.last_layer.bias"]
    bias.detach = bias.float = bias.isfinite = 3
    torch.save({"model": tensors}, tmp_path / "file.pth")
    made = pt.import_checkpoint("vpt", tmp_path / "file.pth", tmp_path / "task", backbone=vit)
    assert made.model.head.bias.tolist() == bias.tolist()


@pytest.mark.parametrize("change", [FlaggedArray, np.asfortranarray, lambda array: array.astype(">f8")],
                         ids=["flags", "columns", "bytes"])  # fmt: skip
def test_arrays_are_read_without_numpy(change, vit, tmp_path):
    prompts = np.random.default_rng(0).standard_normal((1, 3, vit.width), dtype=np.float32)
    torch.save({"shallow_prompt": change(prompts)}, tmp_path / "file.pth")
    made = pt.import_checkpoint("vpt", tmp_path / "file.pth", tmp_path / "task", backbone=vit, labels=["a", "b"])
    assert np.array_equal(made.model.method.prompts.detach().numpy(), prompts)


def test_arrays_beside_a_backbones_weights_are_left_out(tmp_path):
    state = pt.load_backbone("test_vit", SIZE, "random").model.state_dict()
    torch.save({**state, "epochs": np.arange(3)}, tmp_path / "file.pth")
    assert pt.load_backbone("test_vit", SIZE, tmp_path / "file.pth").width == 64


@pytest.mark.parametrize(
    ("name", "shape"), [("pos_embed", ()), ("pos_embed", (1, 0, 64)), ("patch_embed.proj.weight", ())], ids=str
)
def test_weights_of_shapes_that_timm_takes_apart(name, shape, tmp_path):
    state = pt.load_backbone("test_vit", SIZE, "random").model.state_dict()
    torch.save({**state, name: torch.zeros(shape)}, tmp_path / "file.pth")
    with pytest.raises(BackboneError, match="does not fit the backbone") as caught:
        pt.load_backbone("test_vit", SIZE, tmp_path / "file.pth")
    assert f"{name} is {shape}, expected" in str(caught.value)


def refused(message, layout, tensors, backbone, folder, **given):
    torch.save({"model": tensors}, folder / "file.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        pt.import_checkpoint(layout, folder / "file.pth", folder / "x", backbone=backbone, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 0, 64), (1, 1, 64), (1, 2**19, 1)], ids=str)
def test_an_image_size_that_shapes_cannot_say(shape, tmp_path):
    native = pt.load_backbone("test_vit", weights="random")
    tensors = released.vpt(native)
    tensors["enc.transformer.embeddings.position_embeddings"] = torch.zeros(shape, dtype=torch.uint8)
    refused(r"position_embeddings is \(1, \d+, \d+\), expected \(1, 101, 64\)", "vpt", tensors, "test_vit", tmp_path,
            weights="random")  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "message"),
    [((), "expected 2 axes"), ((2**40, 0), "expected 2 axes"), ((2**18, 1), "more than the 131072")],
    ids=str,
)
def test_a_head_of_another_shape(shape, message, vit, tmp_path):
    tensors = {**released.vpt(vit), "head.last_layer.weight": torch.zeros(shape, dtype=torch.uint8)}
    refused(rf"head.last_layer.weight is \(.*, {message}", "vpt", tensors, vit, tmp_path)


def test_a_swins_map_of_one_axis(tmp_path):
    swin = drawn_backbone("test_swin", tmp_path, SIZE)
    tensors = released.sa2vp_swin(drawn_model(swin, pt.SA2VPConfig(rank=4)))
    tensors["vit_base.patch_embed.deep_ppt"] = torch.zeros(4)
    refused(r"deep_ppt is \(4,\), expected 3 axes", "sa2vp", tensors, "test_swin", tmp_path, weights=swin.weights,
            image_size=SIZE)  # fmt: skip
    refused(r"deep_ppt is \(4,\), expected 3 axes", "sa2vp", tensors, "test_swin", tmp_path, weights=swin.weights)


@pytest.mark.parametrize("layout", ["sa2vp", "vpt", "gapt"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_tensors_that_are_not_finite_are_named(layout, value, vit, tmp_path):
    if layout == "sa2vp":
        tensors, name = released.sa2vp_vit(drawn_model(vit, pt.SA2VPConfig(rank=4))), "class_head.bias"
    else:
        tensors, name = (released.vpt if layout == "vpt" else released.gapt)(vit), "head.last_layer.bias"
    tensors[name][1] = value
    settings = {"pool": "backbone"} if layout == "gapt" else {}
    refused(f"not finite: {name}$", layout, tensors, vit, tmp_path, settings=settings)


def test_numbers_beyond_float32_are_not_finite(vit, tmp_path):
    tensors = released.vpt(vit)
    tensors["head.last_layer.bias"] = tensors["head.last_layer.bias"].double() + 1e300
    refused("not finite: head.last_layer.bias", "vpt", tensors, vit, tmp_path)
