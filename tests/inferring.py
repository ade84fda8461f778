"""Jobs of inference for tests."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image

from prompttune.cli.main import cli
from prompttune.serve.infer import InferSettings, InferSummary, Row, infer
from tests.engines import exported

SLOW_COMMITS = "import prompttune.serve.infer.job as job; job.COMMIT_S = {commit}\n"


def settings(*inputs: object, **changes: Any) -> InferSettings:
    """A job with the tiny engine and ``task0``; what is not a setting of its own belongs to the source."""
    given = {"tasks": ("task0",), "batch_size": 4, **changes}
    source = {name: given.pop(name) for name in list(given) if name not in _own()}
    made = InferSettings(exported("linear"), tuple(map(str, inputs)), **given)
    return dataclasses.replace(made, source=dataclasses.replace(made.source, **source))


def _own() -> set[str]:
    return {field.name for field in dataclasses.fields(InferSettings)}


def run(*inputs: object, output: Path, **changes: Any) -> tuple[InferSummary, list[Row]]:
    """Run a job; what it did and the rows of its JSON lines."""
    summary = infer(settings(*inputs, outputs=(str(output),), **changes))
    return summary, rows_of(output)


def rows_of(output: Path) -> list[Row]:
    return [Row.from_dict(json.loads(line)) for line in output.read_text(encoding="utf-8").splitlines()]


def picture(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def encoded(seed: int, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    picture(seed).save(stream, form)
    return stream.getvalue()


def pictures(folder: Path, count: int, corrupt: tuple[int, ...] = ()) -> Path:
    """A folder of ``count`` images, some of them corrupt."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        data = encoded(index)
        (folder / f"{index:04}.png").write_bytes(data[: len(data) // 3] if index in corrupt else data)
    return folder


def command(*arguments: object, setup: str = "") -> list[str]:
    """``prompttune infer`` on the tiny engine, in a process of its own in which ``setup`` has run before."""
    text = [str(exported("linear")), *map(str, arguments)]
    program = f"{setup}\nimport sys\nfrom prompttune.cli.main import cli\ncli({['infer', *text]!r})"
    return [sys.executable, "-c", program]


def invoked(*arguments: object) -> Result:
    """``prompttune infer`` on the tiny engine in this process; :func:`command` is for tests of the process itself."""
    return CliRunner().invoke(cli, ["infer", str(exported("linear")), *map(str, arguments)])


def told(process: subprocess.Popen[str], lines: int) -> None:
    """Wait until a process has written so many lines to its standard error."""
    assert process.stderr is not None
    for _ in range(lines):
        assert process.stderr.readline()


TELLING = """
import os, prompttune.serve.infer.job as job
write = job.InferJob._write
def telling(self, answers):
    write(self, answers)
    os.write(2, f"wrote {len(answers)}\\n".encode())  # one system call: other threads write there too
job.InferJob._write = telling
"""
"""Set-up of a command that tells of each chunk in a line of its own."""
