"""Methods and backbones of other packages: entry points, late registration, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

import prompttune as pt
from prompttune.backbones.loading import BACKBONES
from prompttune.cli.main import cli
from prompttune.cli.train import train as train_command
from prompttune.errors import BackboneError, UsageError
from prompttune.methods import METHODS
from prompttune.methods.base import MethodConfig, setting
from prompttune.methods.registry import RESERVED
from prompttune.registry import Registry
from prompttune.training.config import TrainConfig, augment_fields
from tests.training_helpers import write_folder

MODULE = """
from dataclasses import dataclass

import timm
import torch

from prompttune.backbones import Backbone, VitBackbone
from prompttune.methods import register
from prompttune.methods.base import Features, Method, MethodConfig, implements, setting


@register
@dataclass(frozen=True)
class ScaleConfig(MethodConfig):
    method = "outside-scale"
    summary = "A scale of each channel"
    start: float = setting(1.0, "first value of every scale", above=0)


@implements(ScaleConfig)
class Scale(Method):
    backbones = (Backbone,)

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.scale = torch.nn.Parameter(torch.ones(backbone.width) * config.start)

    def task_state(self):
        return {"scale": self.scale[None]}

    def image_state(self, images, levels=()):
        return {"features": self.driven(images)}

    def forward(self, image, state, aux=False, levels=()):
        return Features(image["features"] * state["scale"])


def clinic_vit(image_size, weights):
    return timm.create_model("test_vit", num_classes=0)


class Mean(Backbone):
    name, width, depth, grid = "mean", 3, 1, (1, 1)
    mean, std, interpolation = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear"

    def __init__(self, image_size):
        super().__init__(torch.nn.Identity())
        self.image_size = image_size or 32

    def forward(self, images):
        return images.mean((2, 3))


def clinic_mean(image_size, weights):
    return Mean(image_size)
"""
ENTRY_POINTS = """
[prompttune.methods]
outside-scale = {module}:ScaleConfig
broken = {module}_that_is_not_there:Config

[prompttune.backbones]
clinic-vit = {module}:clinic_vit
clinic-mean = {module}:clinic_mean
test_vit = {module}:clinic_vit
"""


def install(folder: Path, module: str) -> Path:
    """Lay a package down as ``pip install --target`` does."""
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{module}.py").write_text(MODULE)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS.format(module=module))
    return folder


@pytest.fixture
def as_before() -> Iterator[None]:
    """Registries as they are before anything of another package was looked up, and again afterwards."""
    kept = [(registry, registry.registered(), registry._loaded) for registry in (METHODS, BACKBONES)]
    for registry, _, _ in kept:
        registry._loaded = False
    yield
    for registry, parts, loaded in kept:
        registry._parts, registry._loaded = parts, loaded  # type: ignore[assignment]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_before: None) -> None:
    monkeypatch.syspath_prepend(str(install(tmp_path / "site", "clinic_parts")))
    monkeypatch.delitem(sys.modules, "clinic_parts", raising=False)


def invoke(*args: object) -> str:
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_parts_of_another_package_work_in_every_command(
    installed: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prompttune.training.plots.plot_curves", lambda *_: None)
    monkeypatch.setattr("prompttune.training.run_writer.save_png", lambda *_: None)
    data, run, engine = write_folder(tmp_path / "data", 4, 2), tmp_path / "run", tmp_path / "engine"
    text = " ".join(invoke("train", "--help").split())
    assert "--start NUMBER first value of every scale [default: 1.0] [outside-scale]" in text
    shared = ("--backbone", "clinic-vit", "--weights", "random:3", "--image-size", 32, "--data", data)
    train = ("train", *shared, "--method", "outside-scale", "--start", 2, "--epochs", 1, "--no-tensorboard", "--quiet")
    invoke(*train, "--output", run)
    invoke("export", run, "--output", engine)
    invoke("tasks", "add", engine, f"second={run}")
    assert pt.Engine(engine).predict([next(data.rglob("*.png"))], tasks="run")[0].label
    plan = invoke("benchmark", "demo", "--methods", "outside-scale", "--output", tmp_path / "bench", "--dry-run")
    assert "outside-scale" in plan
    warned = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(warned) == 2  # the module that is not there, and timm's own name
    assert all("of the package clinic_parts" in line and "\n" not in line for line in warned)


@pytest.mark.slow
def test_the_command_line_finds_them_in_a_process_of_its_own(tmp_path: Path) -> None:
    paths = os.pathsep.join((str(install(tmp_path, "clinic_parts")), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "prompttune.cli.main", "train", "--method", "outside-scale", "--start", "0"]
    result = subprocess.run(
        [*command, "--data", "d", "--output", "o"],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert lines[-1] == "Error: start must be above 0, not 0.0"
    assert [line for line in lines[:-1] if "left out" not in line] == []


def test_a_backbone_class_of_another_package(installed: None) -> None:
    backbone = pt.load_backbone("clinic-mean", image_size=16)
    model = pt.PromptModel(backbone, "linear", 2)
    assert model(torch.zeros(5, 3, 16, 16)).logits.shape == (5, 2)
    assert (backbone.weights, len(backbone.fingerprint)) == ("auto", 64)
    with pytest.raises(BackboneError, match="lora runs on VitBackbone"):
        pt.PromptModel(backbone, "lora", 2)
    same, other = (pt.load_backbone("clinic-vit", 32, f"random:{seed}").fingerprint for seed in (3, 4))
    assert (same == pt.load_backbone("clinic-vit", 32, "random:3").fingerprint) is (same != other) is True


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda _size, _weights: 3, "the backbone odd is neither a Backbone nor a model of timm.create_model, but int"),
        (lambda _size, _weights: 1 / 0, "the backbone odd cannot be built: ZeroDivisionError: division by zero"),
        (lambda _size, _weights: pt.Backbone(torch.nn.Identity()), "the backbone odd sets no image_size, width"),
    ],
)
def test_what_is_no_backbone_is_one_line(as_before: None, build: Any, message: str) -> None:
    pt.register_backbone("odd", build)
    with pytest.raises(BackboneError, match=message):
        pt.load_backbone("odd")


def options() -> set[str]:
    return {name for option in train_command.get_params(click.Context(train_command)) for name in option.opts}


def test_a_method_registered_late_is_seen_everywhere(as_before: None) -> None:
    assert "--strength" not in options()

    def define(default: float) -> type[MethodConfig]:
        @pt.register_method
        @dataclasses.dataclass(frozen=True)
        class LateConfig(MethodConfig):
            method = "late"
            strength: float = setting(default, "strength")

        return LateConfig

    define(1.0)
    assert pt.TrainConfig(method="late", data="d", output="o").to_flat()["strength"] == 1.0
    define(2.0)  # as a notebook's cell that is run again
    assert pt.TrainConfig(method="late", data="d", output="o").to_flat()["strength"] == 2.0
    assert "--strength" in options()
    assert pt.methods()["late"] == ""
    assert pt.describe("late").settings[0].default == 2.0


def config(**fields: Any) -> type[MethodConfig]:
    made = [(name, type(default), setting(default, name)) for name, default in fields.items()]
    return dataclasses.make_dataclass("Odd", made, bases=(MethodConfig,), frozen=True, namespace={"method": "odd"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 1.0}, "lr is an option of training: give the setting another name"),
        ({"tasks": 1}, "tasks is an option of training"),
        ({"hflip": 0.5}, "hflip is an option of training"),
        ({"rank": "low"}, "rank is of another type in the method sa2vp"),
        ({"table": frozenset()}, "table must be an int, float, bool, str or a tuple of them"),
    ],
)
def test_settings_that_cannot_be_options_are_refused(as_before: None, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pt.register_method(config(**fields))
    assert "odd" not in METHODS


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            "raise RuntimeError('two\\nlines')",
            "from late_part:Part: RuntimeError: two lines",
        ),
        ("import sys; sys.exit(3)", "from late_part:Part: SystemExit: 3"),
        ("", "from late_part:Part: AttributeError: .* no attribute 'Part'"),
        ("Part = 3", "not a class"),
    ],
)
def test_a_part_whose_import_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, message: str
) -> None:
    def check(_name: str, part: Any) -> None:
        if not isinstance(part, type):
            raise UsageError("not a class")

    toys: Registry[Any] = Registry("toy", "prompttune.toys", check)
    toys.add("late", "late_part:Part")
    (tmp_path / "late_part.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "late_part", raising=False)
    for ask in (lambda: toys["late"], toys.registered):
        with pytest.raises(UsageError, match=message) as told:
            ask()
        assert "\n" not in str(told.value)
        assert str(told.value).startswith(("the toy late cannot be imported", "not a class"))


def test_a_part_may_register_others_when_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toys: Registry[Any] = Registry("toy", "prompttune.toys")
    monkeypatch.setattr(sys.modules[__name__], "TOYS", toys, raising=False)
    toys.add("late", "late_part:Part")
    (tmp_path / "late_part.py").write_text(f"from {__name__} import TOYS\nPart = 3\nTOYS.add('later', 4)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "late_part", raising=False)
    assert toys.registered() == {"late": 3}
    assert dict(toys) == {"late": 3, "later": 4}


def test_a_name_is_taken_by_another_instance_or_partial_alone() -> None:
    class Part:
        pass

    toys: Registry[Any] = Registry("toy", "prompttune.toys")
    toys.add("instance", Part())
    toys.add("instance", again := Part())  # as a notebook's cell that is run again
    assert toys["instance"] is again
    toys.add("partial", functools.partial(max, 1, key=abs))
    toys.add("partial", functools.partial(max, 1, key=abs))
    for name, other in (("instance", Registry("a", "b")), ("partial", functools.partial(max, 2)), ("partial", max)):
        with pytest.raises(UsageError, match=f"a toy named '{name}' is registered already, by .*: give") as told:
            toys.add(name, other)
        assert " at 0x" not in str(told.value)


def test_what_is_no_config_is_refused(as_before: None) -> None:
    class Undecorated(MethodConfig):
        method = "odd"
        size: int = setting(1, "size")

    shared: dict[str, Any] = {"bases": (MethodConfig,), "frozen": True}
    for wrong, message in (
        (3, "the method '' must be a subclass of MethodConfig, not 3"),
        (Undecorated, "put @dataclass"),
        (dataclasses.make_dataclass("Odd", [], **shared), "has no name"),
        (dataclasses.make_dataclass("Odd", [("a", int)], namespace={"method": "odd"}, **shared), "a needs a default"),
    ):
        with pytest.raises(UsageError, match=message):
            pt.register_method(wrong)


def test_the_options_that_no_setting_may_have_are_those_of_the_command() -> None:
    own = {option.opts[0].removeprefix("--") for option in train_command.params}
    settings = {field.name for field in dataclasses.fields(TrainConfig)} | augment_fields().keys()
    assert own | {"help"} | settings == RESERVED
