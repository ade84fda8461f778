"""``prompttune backbones`` and the crop of a backbone's publishers."""

import json

import pytest
import timm
from click.testing import CliRunner

import prompttune as pt
from prompttune.backbones.catalogue import describe_backbone, families
from prompttune.cli.main import cli
from prompttune.errors import UsageError
from prompttune.training import TrainConfig
from tests.drawing import drawn_backbone


def told(*arguments):
    result = CliRunner().invoke(cli, ["backbones", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_name_of_timm_is_in_one_family():
    names = [name for family in families() for name in family.models]
    assert sorted(names) == sorted(timm.list_models())


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "test_vit_relpos"])
def test_a_description_is_that_of_the_loaded_backbone(name):
    found, loaded = describe_backbone(name), pt.load_backbone(name, weights="random")
    assert (found.width, found.image_size, found.kind) == (loaded.width, loaded.image_size, type(loaded))
    assert found.parameters == sum(one.numel() for one in loaded.model.parameters())
    assert found.tokens == getattr(loaded, "num_tokens", found.tokens)
    assert bool(found.limits) == (type(loaded).__name__ == "PlainBackbone")


def test_the_command_lists_and_describes():
    rows = {row["family"]: row for row in json.loads(told("--json"))}
    assert (rows["vision_transformer"]["methods"], rows["efficientnet"]["methods"]) == (18, 10)
    many = told("vit_small_patch14*")
    assert "vit_small_patch14_reg4_dinov2" in many
    assert "518 px, bicubic, center" in many
    one = json.loads(told("vit_small_patch14_dinov2", "--json"))
    assert (one["tokens"], one["limits"]) == (1370, "")
    assert (one["pretrained"][0]["tag"], one["pretrained"][0]["licence"]) == ("lvd142m", "apache-2.0")
    assert "methods vpt-shallow, lora, ssf, bitfit, side, linear, full, dam-vp" in told("test_efficientnet")
    assert "parameters 0.1 M" in told("timm/test_vit?depth=2")


def test_a_folder_is_described_by_its_own_configuration(tmp_path):
    config = {"architecture": "test_vit", "pretrained_cfg": {"input_size": [3, 96, 96]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = json.loads(told(str(tmp_path), "--json"))
    assert (found["image_size"], found["pretrained"]) == (96, [])


@pytest.mark.parametrize(("name", "message"), [("vit_smal", "unknown backbone 'vit_smal'"), ("qq*", "no model that")])
def test_a_name_that_timm_does_not_know_is_one_line(name, message):
    result = CliRunner().invoke(cli, ["backbones", name])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_crop_of_the_publishers(tmp_path):
    backbone = drawn_backbone("test_vit", tmp_path, 64)
    config = timm.get_pretrained_cfg("test_vit")

    def settings(**given):
        return TrainConfig(backbone="test_vit", data="x", output="y", **given).preprocess(backbone)

    own = settings(crop_mode="backbone")
    assert (own.crop_mode, own.crop_pct) == (config.crop_mode or "center", config.crop_pct)
    assert (settings().crop_mode, settings().crop_pct) == ("squash", 1.0)
    with pytest.raises(UsageError, match=r"crop mode backbone brings its own share \(0\.95\): leave out crop_pct"):
        settings(crop_mode="backbone", crop_pct=0.9)
