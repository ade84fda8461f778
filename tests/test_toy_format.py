"""A format and a runtime of somebody else: one file, one registration each, and every command knows them."""

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner

import prompttune as pt
from prompttune.cli.export import export
from prompttune.cli.main import cli
from prompttune.errors import UsageError
from prompttune.export import FORMATS, RUNTIMES, validate_engine
from prompttune.export.formats.base import _OPTIONS
from prompttune.export.formats.tensorrt_options import TensorRTOptions
from prompttune.export.triton import TritonSettings
from prompttune.settings import all_settings, setting
from tests.engines import checkpoint, exported, noise
from tests.toy_format import ProgramFormat


@pytest.fixture
def registered(monkeypatch):
    for registry in (FORMATS, RUNTIMES):
        monkeypatch.setattr(registry, "_parts", dict(registry._parts))
    FORMATS.add("program", "tests.toy_format:ProgramFormat")
    RUNTIMES.add("program", "tests.toy_format:ProgramRuntime")


@pytest.mark.parametrize(
    ("field", "where"), [("workspace", "trt"), ("images", "prompttune export"), ("overwrite", "prompttune export")]
)
def test_an_option_has_one_meaning(registered, field, where):
    options = dataclasses.make_dataclass("Options", [(field, int, setting(1, "other thing"))], frozen=True)
    kind = type("Other", (ProgramFormat,), {"options": options})
    message = f"the format 'other': --{field} has another meaning in {where}: give it another name"
    with pytest.raises(UsageError, match=message):
        FORMATS.add("other", kind)
    FORMATS.add("like", type("Like", (ProgramFormat,), {"options": TensorRTOptions}))


def test_the_options_that_no_format_may_have_are_those_of_the_command():
    own = {option.opts[0].removeprefix("--").replace("-", "_") for option in export.params[1:]}
    assert own | {"help"} | all_settings(TritonSettings).keys() == set(_OPTIONS.split())


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
