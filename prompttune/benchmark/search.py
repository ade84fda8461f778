"""Choice of settings on held-out images, before the reported runs are trained."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompttune.benchmark.plan import RunSpec
from prompttune.benchmark.recipe import Recipe
from prompttune.benchmark.runner import Listener, RunResult, execute
from prompttune.files import write_json
from prompttune.spreadsheets import write_table

Pair = tuple[str, str]
"""Task and label."""
Choices = dict[Pair, dict[str, Any]]
"""Chosen settings."""
SEARCH, CHOSEN = "search.csv", "chosen.json"


@dataclass(frozen=True)
class Decision:
    """Result of a search. Each task and label of its plan is in one of the three fields."""

    choices: Choices
    waiting: Sequence[Pair] = ()
    """Pairs with a setting that is still to be tried, since that result could change the choice."""
    barren: Mapping[Pair, str] = dataclasses.field(default_factory=dict)
    """Pairs whose settings all diverged, with the error of the first."""

    def is_open(self, spec: RunSpec) -> bool:
        """Whether the settings of a reported run are still unknown."""
        pair = (spec.task, spec.label)
        return pair in self.waiting or pair in self.barren


def make_search(
    recipe: Recipe, labels: Sequence[str], tasks: Sequence[str], overrides: Mapping[str, Any]
) -> list[RunSpec]:
    """One run for each point of each method's grid on each task, with the recipe's search seed.

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


def run_search(
    plan: Sequence[RunSpec], output: Path, jobs: int, listener: Listener
) -> tuple[Decision, list[RunResult]]:
    """Run a search; ``search.csv`` and ``chosen.json`` list the tried and the chosen settings."""
    if not plan:
        return Decision({}), []
    outcomes = execute(plan, output, jobs, listener)
    rows = [{**row, **_tried(spec)} for spec in plan if (row := spec.record(output)) is not None]
    write_table(output / SEARCH, rows)
    decision = decide(outcomes)
    write_json(
        output / CHOSEN,
        [{"task": task, "label": label, "settings": settings} for (task, label), settings in decision.choices.items()],
    )
    return decision, outcomes


def _tried(spec: RunSpec) -> dict[str, Any]:
    return {f"tried_{name}": value for name, value in (spec.candidate or {}).items()}


def decide(outcomes: Sequence[RunResult]) -> Decision:
    """Choose the best accuracy for each task and label; the smallest learning rate wins a tie.

    VPT's code breaks ties in this way, for stability. A diverged run is never chosen; a run without a result keeps the
    choice open.
    """
    groups: dict[Pair, list[RunResult]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.spec.task, outcome.spec.label), []).append(outcome)
    choices: Choices = {}
    waiting: list[Pair] = []
    barren: dict[Pair, str] = {}
    for pair, found in groups.items():
        done = [outcome for outcome in found if outcome.row is not None]
        if len(done) + sum(outcome.diverged for outcome in found) < len(found):
            waiting.append(pair)
        elif not done:
            barren[pair] = f"no setting of {len(found)} can be chosen, the first {found[0].error}"
        else:
            choices[pair] = dict(max(done, key=_rank).spec.candidate or {})
    return Decision(choices, waiting, barren)


def _rank(outcome: RunResult) -> tuple[float, float]:
    accuracy = 0.0 if outcome.row is None else float(outcome.row["accuracy"])
    return accuracy, -outcome.spec.config(Path()).lr


def decided_so_far(plan: Sequence[RunSpec], output: Path) -> Decision:
    """Result of a search so far, without training."""
    rows = ((spec, spec.record(output)) for spec in plan)
    return decide([RunResult(spec) if row is None else RunResult.of(spec, row, kept=True) for spec, row in rows])


def pending(plan: Sequence[RunSpec], search: Sequence[RunSpec], decision: Decision) -> list[RunSpec]:
    """The plan with placeholders for settings that are not chosen yet; for display, not for training."""
    open_names = {(spec.task, spec.label): list(spec.candidate or {}) for spec in search if decision.is_open(spec)}
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
