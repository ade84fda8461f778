"""Protocols with training on tiny data: files, finished and killed runs, failures, the command line."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import prompttune.training.loop
from prompttune.benchmark import worker
from prompttune.cli.main import cli
from prompttune.errors import DivergedError, TrainingError
from prompttune.files import locked
from prompttune.model import PromptModel
from prompttune.training import TrainConfig
from tests.protocol_data import picture, write_recipe, write_vtab
from tests.training_helpers import no_pictures, one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

PATIENCE_S = 120.0


def command(*words: Any) -> Result:
    return CliRunner().invoke(cli, ["benchmark", *map(str, words)])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def base(tmp_path: Path) -> list[Any]:
    """A command on two tasks with two methods."""
    root = write_vtab(tmp_path / "data", "a", "b")
    recipe = write_recipe(tmp_path / "r.yaml", grids={"linear": {"lr": [1e-3, 1e-2]}})
    return ["vtab-1k", "--recipe", recipe, "--data-root", root, "--methods", "linear,vpt-shallow",
            "--output", tmp_path / "out", "--jobs", 1]  # fmt: skip


def test_whole_protocol_searches_trains_and_reports(base: list[Any], tmp_path: Path) -> None:
    planned = command(*base, "--dry-run", "--json")
    assert planned.exit_code == 0, planned.output
    runs = json.loads(planned.stdout)["runs"]
    assert [run["stage"] for run in runs].count("search") == 4  # two rates of linear on two tasks
    assert len(runs) == 4 + 8
    assert "chosen by the search" in planned.stdout
    assert not (tmp_path / "out").exists()

    result = command(*base, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    rows = rows_of(tmp_path / "out" / "results.csv")
    assert len(rows) == len(report["runs"]) == 8
    assert {row["seed"] for row in rows} == {"3", "4"}
    chosen = {(one["task"], one["label"]): one["settings"] for one in
              json.loads((tmp_path / "out" / "chosen.json").read_text())}  # fmt: skip
    tried = rows_of(tmp_path / "out" / "search.csv")
    for (task, label), settings in chosen.items():
        found = {float(row["tried_lr"]): float(row["accuracy"]) for row in tried if row["task"] == task}
        best = max(found.values())
        assert settings["lr"] == min(rate for rate, value in found.items() if value == best)
        model = tmp_path / "out" / "runs" / task / label / "seed3"
        assert json.loads((model / "metrics.json").read_text())["settings"]["lr"] == settings["lr"]
        assert PromptModel.load(model).labels == ["0", "1"]
    for line in report["lines"]:
        mine = [float(row["accuracy"]) for row in rows if row["label"] == line["label"]]
        assert line["mean"] == pytest.approx(sum(mine) / 4)
    linear = next(line for line in report["lines"] if line["label"] == "linear")
    assert linear["parameters_beside_head"] == 0
    assert {one["label"] for one in report["latencies"]} == {"linear", "vpt-shallow"}
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "summary.md").read_text().startswith("# tiny: tiny tasks, test_vit at 32 pixels")

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("prompt_model.safetensors")}
    again = command(*base, "--no-latency")
    assert again.exit_code == 0, again.output
    assert "8 finished before" in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("prompt_model.safetensors")}

    other = command(*base, "--set", "weight_decay=0.5")
    assert other.exit_code == 2
    assert "was trained with other settings" in other.stderr


def test_run_that_fails_leaves_the_others(base: list[Any], tmp_path: Path) -> None:
    (tmp_path / "data" / "b" / "test.txt").write_text("images/gone.png 0\nimages/test/001.png 1\n")
    once = [*base, "--methods", "vpt-shallow", "--seeds", "0", "--no-latency", "--set", "max_corrupt=0"]
    result = command(*once)
    assert result.exit_code == 1
    assert "b/vpt-shallow/seed0: 1 images cannot be read" in result.stderr
    assert [row["task"] for row in rows_of(tmp_path / "out" / "results.csv")] == ["a"]
    (tmp_path / "out" / "results.csv").unlink()
    so_far = command(*once, "--table-only", "--json")
    assert so_far.exit_code == 0, so_far.output
    assert json.loads(so_far.stdout)["missing_runs"] == 1
    assert [row["task"] for row in rows_of(tmp_path / "out" / "results.csv")] == ["a"]
    assert "1 runs have no figure yet" in (tmp_path / "out" / "summary.md").read_text()
    picture(tmp_path / "data" / "b" / "images" / "gone.png", 0, seed=0)
    assert command(*once).exit_code == 0
    assert [row["task"] for row in rows_of(tmp_path / "out" / "results.csv")] == ["a", "b"]


def test_missing_data_and_wrong_names_start_nothing(base: list[Any], tmp_path: Path) -> None:
    (tmp_path / "data" / "b" / "train800.txt").unlink()
    missing = command(*base)
    assert missing.exit_code == 1
    assert f"b: {tmp_path}/data/b/train800.txt" in missing.stderr
    wrong = command(*base, "--methods", "lineer")
    assert (wrong.exit_code, "did you mean linear" in wrong.stderr) == (2, True)
    for words, message in (
        (["--tasks", "c"], "unknown task 'c'"),
        (["--set", "learning=1"], "unknown setting 'learning'"),
        (["--set", "seed=1"], "use --seeds"),
        (["--set", "lr"], "takes name=value"),
        (["--set", "lr=-1"], "lr must be above 0"),
        (["--seeds", "1,1"], "different whole numbers"),
        (["--seeds", str(2**63)], f"below {2**63}"),
        (["--set", "eval_every=1"], "eval_every is not open"),
        (["--set", "patience=3"], "patience is not open"),
        (["--set", "task_type=segmentation"], "protocols compare classifications"),
        (["--set", "lr=[1"], "--set lr=[1: cannot read the value"),
        (["--set", "epochs=.inf"], "epochs must be a whole number, not inf"),
        (["--backbone", "nope"], "unknown backbone 'nope'"),
        (["--device", "cuda:77"], "device cuda:77 is not there"),
    ):
        refused = command(*base, "--skip-missing", *words)
        assert refused.exit_code == 2, words
        assert message in refused.stderr
        assert refused.stderr.count("Error: ") == 1
    lost = command(*base, "--skip-missing", "--weights", tmp_path / "gone.pth")
    assert (lost.exit_code, lost.stderr.endswith(f"no weights file at {tmp_path}/gone.pth\n")) == (1, True)
    assert not (tmp_path / "out").exists()
    for methods, message in (("linear", "settings are still to be chosen"), ("vpt-shallow", "no run of this plan is")):
        early = command(*base, "--methods", methods, "--skip-missing", "--table-only")
        assert (early.exit_code, message in early.stderr) == (2, True)
    skipped = command(*base, "--skip-missing", "--dry-run")
    assert skipped.exit_code == 0
    assert "skipped, its data are missing: b" in skipped.stderr


def test_arguments_of_the_backbone_are_a_part_of_its_name(base: list[Any]) -> None:
    """They reach every run, through the option or through ``--set``."""
    for words in (["--backbone-arg", "init_values=0.1"], ["--set", "backbone_arg=[init_values=0.1]"]):
        planned = command(*base, "--skip-missing", "--methods", "linear", *words, "--dry-run", "--json")
        names = {run["settings"]["backbone"] for run in json.loads(planned.stdout)["runs"]}
        assert names == {"test_vit?init_values=0.1"}, planned.stderr
    wrong = command(*base, "--skip-missing", "--methods", "linear", "--backbone-arg", "init_values")
    assert (wrong.exit_code, "give NAME=VALUE" in wrong.stderr) == (2, True)


Fail = Callable[[TrainConfig], None]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fail], None]:
    """Replace what every run does first."""
    train = prompttune.training.loop.train

    def install(fail: Fail) -> None:
        def failing_train(config: TrainConfig, *args: Any, **kwargs: Any) -> Any:
            fail(config)
            return train(config, *args, **kwargs)

        monkeypatch.setattr(prompttune.training.loop, "train", failing_train)

    return install


def test_a_point_that_diverges_is_a_result_that_is_never_chosen(
    base: list[Any], tmp_path: Path, failing: Callable[[Fail], None]
) -> None:
    trained: list[str] = []
    nan = "the loss is nan at epoch 1, step 1"
    tried_in_vain = [("a", "0.01"), ("b", "0.001"), ("b", "0.01")]

    def diverge(config: TrainConfig) -> None:
        trained.append(config.output)
        if config.lr == 1e-2 or config.data == "vtab/b/train800/val200":
            raise DivergedError(nan, "try a lower --lr; the last good state is in x")

    failing(diverge)
    words = [*base, "--methods", "linear", "--seeds", "3", "--no-latency"]
    for call in ("first", "second"):
        result = command(*words, "--quiet")
        assert result.exit_code == 1
        assert result.stderr == f"b/linear: left out: no setting of 2 can be chosen, the first diverged: {nan}\n"
        assert len(trained) == 5, f"{call}: four points and the one run that could be chosen for"
    tried = rows_of(tmp_path / "out" / "search.csv")
    figures = [(row["task"], row["tried_lr"], bool(row["accuracy"]), row["error"]) for row in tried]
    assert figures == [("a", "0.001", True, ""), *((*point, False, nan) for point in tried_in_vain)]
    table = command(*words, "--table-only")
    assert (table.exit_code, "b/linear: no setting of 2" in table.stderr) == (0, True)
    planned = json.loads(command(*words, "--dry-run", "--json").stdout)["runs"]
    assert [run["state"] for run in planned] == ["finished", "diverged", "diverged", "diverged", "finished", "left out"]


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (ValueError("a disk is\nfull"), "ValueError: a disk is full"),
        (TrainingError("found no image"), "found no image"),  # training that cannot go on need not have diverged
    ],
)
def test_runs_wait_for_a_point_that_failed(
    base: list[Any], tmp_path: Path, failing: Callable[[Fail], None], problem: Exception, told: str
) -> None:
    broken = True

    def fail(config: TrainConfig) -> None:
        if broken and config.lr == 1e-2:
            raise problem

    failing(fail)
    words = [*base, "--methods", "linear", "--tasks", "a", "--no-latency"]
    result = command(*words)
    assert result.exit_code == 1
    assert f"a/linear/lr=0.01: {told}\n" in result.stderr
    assert "a/linear: left out: a setting of its search could not be tried" in result.stderr
    assert not (tmp_path / "out" / "runs").exists()
    broken = False
    assert command(*words).exit_code == 0


def test_a_worker_survives_an_error_of_any_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("top1")

    monkeypatch.setattr(worker, "run_one", fail)
    ours, theirs = multiprocessing.Pipe()
    for message in ("run", "run", None):
        ours.send(message)
    worker.serve_runs(theirs, tmp_path, 1)
    assert [ours.recv(), ours.recv()] == [("error", "KeyError: 'top1'")] * 2


def test_figures_survive_a_measurement_that_fails(
    base: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        assert (tmp_path / "out" / "summary.json").exists()
        raise RuntimeError("no\nclock")

    monkeypatch.setattr("prompttune.benchmark.run.measure", fail)
    result = command(*base, "--methods", "vpt-shallow", "--seeds", "3", "--tasks", "a", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "latencies are missing: RuntimeError: no clock\n")
    assert (tmp_path / "out" / "accuracy.png").exists()
    assert "vpt-shallow" in result.stdout


def test_what_stands_in_a_runs_way_is_told_in_words_of_this_command(
    base: list[Any], tmp_path: Path, failing: Callable[[Fail], None]
) -> None:
    once = [*base, "--methods", "vpt-shallow", "--tasks", "a", "--seeds", "3", "--no-latency"]
    folder = tmp_path / "out" / "runs" / "a" / "vpt-shallow" / "seed3"
    folder.mkdir(parents=True)
    (folder / "last.safetensors").write_text("broken")
    result = command(*once)
    assert result.exit_code == 1
    assert "last.safetensors is damaged" in result.stderr
    assert "--overwrite" not in result.stderr
    assert f"; remove the folder {folder} to train it again\n" in result.stderr

    def diverge(config: TrainConfig) -> None:
        raise DivergedError("the loss is nan", "try a lower --lr or --grad-clip 1; the last good state is in x")

    failing(diverge)
    assert f"the loss is nan; give a lower lr or grad_clip=1 with --set or a recipe and remove the folder {folder}" in (
        command(*once).stderr
    )


def test_home_in_an_output_is_one_place(base: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    words = [*base, "--methods", "vpt-shallow", "--tasks", "a", "--seeds", "3", "--no-latency", "--output=~/x"]
    results = [command(*words) for _ in range(2)]
    assert [result.exit_code for result in results] == [0, 0], results[0].output
    assert "1 finished before" in results[1].stderr
    assert (tmp_path / "home" / "x" / "results.csv").exists()
    assert not (tmp_path / "~").exists()


@pytest.mark.slow
def test_modules_in_the_users_folder_do_not_reach_the_workers(
    base: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "yaml.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    result = command(*base, "--methods", "vpt-shallow", "--seeds", "3", "--jobs", 2, "--no-latency")
    assert result.exit_code == 0, result.output


def start(words: list[Any]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "prompttune.cli.main", "benchmark", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killed_benchmark_goes_on_in_the_middle_of_a_run(base: list[Any], tmp_path: Path) -> None:
    """Two workers, SIGKILL of the parent in the middle of a long run: the workers go too, and nothing is repeated."""
    words = [*base, "--methods", "vpt-shallow", "--seeds", "0", "--jobs", "2", "--set", "epochs=60", "--no-latency"]
    process = start(words)
    metrics = tmp_path / "out" / "runs" / "a" / "vpt-shallow" / "seed0" / "metrics.json"
    until = time.monotonic() + PATIENCE_S
    while not metrics.exists() or len(json.loads(metrics.read_text())["history"]) < 3:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "the run does not get on"
        time.sleep(0.01)
    threads = Path(f"/proc/{process.pid}/task").glob("*/children")
    workers = [Path("/proc") / pid for thread in threads for pid in thread.read_text().split()]
    assert len(workers) >= 2
    for one in workers:  # or they might end the run before they look for their parent
        os.kill(int(one.name), signal.SIGSTOP)
    process.kill()
    process.wait()  # not for its pipes, which the workers hold too
    time.sleep(0.6)
    for one in workers:
        os.kill(int(one.name), signal.SIGCONT)
    process.communicate()
    until = time.monotonic() + PATIENCE_S
    while any(one.exists() and ") Z" not in (one / "stat").read_text() for one in workers):
        assert time.monotonic() < until, "a worker outlived its parent"
        time.sleep(0.01)
    done = len(json.loads(metrics.read_text())["history"])
    assert 3 <= done < 60
    stamps = [epoch["seconds"] for epoch in json.loads(metrics.read_text())["history"]]
    process = start(words)
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert "2/2" in err, err
    history = json.loads(metrics.read_text())["history"]
    assert len(history) == 60
    assert [epoch["seconds"] for epoch in history[:done]] == stamps  # gone on, not begun again
    assert "tiny: tiny tasks" in out
    assert not metrics.with_name("last.safetensors").exists()


def test_two_benchmarks_never_share_a_folder(base: list[Any], tmp_path: Path) -> None:
    with locked(tmp_path / "out"):
        result = command(*base)
    assert result.exit_code == 2
    assert "another run writes to" in result.stderr
