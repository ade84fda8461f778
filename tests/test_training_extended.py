"""Runs that go on: with more epochs than before, and from another run's parameters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from prompttune.cli.main import cli
from prompttune.errors import CheckpointError, UsageError
from prompttune.methods import E2VPTConfig
from prompttune.model import PromptModel
from prompttune.training import Progress, train
from prompttune.training.initial import take_parameters
from prompttune.training.optim import learning_rate
from prompttune.training.state import load
from tests.segmenting import write_blocks
from tests.training_helpers import CLASSES, config, no_pictures, one_thread, settings, write_folder  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

MODEL = "prompt_model.safetensors"


@pytest.fixture(scope="module")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "bars", train=6, val=3)


@pytest.fixture(scope="module")
def source(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config(bars, tmp_path_factory.mktemp("runs") / "source", epochs=1, seed=3)).path


# -- more epochs


def test_more_epochs_extend_a_finished_run_as_if_it_had_never_ended(bars: Path, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"schedule": "constant", "warmup_epochs": 0, "augment": "light"}
    whole = train(config(bars, tmp_path / "whole", epochs=4, **shared))
    train(config(bars, tmp_path / "run", epochs=2, **shared))
    news: list[Progress] = []
    longer = train(config(bars, tmp_path / "run", epochs=4, **shared), resume=True, on_progress=news.append)
    assert (longer.status, longer.epochs, longer.was_over) == ("finished", 4, False)
    assert (tmp_path / "run" / MODEL).read_bytes() == (tmp_path / "whole" / MODEL).read_bytes()
    assert [one["train_loss"] for one in longer.metrics["history"]] == [
        one["train_loss"] for one in whole.metrics["history"]
    ]
    assert any("resuming after epoch 2 of 4; it had 2" in one.text for one in news)
    assert "epochs: 4" in (tmp_path / "run" / "train_config.yaml").read_text()
    with pytest.raises(UsageError, match="epochs is 2, was 4"):
        train(config(bars, tmp_path / "run", epochs=2, **shared), resume=True)


def test_the_schedule_of_an_extended_run_is_that_of_the_new_number_of_epochs(bars: Path, tmp_path: Path) -> None:
    train(config(bars, tmp_path / "run", epochs=2))
    longer = config(bars, tmp_path / "run", epochs=6)
    history = train(longer, resume=True).metrics["history"]
    assert history[1]["lr"] == pytest.approx(longer.min_lr)
    steps = 2  # 24 images in batches of 16
    assert [one["lr"] for one in history[2:]] == [
        learning_rate(longer, epoch * steps - 1, steps) for epoch in range(3, 7)
    ]


def test_a_run_that_stopped_early_goes_on_with_more_patience_alone(bars: Path, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"lr": 1e-12, "min_lr": 0}
    assert train(config(bars, tmp_path / "run", epochs=9, patience=1, **shared)).epochs == 2
    with pytest.raises(UsageError, match=r"stopped early after epoch 2: .*patience of 1 .*--patience"):
        train(config(bars, tmp_path / "run", epochs=12, patience=1, **shared), resume=True)
    longer = train(config(bars, tmp_path / "run", epochs=12, patience=3, **shared), resume=True)
    assert (longer.status, longer.epochs) == ("stopped early", 4)
    with pytest.raises(UsageError, match="patience is 2, was 3"):
        train(config(bars, tmp_path / "run", epochs=12, patience=2, **shared), resume=True)


def test_a_run_that_has_pruned_prunes_no_second_time_when_it_is_extended(bars: Path, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"method": "e2vpt", "num_prompts": 4, "segments": 4, "prune_at": 0.5}
    train(config(bars, tmp_path / "run", epochs=2, **shared))
    masks = load(tmp_path / "run" / "last.safetensors").task["method.masks.token"]
    news: list[Progress] = []
    train(config(bars, tmp_path / "run", epochs=6, **shared), resume=True, on_progress=news.append)
    assert not any("went back to its initial values" in one.text for one in news)
    after = load(tmp_path / "run" / "last.safetensors")
    assert after.progression.rewound == 1
    assert torch.equal(after.task["method.masks.token"], masks)


# -- another run's parameters


def test_a_run_starts_from_the_parameters_of_another(bars: Path, source: Path, tmp_path: Path) -> None:
    news: list[Progress] = []
    started = config(bars, tmp_path / "run", epochs=1, lr=1e-12, min_lr=0, init_from=str(source))
    result = train(started, on_progress=news.append)
    theirs, ours = PromptModel.load(source).task_parameters(), PromptModel.load(result.path).task_parameters()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)
    assert any(f"starting from {source}: 4 of 4 classes" in one.text for one in news)
    assert result.metrics["settings"]["init_from"] == str(source)


def test_rows_of_the_head_go_to_the_class_of_the_same_name(bars: Path, source: Path, tmp_path: Path) -> None:
    data = shutil.copytree(bars, tmp_path / "data")
    for split in ("train", "val"):
        (data / split / "east").rename(data / split / "zenith")  # the order of the others changes, too
        (data / split / "north").rename(data / split / "a new one")
    news: list[Progress] = []
    changes: dict[str, Any] = {"epochs": 1, "lr": 1e-12, "min_lr": 0, "init_from": str(source)}
    run = train(config(data, tmp_path / "run", **changes), on_progress=news.append).path
    theirs, ours = PromptModel.load(source), PromptModel.load(run)
    assert ours.labels == ["a new one", "south", "west", "zenith"]
    rows = {name: theirs.head.weight[theirs.labels.index(name)] for name in ("south", "west")}  # type: ignore[index]
    for name, row in rows.items():
        assert torch.allclose(ours.head.weight[ours.labels.index(name)], row, atol=1e-6)  # type: ignore[index]
    assert any("2 of 4 classes have a row there, 2 are new: a new one, zenith" in one.text for one in news)


def test_a_started_run_resumes_without_its_source(bars: Path, source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")
    changes: dict[str, Any] = {"init_from": str(copy), "schedule": "constant", "warmup_epochs": 0}
    whole = train(config(bars, tmp_path / "whole", epochs=2, **changes)).path
    train(config(bars, tmp_path / "run", epochs=1, **changes))
    shutil.rmtree(copy)
    train(config(bars, tmp_path / "run", epochs=2, **changes), resume=True)
    assert (tmp_path / "run" / MODEL).read_bytes() == (whole / MODEL).read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "linear"}, "method is vpt-deep there, linear here"),
        ({"num_prompts": 3}, "num_prompts is 10 there, 3 here"),
        ({"weights": "random:1"}, "fingerprint is "),
        ({"backbone": "test_vit2"}, "backbone is test_vit there, test_vit2 here; fingerprint is "),
        ({"image_size": 48}, "image size is 32 there, 48 here"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line_with_both_sides(
    bars: Path, source: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        train(config(bars, tmp_path / "run", init_from=str(source), **changes))
    assert str(caught.value).startswith(f"cannot start from {source}: {words}")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_another_rank_is_one_line_with_both_sides(bars: Path, tmp_path: Path) -> None:
    first = train(config(bars, tmp_path / "first", epochs=1, method="sa2vp", rank=4)).path
    with pytest.raises(
        CheckpointError, match=r"cannot start from .*: method\..*: shape is .* there, .* here; rank is 4 there, 2 here"
    ):
        train(config(bars, tmp_path / "run", epochs=1, method="sa2vp", rank=2, init_from=str(first)))
    with pytest.raises(CheckpointError, match="no checkpoint folder at"):
        train(config(bars, tmp_path / "run", epochs=1, init_from=str(tmp_path / "nowhere")))


def test_pruned_prompts_start_as_they_were_and_are_rewound_to(bars: Path, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"method": "e2vpt", "num_prompts": 4, "segments": 4, "prune_at": 0.5}
    first = PromptModel.load(train(config(bars, tmp_path / "first", epochs=2, **shared)).path)
    second = PromptModel(first.backbone, E2VPTConfig(num_prompts=4, segments=4), labels=first.labels)
    take_parameters(second, tmp_path / "first")
    state, wanted = second.task_state(), first.task_state()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert torch.equal(second.method.initial["prompts"], second.method.prompts)  # type: ignore[index, union-attr]
    assert bool((second.method.masks["token"] == 1).all())  # type: ignore[index, union-attr]


def test_a_segmentation_starts_from_another_one(tmp_path: Path, bars: Path, source: Path) -> None:
    data = write_blocks(tmp_path / "blocks", (4, 2))
    shared: dict[str, Any] = {"task_type": "segmentation", "method": "linear", "epochs": 1, "lr": 1e-12, "min_lr": 0}
    first = train(config(data, tmp_path / "first", **{**shared, "lr": 1e-2, "seed": 3})).path
    (data / "classes.txt").write_text("blue\ngrey\nred\n")
    second = train(config(data, tmp_path / "second", init_from=str(first), **shared)).path
    theirs, ours = PromptModel.load(first).head.bias, PromptModel.load(second).head.bias
    assert torch.allclose(ours[[0, 2]], theirs[[2, 0]], atol=1e-6)  # type: ignore[index]
    with pytest.raises(CheckpointError, match="task type is segmentation there, classification here"):
        train(config(bars, tmp_path / "third", method="linear", init_from=str(first)))


def test_several_tasks_start_from_one_and_are_extended(bars: Path, source: Path, tmp_path: Path) -> None:
    defaults = settings(bars, tmp_path / "runs", epochs=1, init_from=str(source))
    file = tmp_path / "tasks.yaml"
    file.write_text(json.dumps({"defaults": defaults, "tasks": [{"name": "a"}, {"name": "b", "method": "linear"}]}))
    command = ["train", "--tasks", str(file), "--json", "--quiet"]
    found = json.loads(CliRunner().invoke(cli, command).stdout)
    assert [one["error"] is None for one in found] == [True, False]
    assert "method is vpt-deep there, linear here" in found[1]["error"]
    again = json.loads(CliRunner().invoke(cli, [*command, "--epochs", "2", "--resume"]).stdout)
    assert len(again[0]["metrics"]["history"]) == 2
    assert sorted(CLASSES) == again[0]["metrics"]["run"]["classes"]
