"""The training loop: learning, the frozen backbone, early stop, divergence, reproducibility, run folders."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prompttune.backbones import load_backbone
from prompttune.checkpoints import read_config
from prompttune.errors import DataError, TrainingError, UsageError
from prompttune.model import PromptModel
from prompttune.training import Progress, TrainConfig, TrainResult, evaluate, train
from prompttune.training.optim import Objective
from prompttune.training.state import load
from tests.training_helpers import CLASSES, SIDE, config, no_pictures, one_thread, write_folder  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

MODEL = "prompt_model.safetensors"


@pytest.fixture(scope="module")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "bars")


@pytest.fixture(scope="module")
def finished(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, list[Progress]]:
    """A finished run of SA²VP with everything that a run writes."""
    news: list[Progress] = []
    output = tmp_path_factory.mktemp("runs") / "finished"
    settings = config(bars, output, method="sa2vp", rank=4, epochs=4, tensorboard=True)
    return train(settings, on_progress=news.append), news


def test_loss_falls_and_the_task_is_learnt(finished: tuple[TrainResult, list[Progress]]) -> None:
    history = finished[0].metrics["history"]
    assert history[-1]["train_loss"] < 0.6 * history[0]["train_loss"]
    assert finished[0].best_score >= 0.9
    assert [record["epoch"] for record in history] == [1, 2, 3, 4]


def test_run_folder_holds_what_is_promised(finished: tuple[TrainResult, list[Progress]]) -> None:
    result = finished[0]
    names = {item.name for item in result.path.iterdir()}
    assert names == {
        "prompt_config.json", MODEL, "README.md", "last.safetensors", "train_config.yaml", "metrics.json",
        "curves.png", "confusion_matrix.png", "tensorboard", "held_out.json",
    }  # fmt: skip
    assert any((result.path / "tensorboard").iterdir())
    metrics = json.loads((result.path / "metrics.json").read_text())
    assert metrics == result.metrics
    assert metrics["status"] == result.status == "finished"
    assert metrics["final"]["top1"] == result.best_score == metrics["best"]["top1"]
    assert set(metrics["final"]["per_class"]) == set(CLASSES)
    assert metrics["run"]["train_images"] == 64
    assert {"torch", "timm", "prompttune"} <= set(metrics["versions"])
    assert metrics["wall_seconds"] > 0
    assert metrics["corrupt_images"] == []


def test_best_checkpoint_loads_and_scores_what_the_run_said(
    finished: tuple[TrainResult, list[Progress]], bars: Path
) -> None:
    result = finished[0]
    model = PromptModel.load(result.path)
    assert model.labels == sorted(CLASSES)
    assert evaluate(model, str(bars), device="cpu").top1 == result.best_score
    assert read_config(result.path)["metrics"]["epoch"] == result.best_epoch


def test_settings_file_makes_the_same_settings(finished: tuple[TrainResult, list[Progress]]) -> None:
    result = finished[0]
    settings = yaml.safe_load((result.path / "train_config.yaml").read_text())
    assert TrainConfig.from_flat(settings).to_flat() == settings == result.metrics["settings"]


def test_news_tell_steps_epochs_speed_and_time_left(finished: tuple[TrainResult, list[Progress]]) -> None:
    news = finished[1]
    steps = [item for item in news if item.phase == "train"]
    assert [(item.epoch, item.step, item.steps) for item in steps[:5]] == [
        (1, 1, 4), (1, 2, 4), (1, 3, 4), (1, 4, 4), (2, 1, 4)
    ]  # fmt: skip
    assert all(item.images_per_second > 0 and item.loss > 0 for item in steps)
    assert steps[0].seconds_left > steps[-1].seconds_left
    epochs = [item for item in news if item.phase == "epoch"]
    assert [item.epoch for item in epochs] == [1, 2, 3, 4]
    assert epochs[0].best
    assert epochs[-1].seconds_left < steps[0].seconds_left, "only the best checkpoint's scoring is left"


@pytest.mark.parametrize("method", ["sa2vp", "lspt", "vpt-shallow", "linear"])
def test_backbone_stays_bit_identical(bars: Path, tmp_path: Path, method: str) -> None:
    backbone = load_backbone("test_vit2", SIDE, "random:0")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    train(config(bars, tmp_path / "run", backbone="test_vit2", method=method, epochs=1), backbone)
    after = backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not backbone.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd", "lr": 0.05, "grad_clip": 1.0},
        {"class_weights": "balanced", "label_smoothing": 0.1, "schedule": "onecycle"},
        {"precision": "bf16"},
        {"augment": "strong", "schedule": "constant"},
    ],
    ids=["sgd-clip", "weights-smoothing-onecycle", "bf16", "augmented"],
)
def test_every_recipe_learns(bars: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    history = train(config(bars, tmp_path / "run", **changes)).metrics["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_same_seed_same_bytes_whatever_the_global_generators_did(bars: Path, tmp_path: Path) -> None:
    def run(name: str, seed: int) -> bytes:
        torch.manual_seed(random.randrange(1000))
        torch.rand(7)
        # drop-out of 0.1 draws from the global generator in every step
        train(config(bars, tmp_path / name, method="sa2vp", rank=4, epochs=2, augment="light", seed=seed))
        return (tmp_path / name / MODEL).read_bytes()

    first = run("a", 5)
    assert run("b", 5) == first
    assert run("c", 6) != first


def test_early_stop_keeps_the_best(bars: Path, tmp_path: Path) -> None:
    result = train(config(bars, tmp_path / "run", lr=1e-12, min_lr=0, epochs=50, patience=2))
    assert (result.status, result.epochs, result.best_epoch) == ("stopped early", 3, result.best_epoch)
    assert result.metrics["final"]["top1"] == result.best_score


def test_validation_may_be_rare_but_comes_after_the_last_epoch(bars: Path, tmp_path: Path) -> None:
    history = train(config(bars, tmp_path / "run", epochs=5, eval_every=2)).metrics["history"]
    assert [record["val_top1"] is not None for record in history] == [False, True, False, True, True]


def test_full_output_is_refused_overwritten_or_resumed(bars: Path, tmp_path: Path) -> None:
    settings = config(bars, tmp_path / "run", epochs=1)
    train(settings)
    with pytest.raises(UsageError, match="not empty"):
        train(settings)
    first = (settings.output, (tmp_path / "run" / MODEL).stat().st_mtime_ns)
    again = train(settings, resume=True)
    assert again.was_over
    assert again.best_score == again.metrics["best"]["top1"]
    assert first == (settings.output, (tmp_path / "run" / MODEL).stat().st_mtime_ns)
    with pytest.raises(DataError):
        train(dataclasses.replace(settings, data=str(tmp_path / "nowhere")), overwrite=True)
    PromptModel.load(tmp_path / "run")  # a run that cannot start has overwritten nothing
    assert not train(settings, overwrite=True).was_over


def test_resume_refuses_other_settings_and_other_data(bars: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    data = write_folder(tmp_path / "data", train=8, val=2)
    train(config(data, output, epochs=1))
    with pytest.raises(UsageError, match=r"lr is 0\.5, was 0\.01; num_prompts is 3, was 10"):
        train(config(data, output, epochs=1, lr=0.5, num_prompts=3), resume=True)
    interrupt(config(data, output, epochs=3), after=2)
    next((data / "train" / CLASSES[0]).iterdir()).unlink()
    with pytest.raises(UsageError, match="train_images changed"):
        train(config(data, output, epochs=3), resume=True)


def interrupt(settings: TrainConfig, after: int) -> None:
    """Train anew and raise in the middle of an epoch, when so many epochs are done."""

    def stop(news: Progress) -> None:
        if news.phase == "train" and news.epoch == after + 1 and news.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, overwrite=True, on_progress=stop)


@pytest.mark.parametrize(
    ("changes", "after"),
    [
        ({"method": "sa2vp", "rank": 4, "augment": "light"}, 2),
        ({"optimizer": "sgd", "lr": 0.05}, 0),
        ({"method": "lspt", "patience": 3, "eval_every": 2}, 3),
    ],
    ids=["sa2vp-adamw", "sgd", "lspt-patience"],
)
def test_resumed_run_ends_bit_identical(bars: Path, tmp_path: Path, changes: dict[str, Any], after: int) -> None:
    whole = train(config(bars, tmp_path / "whole", epochs=4, **changes))
    settings = config(bars, tmp_path / "broken", epochs=4, **changes)
    interrupt(settings, after=after)
    resumed = train(settings, resume=True)
    assert (tmp_path / "broken" / MODEL).read_bytes() == (tmp_path / "whole" / MODEL).read_bytes()
    assert same_figures(resumed) == same_figures(whole)


def same_figures(result: TrainResult) -> list[tuple[float, ...]]:
    return [(record["train_loss"], record["lr"], record["val_loss"]) for record in result.metrics["history"]]


def test_short_epochs_are_written_together_and_none_is_lost(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prompttune.training.run_writer.SHARE_OF_WRITING", 1e-9)
    run, written, at_epoch_end = tmp_path / "run", list[bytes](), list[int]()

    def stop(news: Progress) -> None:
        if news.phase == "epoch":
            at_epoch_end.append(load(run / "last.safetensors").progression.epoch)
        if news.phase == "train" and (news.epoch, news.step) == (5, 2):
            written.append((run / MODEL).read_bytes())
            raise KeyboardInterrupt

    settings = config(bars, run, epochs=6)
    with pytest.raises(KeyboardInterrupt):
        train(settings, on_progress=stop)
    assert at_epoch_end == [1, 1, 1, 1]
    saved = load(run / "last.safetensors")
    metrics = json.loads((run / "metrics.json").read_text())
    assert saved.progression.epoch == len(metrics["history"]) == 4
    assert saved.progression.best_epoch == read_config(run)["metrics"]["epoch"] > 1
    model = PromptModel.load(run)
    assert all(torch.equal(value, saved.best[name]) for name, value in model.task_parameters().items())
    train(settings, resume=True)
    train(config(bars, tmp_path / "whole", epochs=6))
    assert (run / MODEL).read_bytes() == (tmp_path / "whole" / MODEL).read_bytes() != written[0]


def test_epochs_that_outlast_the_limit_are_written_each(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prompttune.training.run_writer.SHARE_OF_WRITING", 1e-9)
    monkeypatch.setattr("prompttune.training.run_writer.LONGEST_UNWRITTEN_S", 0.0)
    epochs: list[int] = []

    def count(news: Progress) -> None:
        if news.phase == "epoch":
            epochs.append(load(tmp_path / "run" / "last.safetensors").progression.epoch)

    train(config(bars, tmp_path / "run", epochs=3), on_progress=count)
    assert epochs == [1, 2, 3]


def test_resume_repairs_a_checkpoint_that_a_kill_left_half_written(bars: Path, tmp_path: Path) -> None:
    settings = config(bars, tmp_path / "run", epochs=3)
    interrupt(settings, after=1)
    (tmp_path / "run" / MODEL).write_bytes(b"half")

    def stop(news: Progress) -> None:
        if news.phase == "train":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, resume=True, on_progress=stop)
    PromptModel.load(tmp_path / "run")


def poison(monkeypatch: pytest.MonkeyPatch, at: int, value: float) -> None:
    """Make the loss of step ``at`` of a run ``value``."""
    forward, steps = Objective.forward, iter(range(1, 10_000))

    def poisoned(self: Objective, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, logits = forward(self, images, targets)
        return (loss * value if next(steps) == at else loss), logits

    monkeypatch.setattr(Objective, "forward", poisoned)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_divergence_stops_and_leaves_the_last_good_state(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    settings = config(bars, tmp_path / "run", epochs=3)
    poison(monkeypatch, at=10, value=value)  # four steps an epoch
    with pytest.raises(TrainingError) as caught:
        train(settings)
    message = str(caught.value)
    for words in ("epoch 3, step 2", "lower --lr", "--grad-clip", "epoch 2", "last.safetensors", "best checkpoint"):
        assert words in message
    assert "\n" not in message
    monkeypatch.undo()
    assert load(tmp_path / "run" / "last.safetensors").progression.epoch == 2
    model = PromptModel.load(tmp_path / "run")
    assert all(bool(value.isfinite().all()) for value in model.task_parameters().values())
    assert train(settings, resume=True).status == "finished"


def test_parameters_spoilt_by_the_last_step_are_not_saved(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = torch.optim.AdamW.step
    steps = iter(range(1, 10_000))

    def spoil(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        if next(steps) == 8:
            self.param_groups[0]["params"][0].grad.fill_(float("nan"))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(TrainingError, match="a parameter is not finite after epoch 2"):
        train(config(bars, tmp_path / "run"))
    assert load(tmp_path / "run" / "last.safetensors").progression.epoch == 1


def test_unreadable_images_are_listed_once_and_limited(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", train=8, val=2)
    for name in CLASSES[:2]:
        (data / "train" / name / "00.png").write_bytes(b"no picture")
    news: list[Progress] = []
    result = train(config(data, tmp_path / "run", epochs=2, max_corrupt=2), on_progress=news.append)
    listed = result.metrics["corrupt_images"]
    assert len(listed) == 2
    assert all("00.png" in line for line in listed)
    assert sum("00.png" in item.text for item in news) == 2
    with pytest.raises(DataError):
        train(config(data, tmp_path / "strict", epochs=2, max_corrupt=1))


def test_a_backbone_that_the_settings_do_not_name_is_refused(bars: Path, tmp_path: Path) -> None:
    backbone = load_backbone("test_vit2", SIDE, "random:0")
    settings = config(bars, tmp_path / "run")
    with pytest.raises(UsageError, match="name the backbone test_vit, but test_vit2 was given"):
        train(settings, backbone)
    other_size = dataclasses.replace(settings, backbone="test_vit2", image_size=SIDE * 2, output=str(tmp_path / "o"))
    with pytest.raises(UsageError, match="image size 64, the backbone has 32"):
        train(other_size, backbone)


def test_fp16_without_a_gpu_is_refused(bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="fp16 needs a GPU"):
        train(config(bars, tmp_path / "run", precision="fp16", device="auto"))
