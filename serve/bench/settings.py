"""Settings of a benchmark, of which the options of ``prompttune bench`` are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prompttune.errors import UsageError
from prompttune.export.options import read_sizes
from prompttune.serve.bench.timing import Rounds
from prompttune.settings import part, setting, settle

ONE, ALL = "one", "all"
MIXES = (ONE, ALL)
"""Every row for the same task; or rows that alternate between the resident tasks, each call continuing the last."""


@dataclass(frozen=True)
class BenchSettings:
    """What is measured.

    Raises:
        UsageError: a value is invalid or given twice.
    """

    against: tuple[str, ...] = setting(
        (), "Compare with the plain backbone in the engine's format, the same tasks in eager PyTorch, another runtime "
        "of an ONNX engine, or another engine. May be repeated.", repeat=True,
        metavar="backbone|torch|onnxruntime|openvino|ENGINE",
    )  # fmt: skip
    runtimes: str | None = setting(
        None, "all: compare the runtimes of an ONNX engine, and remember the quickest in its folder.", ("all",)
    )
    batch_sizes: tuple[int, ...] = setting((1, 8), "Images per call.", kind=str, read=read_sizes, metavar="N,N,...")
    mix: tuple[str, ...] = setting(
        MIXES, "one: all rows for the same task; all: rows alternate between the tasks.", MIXES, metavar="one,all"
    )
    tasks_per_image: tuple[int, ...] = setting(
        (), "Also ask each image about so many tasks in one call, and compare with one.", kind=str,
        read=lambda value: read_sizes(value) if value else (), metavar="N,N,...", shown="none",
    )  # fmt: skip
    tasks: int | None = setting(None, "Largest number of tasks to alternate between.", low=1, shown="all")
    rounds: Rounds = part(Rounds)
    checkpoint: Path | None = setting(None, "Also time adding this checkpoint.", option="add", path="folder")
    weights: str | None = None
    """Source of the backbone's weights, if it differs from that of the export."""
    seed: int = setting(0, "Seed of the images, which are noise.")
    task_costs: bool = True
    """Whether to also time adding tasks and switching between them."""

    def __post_init__(self) -> None:
        settle(self)
        if not self.mix:
            raise UsageError(f"give at least one mix of {', '.join(MIXES)}")
        if self.tasks_per_image and ONE not in self.mix:
            raise UsageError("several tasks for an image are compared with one: let the mix have one")
        for what, values in (("batch size", self.batch_sizes), ("mix", self.mix), ("comparison", self.against)):
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise UsageError(f"the {what} {twice[0]!r} is given twice")
