"""``prompttune train`` and ``prompttune evaluate`` as a user types them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner, Result

from prompttune.cli.main import cli
from prompttune.cli.options import SettingOption, method_options, training_options
from prompttune.cli.train import train as train_command
from prompttune.data import Augment
from prompttune.methods import METHODS
from prompttune.training import Progress, TrainConfig, TrainResult, train
from prompttune.training.config import augment_fields
from prompttune.training.state import load
from tests.training_helpers import CLASSES, config, no_pictures, one_thread, settings, write_folder  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "bars", train=6, val=3)


@pytest.fixture(scope="module")
def run(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config(bars, tmp_path_factory.mktemp("runs") / "run", epochs=1)).path


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def options(values: dict[str, Any]) -> list[str]:
    """Settings as they are typed."""
    typed: list[str] = []
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            typed.append(option if value else option.replace("--", "--no-", 1))
        else:
            typed += [option, str(value)]
    return typed


def captured(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> TrainConfig:
    """The settings that a command line leads to, without training."""
    caught: list[TrainConfig] = []

    def catch(settings: TrainConfig, **_: Any) -> TrainResult:
        caught.append(settings)
        return TrainResult(Path("x"), 1.0, 1, 1, "finished", {"settings": settings.to_flat()})

    monkeypatch.setattr("prompttune.training.loop.train", catch)
    result = invoke("train", *arguments)
    assert result.exit_code == 0, result.output
    return caught[0]


def assert_one_line(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    for word in words:
        assert word in lines[-1]
    assert "Traceback" not in result.output


# -- options

OPTIONS = train_command.get_params(click.Context(train_command))


def test_every_setting_of_every_dataclass_is_an_option() -> None:
    fields = {field.name for cls in (TrainConfig, Augment, *METHODS.values()) for field in dataclasses.fields(cls)}
    offered = {option.known.name for option in OPTIONS if isinstance(option, SettingOption)}
    assert offered == fields - {"method_settings", "augment_settings"}


def test_option_names_and_help_are_complete() -> None:
    names = [name for option in OPTIONS for name in (*option.opts, *option.secondary_opts)]
    assert len(names) == len(set(names)), "two options have the same name"
    for option in training_options():
        assert isinstance(option, click.Option)
        assert option.help
    assert "--weight-decay" in names
    assert {"--compile", "--no-compile"} <= set(names)


def test_help_has_sections_examples_and_the_methods_of_each_setting() -> None:
    result = invoke("train", "--help")
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    for words in ("Training:", "Data:", "Augmentation:", "Method settings:", "Examples:", "--tasks tasks.yaml"):
        assert words in text
    for option in method_options():
        assert isinstance(option, SettingOption)
        name = option.known.name
        owners = [
            method for method, cls in METHODS.items() if name in {field.name for field in dataclasses.fields(cls)}
        ]
        assert option.help is not None
        assert option.help.endswith(f"[{', '.join(owners)}]")


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    made = captured(
        monkeypatch, "--data", "d", "--output", "o", "--lr", "5e-3", "--compile", "--no-tensorboard",
        "--patience", "3", "--prompt-layers", "0,2", "--rank", "4", "--no-adapter", "--hflip", "0.25",
        "--interpolation", "bilinear", "--schedule", "onecycle",
    )  # fmt: skip
    assert (made.lr, made.compile, made.tensorboard, made.patience) == (5e-3, True, False, 3)
    assert (made.interpolation, made.schedule) == ("bilinear", "onecycle")
    method = made.method_config().to_dict()
    assert (method["prompt_layers"], method["rank"], method["adapter"]) == ([0, 2], 4, False)
    assert made.augment_config().hflip == 0.25


def test_command_line_goes_before_yaml_and_yaml_before_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("data: d\noutput: o\nlr: 5e-2\npatience: 4\nrank: 3\nbatch-size: 7\ninterpolation: nearest\n")
    made = captured(
        monkeypatch, "--config", file, "--lr", "0.5", "--patience", "none", "--interpolation", "none", "--rank", "5"
    )
    assert (made.lr, made.patience, made.batch_size, made.interpolation) == (0.5, None, 7, None)
    assert made.method_config().to_dict()["rank"] == 5
    assert made.epochs == TrainConfig.epochs
    assert captured(monkeypatch, "--config", file).method_config().to_dict()["rank"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output", "o"], ["training needs a value for data"]),
        (["--data", "d"], ["training needs a value for output"]),
        (["--data", "d", "--output", "o", "--no-such"], ["--no-such"]),
        (["--data", "d", "--output", "o", "--weight-decai", "1"], ["--weight-decay"]),
        (["--data", "d", "--output", "o", "--method", "sa3vp"], ["sa3vp", "sa2vp"]),
        (
            ["--data", "d", "--output", "o", "--method", "lspt", "--rank", "2"],
            ["rank is a setting of sa2vp", "lspt has"],
        ),
        (["--data", "d", "--output", "o", "--lr", "fast"], ["lr must be a number"]),
        (["--data", "d", "--output", "o", "--epochs", "0"], ["epochs must be at least 1"]),
        (["--data", "d", "--output", "o", "--prompt-layers", "0,x"], ["prompt_layers must be a whole number"]),
        (["--data", "d", "--output", "o", "--resume", "--overwrite"], ["contradict"]),
        (["--config", "nowhere.yaml"], ["no settings file"]),
        (["--config", "a.yaml", "--tasks", "b.yaml"], ["--config or --tasks"]),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], words: list[str]) -> None:
    assert_one_line(invoke("train", *arguments), 2, *words)


def test_unknown_yaml_key_names_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("data: d\noutput: o\nwarmup: 3\n")
    assert_one_line(invoke("train", "--config", file), 2, "unknown setting 'warmup'", "did you mean warmup_epochs")


def test_missing_data_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    arguments = options(settings(tmp_path / "nowhere", tmp_path / "run"))
    assert_one_line(invoke("train", *arguments), 1, "nowhere")


# -- runs


@pytest.mark.usefixtures("no_pictures")
def test_a_run_prints_its_result_and_progress_on_the_two_streams(bars: Path, tmp_path: Path) -> None:
    result = invoke("train", *options(settings(bars, tmp_path / "run", epochs=2)))
    assert result.exit_code == 0
    assert f"checkpoint: {tmp_path / 'run'}" in result.stdout
    assert "epoch 2/2" in result.stderr
    assert "epoch 2/2" not in result.stdout


@pytest.mark.usefixtures("no_pictures")
def test_json_is_the_metrics_and_quiet_is_quiet(bars: Path, tmp_path: Path) -> None:
    result = invoke("train", "--json", "--quiet", *options(settings(bars, tmp_path / "run", epochs=1)))
    assert result.stderr == ""
    document = json.loads(result.stdout)
    assert document["path"] == str(tmp_path / "run")
    assert document["final"]["n"] == 12


def test_finished_run_resumes_to_nothing_and_exit_code_0(run: Path) -> None:
    result = invoke("train", "--config", run / "train_config.yaml", "--resume")
    assert result.exit_code == 0
    assert "already finished" in result.stdout
    assert_one_line(invoke("train", "--config", run / "train_config.yaml"), 2, "--resume or --overwrite")


def test_resume_with_other_settings_names_them(run: Path) -> None:
    result = invoke("train", "--config", run / "train_config.yaml", "--resume", "--lr", "0.3", "--num-prompts", "2")
    assert_one_line(result, 2, "lr is 0.3, was 0.01", "num_prompts is 2, was 10")


@pytest.mark.usefixtures("no_pictures")
def test_interruption_says_how_to_go_on(bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: object, news: Progress) -> None:
        if news.phase == "train" and news.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("prompttune.training.progress.Display.__call__", interrupted)
    result = invoke("train", *options(settings(bars, tmp_path / "run", epochs=2)))
    assert result.exit_code == 130
    hint = f"prompttune train --config {tmp_path / 'run' / 'train_config.yaml'} --resume"
    assert result.stderr.strip() == f"Interrupted; resume with: {hint}"
    monkeypatch.undo()
    assert "finished after 2 epochs" in invoke(*hint.split()[1:]).stdout


@pytest.mark.usefixtures("no_pictures")
def test_sigterm_writes_the_finished_epochs(bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(self: object, news: Progress) -> None:
        if news.phase == "train" and news.epoch == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("prompttune.training.run_writer.SHARE_OF_WRITING", 1e-9)
    monkeypatch.setattr("prompttune.training.progress.Display.__call__", terminated)
    result = invoke("train", *options(settings(bars, tmp_path / "run", epochs=4)))
    assert result.exit_code == 143
    assert result.stderr.startswith("Interrupted; resume with: ")
    assert load(tmp_path / "run" / "last.safetensors").progression.epoch == 3
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("no_pictures")
def test_tasks_end_in_a_table_and_exit_code_1_if_one_failed(bars: Path, tmp_path: Path) -> None:
    defaults = settings(bars, tmp_path / "runs", epochs=1, method="linear")
    tasks = [
        {"name": "good"},
        {"name": "bad", "data": str(tmp_path / "nowhere")},
        {"name": "deep", "method": "vpt-deep"},
    ]
    file = tmp_path / "tasks.yaml"
    file.write_text(yaml.safe_dump({"defaults": defaults, "tasks": tasks}))
    result = invoke("train", "--tasks", file)
    assert result.exit_code == 1
    rows = [line for line in result.stdout.splitlines() if line.startswith("│")]
    assert ["good" in rows[0], "failed" in rows[1], "deep" in rows[2]] == [True, True, True]
    assert "bad: " in result.stderr
    assert "nowhere" in result.stderr
    file.write_text(yaml.safe_dump({"defaults": defaults, "tasks": [tasks[0], tasks[2]]}))
    result = invoke("train", "--tasks", file, "--resume", "--json", "--quiet")
    assert result.exit_code == 0
    assert [(item["name"], item["error"], item["metrics"]["status"]) for item in json.loads(result.stdout)] == [
        ("good", None, "finished"),
        ("deep", None, "finished"),
    ]


# -- evaluate


def test_evaluation_of_the_runs_own_validation_images(run: Path) -> None:
    document = json.loads(invoke("evaluate", run, "--json", "--device", "cpu").stdout)
    trained = json.loads((run / "metrics.json").read_text())["final"]
    assert document["n"] == trained["n"]
    assert document["top1"] == trained["top1"]
    assert document["per_class"] == trained["per_class"]
    assert document["confusion"] == trained["confusion"]


def test_evaluation_as_a_table_with_files(run: Path, bars: Path, tmp_path: Path) -> None:
    result = invoke("evaluate", run, "--data", bars, "--split", "all", "--output", tmp_path / "report", "--quiet")
    assert result.exit_code == 0
    for name in CLASSES:
        assert name in result.stdout
    assert "top-1" in result.stdout
    document = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert document["n"] == 36
    assert (tmp_path / "report" / "confusion_matrix.png").stat().st_size > 1000


def test_evaluation_errors_are_one_line(run: Path, bars: Path, tmp_path: Path) -> None:
    assert_one_line(invoke("evaluate", tmp_path / "nowhere"), 1, "no checkpoint folder")
    assert_one_line(invoke("evaluate", tmp_path), 2, "give --data")
    assert_one_line(invoke("evaluate", tmp_path, "--data", bars), 1, "prompt_config.json")
    assert_one_line(invoke("evaluate", run, "--split", "test"), 1, "has no split test", "train and val")
    renamed = write_folder(tmp_path / "renamed", train=1, val=1)
    for place in renamed.glob("*/*"):
        place.rename(place.with_name(f"far {place.name}"))
    assert_one_line(invoke("evaluate", run, "--data", renamed), 1, "only in the data: far east", CLASSES[0])


def test_augmentation_settings_are_options() -> None:
    assert set(augment_fields()) == {field.name for field in dataclasses.fields(Augment)}
