"""Choosing settings on held-out images, before anything is trained that is reported."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prompttune.errors import TrainingError
from prompttune.files import write_json
from prompttune.protocols.plan import RunSpec
from prompttune.protocols.recipe import Recipe
from prompttune.protocols.runner import Listener, Outcome, execute
from prompttune.protocols.tables import write_rows

Choices = dict[tuple[str, str], dict[str, Any]]
"""Chosen settings by task and label."""
SEARCH, CHOSEN = "search.csv", "chosen.json"


def make_search(
    recipe: Recipe, labels: Sequence[str], tasks: Sequence[str], overrides: Mapping[str, Any]
) -> list[RunSpec]:
    """A run for each point of each method's grid on each task, with the recipe's seed for the search.

    Raises:
        UsageError: a setting is wrong; the message names the run.
    """
    specs = []
    for task, label in itertools.product(tasks, labels):
        grid, entry = recipe.grid(label, task, overrides), recipe.tasks[task]
        points = list(itertools.product(*grid.values())) if grid else []
        for values in points:
            candidate = dict(zip(grid, values, strict=True))
            settings = recipe.settings(label, task, {**candidate, **overrides}) | {"data": entry.search}
            specs.append(
                RunSpec(recipe.protocol, entry.group, task, label, recipe.search_seed, settings, candidate=candidate)
            )
    for spec in specs:
        spec.config(Path())
    return specs


def run_search(plan: Sequence[RunSpec], output: Path, jobs: int, listener: Listener) -> Choices:
    """Carry out a search; ``search.csv`` and ``chosen.json`` tell what was tried and what was chosen.

    Raises:
        TrainingError: no point of a grid could be trained; the message names the method, the task and one reason.
    """
    if not plan:
        return {}
    outcomes = execute(plan, output, jobs, listener)
    rows = [{**outcome.row, **_tried(outcome)} for outcome in outcomes if outcome.row is not None]
    write_rows(output / SEARCH, rows)
    choices = choose_settings(outcomes)
    write_json(
        output / CHOSEN,
        [{"task": task, "label": label, "settings": settings} for (task, label), settings in choices.items()],
    )
    return choices


def _tried(outcome: Outcome) -> dict[str, Any]:
    return {f"tried_{name}": value for name, value in (outcome.spec.candidate or {}).items()}


def choose_settings(outcomes: Sequence[Outcome]) -> Choices:
    """The point of the best accuracy for each task and label; of equals that of the smallest learning rate.

    VPT's code breaks ties so, for stability; a run that failed is no candidate.

    Raises:
        TrainingError: see :func:`run_search`.
    """
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.spec.task, outcome.spec.label), []).append(outcome)
    choices: Choices = {}
    for (task, label), found in groups.items():
        done = [outcome for outcome in found if outcome.row is not None]
        if not done:
            raise TrainingError(f"no setting of {label} on {task} could be trained; the first: {found[0].error}")
        choices[task, label] = dict(max(done, key=_rank).spec.candidate or {})
    return choices


def _rank(outcome: Outcome) -> tuple[float, float]:
    accuracy = 0.0 if outcome.row is None else float(outcome.row["accuracy"])
    return accuracy, -outcome.spec.config(Path()).lr


def finished_choices(plan: Sequence[RunSpec], output: Path) -> Choices | None:
    """What a finished search chose, without training; None if a run of it is left."""
    outcomes = []
    for spec in plan:
        row = spec.record(output)
        if row is None:
            return None
        outcomes.append(Outcome(spec, row, kept=True))
    return choose_settings(outcomes)


def pending(plan: Sequence[RunSpec], search: Sequence[RunSpec]) -> list[RunSpec]:
    """The plan with a placeholder where the search has yet to choose; for showing, not for training."""
    open_names = {(spec.task, spec.label): list(spec.candidate or {}) for spec in search}
    return [
        dataclasses.replace(
            spec,
            settings={
                **spec.settings,
                **dict.fromkeys(open_names.get((spec.task, spec.label), []), "chosen by the search"),
            },
        )
        for spec in plan
    ]
