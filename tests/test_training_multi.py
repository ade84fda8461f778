"""Several tasks from one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import prompttune.backbones
from prompttune.errors import UsageError
from prompttune.training.multi import load_tasks, train_tasks
from tests.training_helpers import no_pictures, one_thread, settings, write_folder  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


@pytest.fixture(scope="module")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "bars", train=4, val=2)


def write_tasks(path: Path, tasks: Any, defaults: Any = None, **more: Any) -> Path:
    file = path / "tasks.yaml"
    file.write_text(yaml.safe_dump({"defaults": defaults, "tasks": tasks, **more}))
    return file


def shared(bars: Path, output: Path) -> dict[str, Any]:
    return {**settings(bars, output, epochs=1), "rank": 4}


def test_own_settings_go_before_defaults_and_overrides_before_both(bars: Path, tmp_path: Path) -> None:
    tasks = [
        {"name": "a", "method": "sa2vp", "lr": 0.5},
        {"name": "b", "method": "linear", "lr": 0.25, "batch-size": 4, "output": str(tmp_path / "elsewhere")},
    ]
    former = {"task": "classification"}  # the name of task_type in earlier releases
    file = write_tasks(tmp_path, tasks, {**shared(bars, tmp_path / "runs"), **former, "seed": 3})
    first, second = (task.config for task in load_tasks(file, {"lr": "0.125", "num_prompts": 2, "method": "vpt-deep"}))
    assert (first.lr, second.lr, first.seed, second.batch_size) == (0.125, 0.125, 3, 4)
    assert (first.method, first.method_config().to_dict()["num_prompts"]) == ("vpt-deep", 2)
    first, second = (task.config for task in load_tasks(file))
    assert (first.lr, first.method_config().to_dict()["rank"]) == (0.5, 4)
    assert (first.output, second.output) == (str(tmp_path / "runs" / "a"), str(tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    ("tasks", "more", "words"),
    [
        ([], {}, "needs 'tasks', a list"),
        ("digits", {}, "needs 'tasks', a list"),
        ([{"method": "linear"}], {}, "needs a name"),
        ([{"name": "../x"}], {}, "needs a name"),
        ([{"name": "a"}, {"name": "a"}], {}, "two tasks .* have the name a"),
        ([{"name": "a", "output": "o"}, {"name": "b", "output": "o"}], {}, "two tasks .* have the output o"),
        ([{"name": "a", "epoch": 3}], {}, "task a: unknown setting 'epoch'; did you mean epochs"),
        ([{"name": "a", "method": "linear", "rank": 3}], {}, "task a: rank is a setting of sa2vp, .*, not of linear"),
        ([{"name": "a", "method": ["x"]}], {"defaults": {"data": "d", "rank": 3}}, r"task a: unknown method \['x'\]"),
        ([{"name": "a"}], {"default": {}}, "did you mean defaults"),
        ([{"name": "a"}], {"defaults": {"epoch": 3}}, "unknown setting 'epoch'"),
        ([{"name": "a"}], {"defaults": [1]}, "defaults of .* must be settings"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_is_trained(
    tmp_path: Path, tasks: Any, more: dict[str, Any], words: str
) -> None:
    file = write_tasks(tmp_path, tasks, **{"defaults": {"data": "d"}, **more})
    with pytest.raises(UsageError, match=words):
        load_tasks(file)


def test_an_override_that_suits_no_task_is_refused(bars: Path, tmp_path: Path) -> None:
    file = write_tasks(tmp_path, [{"name": "a", "method": "linear"}], {"data": str(bars)})
    with pytest.raises(
        UsageError,
        match="num_prompts is a setting of lspt, gapt, vpt-shallow, vpt-deep, e2vpt, expres, reader, not of linear",
    ):
        load_tasks(file, {"num_prompts": 3})


def test_an_error_of_any_kind_is_its_tasks_own(bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyError("top1")

    monkeypatch.setattr("prompttune.training.multi.train", fail)
    file = write_tasks(tmp_path, [{"name": "a"}, {"name": "b"}], shared(bars, tmp_path / "runs"))
    assert [outcome.error for outcome in train_tasks(load_tasks(file))] == ["KeyError: 'top1'"] * 2


def test_a_backbone_is_loaded_once_and_a_failing_task_stops_no_other(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[Any, ...]] = []
    load = prompttune.backbones.load_backbone

    def counting(*args: Any) -> Any:
        loaded.append(args)
        return load(*args)

    monkeypatch.setattr(prompttune.backbones, "load_backbone", counting)
    tasks = [
        {"name": "a", "method": "linear"},
        {"name": "broken", "data": str(tmp_path / "nowhere")},
        {"name": "b", "method": "sa2vp"},
        {"name": "c", "method": "linear", "backbone": "test_vit2"},
    ]
    file = write_tasks(tmp_path, tasks, shared(bars, tmp_path / "runs"))
    started: list[str] = []
    outcomes = train_tasks(load_tasks(file), on_task=lambda index, task: started.append(f"{index} {task.name}"))
    assert started == ["0 a", "1 broken", "2 b", "3 c"]
    assert [outcome.error is None for outcome in outcomes] == [True, False, True, True]
    assert outcomes[1].error is not None
    assert "nowhere" in outcomes[1].error
    assert loaded == [("test_vit", 32, "random:0"), ("test_vit2", 32, "random:0")]
    assert {item.name for item in (tmp_path / "runs").iterdir()} >= {"a", "b", "c"}
    again = train_tasks(load_tasks(file), resume=True)
    assert [outcome.result is not None and outcome.result.was_over for outcome in again] == [True, False, True, True]
