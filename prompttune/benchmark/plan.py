"""The runs of a protocol, before any of them starts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompttune.benchmark.recipe import Recipe
from prompttune.errors import CheckpointError, UsageError
from prompttune.files import read_json
from prompttune.methods import METHODS, MethodConfig
from prompttune.settings import settings_of
from prompttune.training.config import TrainConfig, augment_fields
from prompttune.training.state import RunFolder

RECORD_FILE = "benchmark.json"
"""File that is written to a run's folder last, once the run is finished."""
ERROR = "error"
"""Key in the record of a diverged candidate, which does not have figures: the error."""
_FIGURES = ("accuracy", "classes", "trainable_parameters", "parameters_beside_head", "share_of_backbone", "seed")
"""Keys of a record that a table needs."""


@dataclass(frozen=True, eq=False)
class RunSpec:
    """One run: a method, or a variant of one, on a task with a seed. Equal only to itself."""

    protocol: str
    group: str
    task: str
    label: str
    seed: int
    settings: Mapping[str, Any]
    """Flat settings of ``prompttune train`` without ``output``."""
    candidate: Mapping[str, Any] | None = None
    """Values that this run tries, if it belongs to a search."""

    @property
    def name(self) -> str:
        """Folder of the run below the benchmark's ``runs``, or below ``search`` if it belongs to a search."""
        if self.candidate is not None:
            tried = ",".join(f"{name}={value}" for name, value in self.candidate.items())
            return "/".join((_slug(self.task), _slug(self.label), _slug(tried)))
        return "/".join((_slug(self.task), _slug(self.label), f"seed{self.seed}"))

    def folder(self, output: Path) -> Path:
        """Output folder of the run."""
        return output / ("runs" if self.candidate is None else "search") / self.name

    def config(self, output: Path) -> TrainConfig:
        """The run's settings; raises :class:`UsageError` with the run's name if one is wrong."""
        try:
            return TrainConfig.from_flat({**self.settings, "seed": self.seed, "output": str(self.folder(output))})
        except UsageError as problem:
            raise UsageError(f"{self.label} on {self.task}: {problem}") from None

    def method_config(self) -> MethodConfig:
        """The method with its settings."""
        return self.config(Path()).method_config()

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits over every setting that could change the result.

        Default values are left out, so that a setting of a later version does not change the digest.
        """
        flat = self.config(Path()).to_flat()
        known = settings_of(TrainConfig) | augment_fields() | settings_of(METHODS[flat["method"]])
        shown = {
            name: value
            for name, value in flat.items()
            if name == "method" or not (not known[name].must_match_on_resume or value == _plain(known[name].default))
        }
        return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:16]

    def record(self, output: Path) -> dict[str, Any] | None:
        """The row of a finished run; None for an unfinished one. The row of a diverged candidate has :data:`ERROR`.

        Raises:
            UsageError: the run was trained with other settings.
            CheckpointError: the record is damaged.
        """
        folder = self.folder(output)
        if not (folder / RECORD_FILE).exists():
            return None
        try:
            row = read_json(folder / RECORD_FILE, CheckpointError, "record of a run")
        except CheckpointError as problem:
            raise CheckpointError(f"{problem}; {train_again(folder)}") from None
        if row.get("settings_digest") != self.digest:
            raise UsageError(
                f"{folder} was trained with other settings ({row.get('settings_digest')}, now {self.digest}); "
                f"give another --output, or {train_again(folder)}"
            )
        diverged = self.candidate is not None and isinstance(row.get(ERROR), str)
        if not diverged and (lost := [name for name in _FIGURES if not isinstance(row.get(name), int | float)]):
            raise CheckpointError(f"{folder / RECORD_FILE} lacks {' and '.join(lost)}; {train_again(folder)}")
        return row

    def state(self, output: Path) -> str:
        """``finished``, ``diverged``, ``begun`` or ``to do``; raises the errors of :meth:`record`."""
        if (row := self.record(output)) is not None:
            return "diverged" if ERROR in row else "finished"
        return "begun" if RunFolder(self.folder(output)).last.exists() else "to do"


def train_again(folder: Path) -> str:
    """Advice about a finished run that prevents another one."""
    return f"remove the folder {folder} to train it again"


def make_plan(
    recipe: Recipe,
    labels: Iterable[str],
    tasks: Iterable[str],
    seeds: Sequence[int],
    overrides: Mapping[str, Any] | None = None,
    choices: Mapping[tuple[str, str], Mapping[str, Any]] | None = None,
) -> list[RunSpec]:
    """Every run, one seed after the other, so that an interrupted benchmark has compared all methods.

    Args:
        recipe: the protocol.
        labels: methods, or variants of an ablation.
        tasks: names of the recipe's tasks.
        seeds: seeds; everything runs once for each.
        overrides: settings that replace all others, for the methods that have them.
        choices: settings chosen by a search, by task and label.

    Raises:
        UsageError: a setting is wrong; the message names the run. No run has been started.
    """
    specs = [
        RunSpec(
            recipe.protocol,
            recipe.tasks[task].group,
            task,
            label,
            seed,
            recipe.settings(label, task, {**(choices or {}).get((task, label), {}), **(overrides or {})}),
        )
        for seed in seeds
        for task in tasks
        for label in labels
    ]
    for spec in specs:
        spec.config(Path())
    return specs


def _slug(name: str) -> str:
    return re.sub(r"[^\w.,=+-]+", "-", name).strip("-")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
