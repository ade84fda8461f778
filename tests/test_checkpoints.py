"""Checkpoint folders: what they hold, and what is refused when they are damaged or do not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import prompttune as pt
from prompttune.checkpoints import read_config
from prompttune.errors import CheckpointError, PrompttuneError
from prompttune.files import replacing, write_json
from tests.drawing import drawn_backbone, drawn_model


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return drawn_backbone("test_vit", tmp_path_factory.mktemp("weights"), 64)


@pytest.fixture
def saved(backbone, tmp_path):
    model = drawn_model(backbone, pt.SA2VPConfig(rank=4))
    model.save(tmp_path / "task", metrics={"top1": 0.75, "history": [1, 2]})
    return tmp_path / "task"


def test_holds_the_task_and_nothing_of_the_backbone(saved, backbone):
    with safe_open(saved / "prompt_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"head.weight", "head.bias", "method.prompts.0.tokens"} <= names
    assert all(name.startswith(("method.", "head.")) for name in names)
    config = read_config(saved)
    assert config["backbone"]["fingerprint"] == backbone.fingerprint
    assert config["settings"]["prompt_layers"] == [0, 4]
    card = (saved / "README.md").read_text()
    assert "test_vit" in card
    assert "| top1 | 0.75 |" in card
    assert sorted(path.name for path in saved.iterdir()) == [
        "README.md", "prompt_config.json", "prompt_model.safetensors",
    ]  # fmt: skip


def edit(saved, **changes):
    path = saved / "prompt_config.json"
    write_json(path, json.loads(path.read_text()) | changes)


def test_damage_is_one_clear_line(saved, tmp_path):
    model = saved / "prompt_model.safetensors"
    whole = model.read_bytes()

    def refused(message, folder=saved):
        with pytest.raises(CheckpointError, match=message) as caught:
            pt.PromptModel.load(folder)
        assert "\n" not in str(caught.value)

    refused("no checkpoint folder", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("no checkpoint config", tmp_path / "empty")
    model.write_bytes(whole[:-10])
    refused("damaged or was changed")
    model.unlink()
    refused("no prompt_model.safetensors")
    model.write_bytes(whole)
    edit(saved, format_version=99)
    refused("checkpoint format 99, this prompttune reads 1")
    edit(saved, format_version=1, labels="abc")
    refused("labels")
    edit(saved, labels=list("abcde"), method="sa3vp")
    refused("did you mean sa2vp")
    edit(saved, method="sa2vp", settings={"rank": 5, "prompt_layers": [0, 4]})
    refused(r"expected \(1, 17, 5\)")
    (saved / "prompt_config.json").write_text("{")
    refused("cannot read the checkpoint config")


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("backbone", {"image_size": "64"}, "backbone.image_size"),
        ("backbone", {"image_size": True}, "backbone.image_size"),
        ("backbone", {"image_size": -64}, "backbone.image_size must be from 1 to 8192, not -64"),
        ("backbone", {"image_size": 10**9}, "backbone.image_size must be from 1 to 8192"),
        ("backbone", {"name": 5}, "backbone.name"),
        ("backbone", {"name": ["a"]}, "backbone.name"),
        ("backbone", {"fingerprint": 12}, "backbone.fingerprint"),
        ("backbone", {"weights": None}, "backbone.weights"),
        ("preprocess", {"mean": ["x", "y", "z"]}, "mean needs three numbers"),
        ("preprocess", {"mean": 5}, "does not fit"),
        ("preprocess", {"std": [1, 1, 0]}, "std needs three numbers"),
        ("preprocess", {"image_size": "64"}, "image_size must be a whole number"),
        ("preprocess", {"crop_pct": 1e-9}, "sides of more than 8192 pixels"),
        (None, {"labels": [1, 2, 3, 4, 5]}, "labels"),
        (None, {"backbone": ["name"]}, "backbone"),
        (None, {"segmentation": 5}, "segmentation"),
        (None, {"format_version": 2, "segmentation": {"head": "pyramid", "channels": 10**9}}, "1 to 4096 channels"),
        (None, {"format_version": 2, "segmentation": {"head": "pyramid", "channels": "8"}}, "1 to 4096 channels"),
    ],
)
def test_a_config_from_elsewhere_is_not_believed(saved, backbone, part, changes, words):
    config = json.loads((saved / "prompt_config.json").read_text())
    edit(saved, **({part: config[part] | changes} if part else changes))
    with pytest.raises(CheckpointError, match=words) as caught:
        pt.PromptModel.load(saved)
    assert "prompt_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_backbone_is_named_on_both_sides(saved, backbone):
    other = pt.load_backbone("test_vit", 64, "random:3")
    with pytest.raises(CheckpointError, match=f"{backbone.fingerprint[:12]}.*{other.fingerprint[:12]}"):
        pt.PromptModel.load(saved, backbone=other)
    with pytest.raises(CheckpointError, match="image size 64, the backbone has 96"):
        pt.PromptModel.load(saved, backbone=pt.load_backbone("test_vit", 96, backbone.weights))


def test_weights_can_be_given_again(saved, backbone, tmp_path):
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(Path(backbone.weights).read_bytes())
    config = read_config(saved)
    config["backbone"]["weights"] = "/nowhere/file.safetensors"
    write_json(saved / "prompt_config.json", config)
    with pytest.raises(PrompttuneError, match="no weights file"):
        pt.PromptModel.load(saved)
    assert pt.PromptModel.load(saved, weights=moved).backbone.fingerprint == backbone.fingerprint


def test_saving_again_replaces_the_task(saved, backbone):
    model = drawn_model(backbone, pt.SA2VPConfig(rank=4), seed=9)
    model.save(saved)
    images = torch.zeros(1, 3, 64, 64)
    assert torch.equal(pt.PromptModel.load(saved)(images).logits, model(images).logits)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted():
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise RuntimeError("pulled plug")

    with pytest.raises(RuntimeError, match="pulled plug"):
        interrupted()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("labels", [[], ["a", "a"]])
def test_labels_must_make_sense(backbone, labels):
    with pytest.raises(PrompttuneError, match="labels"):
        pt.PromptModel(backbone, pt.LinearConfig(), labels=labels)
    with pytest.raises(PrompttuneError, match="2 labels for 3"):
        pt.PromptModel(backbone, pt.LinearConfig(), 3, labels=["a", "b"])
