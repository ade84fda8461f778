"""``prompttune evaluate`` on run folders that came from elsewhere: what they remember is checked as a setting is."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from prompttune.cli.main import cli

REMEMBERED = {"data": "demo/digits", "limit": 4, "val_fraction": 0.2, "seed": 0, "max_corrupt": 10}


def evaluate(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(cli, ["evaluate", str(folder), "--quiet", *options])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": [1]}, "data must be text, not [1]"),
        ({"data": None}, "data needs text, not nothing"),
        ({"data_root": {"a": 1}}, "data_root must be text"),
        ({"limit": "a"}, "limit must be a whole number, not 'a'"),
        ({"limit": True}, "limit must be a whole number, not True"),
        ({"limit": 0}, "limit must be at least 1, not 0"),
        ({"limit": float("inf")}, "limit must be a whole number, not inf"),
        ({"max_corrupt": None}, "max_corrupt needs a whole number, not nothing"),
        ({"max_corrupt": -1}, "max_corrupt must be at least 0, not -1"),
        ({"val_fraction": float("nan")}, "val_fraction must be above 0 and below 1, not nan"),
        ({"val_fraction": 10**400}, "val_fraction must be a number, not 1000"),
        ({"reduce_zero_label": "no"}, "reduce_zero_label must be true or false"),
        ({"seed": 0.5}, "seed must be a whole number, not 0.5"),
    ],
)
def test_what_a_run_remembers_is_not_believed(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    file = tmp_path / "train_config.yaml"
    file.write_text(yaml.safe_dump({**REMEMBERED, **changes}))
    found = evaluate(tmp_path)
    (line,) = found.stderr.splitlines()
    assert found.exit_code == 2
    assert line.startswith(f"Error: {file} is damaged: ")
    assert line.endswith("; give --data")
    assert words in line
    # another data set makes what the run remembers of its own irrelevant
    assert "no checkpoint config" in evaluate(tmp_path, "--data", "demo/digits").stderr


def test_a_data_set_may_be_called_by_a_number(tmp_path: Path) -> None:
    (tmp_path / "train_config.yaml").write_text(yaml.safe_dump({**REMEMBERED, "data": 5}))
    assert "no checkpoint config" in evaluate(tmp_path).stderr


def test_a_setting_out_of_bounds_is_told_before_anything_is_read(tmp_path: Path) -> None:
    found = evaluate(tmp_path, "--data", "demo/digits", "--max-corrupt", "-1")
    assert found.exit_code == 2
    last = found.stderr.splitlines()[-1]
    assert last == "Error: Invalid value for '--max-corrupt': max_corrupt must be at least 0, not -1"
