"""Settings: types, ranges, the flat namespace, YAML."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from prompttune.backbones import load_backbone
from prompttune.errors import UsageError
from prompttune.methods import METHODS, LSPTConfig
from prompttune.methods.registry import method_fields
from prompttune.settings import Setting, setting, settings_of
from prompttune.training import TrainConfig
from prompttune.training.config import augment_fields, known_names, read_yaml


def make(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"data": "demo/digits", "output": "run", **changes})


def test_every_setting_has_help() -> None:
    for cls in (TrainConfig, *METHODS.values()):
        for name, known in settings_of(cls).items():
            assert known.help, f"{cls.__name__}.{name} has no help"


def test_only_the_two_mappings_are_no_settings() -> None:
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert fields - set(settings_of(TrainConfig)) == {"method_settings", "augment_settings"}


def test_flat_names_do_not_collide() -> None:
    groups = [set(settings_of(TrainConfig)), set(augment_fields()), set(method_fields())]
    assert len(set().union(*groups)) == sum(map(len, groups))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"epochs": 2.5}, "epochs must be a whole number"),
        ({"epochs": float("inf")}, "epochs must be a whole number"),
        ({"lr": 0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be above 0"),
        ({"lr": "fast"}, "lr must be a number"),
        ({"lr": None}, "lr needs a number"),
        ({"val_fraction": 1.0}, "val_fraction must be above 0 and below 1"),
        ({"compile": "yes"}, "compile must be true or false"),
        ({"schedule": "cosin"}, "did you mean cosine"),
        ({"optimizer": "adam"}, "did you mean adamw"),
        ({"method": "sa2vpp"}, "did you mean sa2vp"),
        ({"device": "gpu"}, "unknown device"),
        ({"device": "cuda:x"}, "cuda:INDEX"),
        ({"device": "cuda:1", "devices": 2}, "one device"),
        ({"device": "cpu", "precision": "fp16"}, "fp16 needs a GPU"),
        ({"augment": "heavy"}, "unknown augment"),
        ({"augment_settings": {"no_such": 1}}, "unknown augmentation setting"),
        ({"method_settings": {"num_prompts": 3}}, "unknown setting of sa2vp 'num_prompts'"),
        ({"method_settings": {"rank": "many"}}, "rank must be a whole number"),
        ({"method": "linear", "method_settings": LSPTConfig()}, "method is linear"),
    ],
)
def test_a_bad_value_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        make(**changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    assert yaml.safe_load("lr: 5e-3")["lr"] == "5e-3"
    assert make(lr="5e-3").lr == 5e-3


def test_a_method_config_brings_its_method() -> None:
    config = make(method_settings=LSPTConfig(num_prompts=3))
    assert config.method == "lspt"
    assert config.method_config() == LSPTConfig(num_prompts=3)


def test_flat_settings_make_the_same_config_again() -> None:
    config = TrainConfig.from_flat({"data": "d", "output": "o", "rank": 4, "prompt_layers": [0, 2], "lr": "1e-4"})
    text = yaml.safe_dump(config.to_flat())
    again = TrainConfig.from_flat(yaml.safe_load(text))
    assert again.to_flat() == config.to_flat()
    assert again.method_config() == config.method_config()
    assert again.method_config().to_dict()["prompt_layers"] == [0, 2]


def test_an_override_of_the_augmentation_survives_and_the_preset_can_be_changed() -> None:
    name, known = next((name, known) for name, known in augment_fields().items() if known.type is float)
    value = 0.125 if not known.is_tuple else [0.125, 0.5]
    config = TrainConfig.from_flat({"data": "d", "output": "o", "augment": "light", name: value})
    assert getattr(config.augment_config(), name) in (0.125, (0.125, 0.5))
    plain = TrainConfig.from_flat({"data": "d", "output": "o", "augment": "light"}).to_flat()
    strong = TrainConfig.from_flat({**plain, "augment": "strong"})
    assert strong.augment_config() == make(augment="strong").augment_config()


def test_flat_settings_name_what_is_missing_unknown_or_another_methods() -> None:
    with pytest.raises(UsageError, match="needs a value for data"):
        TrainConfig.from_flat({"output": "o"})
    with pytest.raises(UsageError, match="did you mean weight_decay"):
        TrainConfig.from_flat({"data": "d", "output": "o", "weight_decai": 1})
    with pytest.raises(
        UsageError,
        match=r"rank is a setting of sa2vp, .*lora, reader, not of lspt; lspt has first_block, num_prompts, ",
    ):
        TrainConfig.from_flat({"data": "d", "output": "o", "method": "lspt", "rank": 1})
    with pytest.raises(UsageError, match="full has no settings"):
        TrainConfig.from_flat({"data": "d", "output": "o", "method": "full", "rank": 1})


def test_differences_name_settings_and_ignore_those_without_influence() -> None:
    config = make()
    assert config.differences(make(workers=3, device="cpu", tensorboard=False, output="other").to_flat()) == []
    other = make(lr=0.5, method_settings={"rank": 3})
    assert config.differences(other.to_flat()) == ["lr is 0.001, was 0.5", "rank is 16, was 3"]


def test_preprocess_takes_the_backbones_filter_unless_told() -> None:
    backbone = load_backbone("test_vit", 32, "random:0")
    assert make().preprocess(backbone) == backbone.default_preprocess()
    changed = make(interpolation="nearest", crop_pct=0.5, crop_mode="center").preprocess(backbone)
    assert (changed.interpolation, changed.crop_pct, changed.crop_mode) == ("nearest", 0.5, "center")


@pytest.mark.parametrize(
    ("text", "words"),
    [("- a\n- b\n", "name: value"), ("a: [1\n", "cannot read"), ("1: 2\n", "name: value")],
)
def test_a_broken_settings_file_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


def test_settings_files_may_be_missing_empty_or_spelled_as_options(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    with pytest.raises(UsageError, match="no settings file"):
        read_yaml(path)
    path.write_text("")
    assert read_yaml(path) == {}
    path.write_text("batch-size: 3\n")
    assert read_yaml(path) == {"batch_size": 3}


@dataclass(frozen=True)
class Sample:
    sizes: tuple[int, ...] = setting((1, 2), help="some")
    span: tuple[float, float] = setting((0.0, 1.0), help="two")
    layers: tuple[int, ...] | None = setting(None, help="some or none")
    other: dict[str, int] = dataclasses.field(default_factory=dict)


def test_tuples_are_read_from_text_lists_and_single_values() -> None:
    known = settings_of(Sample)
    assert list(known) == ["sizes", "span", "layers"]
    assert known["sizes"].coerce("3, 4,5") == (3, 4, 5)
    assert known["sizes"].coerce(7) == (7,)
    assert known["span"].coerce([0, "0.5"]) == (0.0, 0.5)
    assert known["layers"].coerce(None) is None
    with pytest.raises(UsageError, match="span needs 2 values"):
        known["span"].coerce("1")
    with pytest.raises(UsageError, match="sizes must be a whole number"):
        known["sizes"].coerce("1,x")


def test_settings_carry_their_option_name() -> None:
    assert Setting("weight_decay", float, 0.0).option == "--weight-decay"
    assert "weight_decay" in known_names()
