"""A format and a runtime of somebody else: one file, one registration each, and every command knows them."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import prompttune as pt
from prompttune.cli.main import cli
from prompttune.export import FORMATS, RUNTIMES, validate_engine
from tests.engines import checkpoint, exported, noise


@pytest.fixture
def registered(monkeypatch):
    for registry in (FORMATS, RUNTIMES):
        monkeypatch.setattr(registry, "_parts", dict(registry._parts))
    FORMATS.add("program", "tests.toy_format:ProgramFormat")
    RUNTIMES.add("program", "tests.toy_format:ProgramRuntime")


def run(*arguments):
    result = CliRunner().invoke(cli, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_toy_format_is_exported_validated_and_asked(registered, tmp_path):
    text = run("export", "--help")
    assert "|program|" in text
    assert "program: torch.export" in " ".join(text.split())
    assert "--remark" in text
    runs = [checkpoint("linear", number) for number in (0, 1)]
    options = ("--format", "program", "--remark", "hello", "--images", "4", "--batch-sizes", "1,3", "--json")
    made = json.loads(run("export", *runs, "-o", tmp_path / "engine", *options))
    assert (made["format"], made["details"], made["parity"]["passed"]) == ("program", {"remark": "hello"}, True)
    assert made["parity"]["runtime"].startswith("torch.export of PyTorch")
    assert validate_engine(tmp_path / "engine", images=2, batch_sizes=(1, 2)).passed
    images, tasks = noise(3), ["task0", "task1", "task0"]
    found = pt.Engine(tmp_path / "engine").logits(images, tasks)
    np.testing.assert_allclose(found, pt.Engine(exported("linear")).logits(images, tasks), atol=1e-5)
