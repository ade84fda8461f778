"""A protocol as data: its tasks and groups, and the settings of each method.

Recipes are YAML files of this package, or a user's own::

    protocol: demo
    title: built-in tasks
    seeds: [0, 1, 2]
    defaults: {epochs: 4, lr: 5e-3}          # settings of `prompttune train`, by name
    tasks:
      digits: {group: natural, data: demo/digits, settings: {}}
      # `search`, beside `data`: where the settings of a method with a grid are chosen; without it none are searched
    methods:                                 # settings of a method, over the defaults linear: {lr: 5e-2}
    grids:                                   # settings that are chosen on held-out images, by method or `default`
        linear: {lr: [1e-2, 5e-2]}
    search_seed: 0
    variants:                                # instead of plain methods, where the recipe is an ablation full: {method:
        sa2vp}

A method without an entry uses the defaults. An entry of an unregistered method is ignored. Settings that the protocol
itself fixes cannot be in a recipe: :func:`check_open`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from prompttune.data.benchmarks import BENCHMARKS
from prompttune.errors import UsageError, choose
from prompttune.methods import METHODS
from prompttune.methods.registry import method_fields
from prompttune.settings import setting, settings_of, settle
from prompttune.training.config import check_belongs, known_names, read_yaml
from prompttune.training.multi import suiting

BUILT_IN = ("demo", "demo-ablation", "vtab-1k", "fgvc", "hta")
ANY = "default"
"""Grid of the methods without their own grid."""
SCORED_ONCE: Mapping[str, Any] = {"eval_every": 1_000_000, "patience": None}
"""Settings of every run, so that only the last epoch is scored: the reported images do not choose an epoch."""
_ELSEWHERE = {
    "method": "the entries of methods and variants name it",
    "data": "a task names it",
    "seed": "give seeds and search_seed",
    "output": "give --output",
    "data_root": "give --data-root",
}
"""Settings that a recipe cannot have, with the place where they are given."""
SEED_LIMIT = 2**63
"""Upper limit of seeds (exclusive), as in torch."""


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """A data set of a protocol."""

    group: str = ""
    data: str
    """Data set, as for ``prompttune train --data``."""
    search: str | None = None
    """Splits for choosing settings, without the reported images."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of every run on this data set."""
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings of one method on this data set, which replace all others."""

    def __post_init__(self) -> None:
        settle(self, strict=True)
        if self.search is not None and _scored(self.search) == _scored(self.data):
            raise UsageError(
                f"settings would be chosen on the images that are reported ({self.data}): "
                "give 'search' held-out images, or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Content of a recipe file."""

    protocol: str
    title: str = ""
    seeds: tuple[int, ...] = setting((0,), low=0, below=SEED_LIMIT)
    search_seed: int = setting(0, low=0, below=SEED_LIMIT)
    defaults: Mapping[str, Any]
    tasks: Mapping[str, TaskEntry]
    methods: Mapping[str, Mapping[str, Any]]
    grids: Mapping[str, Mapping[str, Sequence[Any]]]
    """Values to choose from, by method (or :data:`ANY`) and setting."""
    variants: Mapping[str, Mapping[str, Any]]

    def __post_init__(self) -> None:
        settle(self)
        if not self.seeds:
            raise UsageError("seeds must be a list of at least one number")

    @property
    def labels(self) -> list[str]:
        """Labels that can be compared: the variants of an ablation, else every registered method."""
        return list(self.variants) if self.variants else list(METHODS)

    def method_of(self, label: str) -> str:
        """The method behind a label."""
        return str(self.variants[label].get("method", "sa2vp")) if self.variants else label

    def grid(self, label: str, task: str, overrides: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
        """Values to choose from for a method on a task, without settings that the user or the task's entry fixes."""
        method, entry = self.method_of(label), self.tasks[task]
        if entry.search is None or self.variants:
            return {}
        known = {**overrides, **entry.methods.get(method, {})}
        grid = self.grids.get(method, self.grids.get(ANY, {}))
        return {name: values for name, values in suiting(grid, method).items() if name not in known}

    def settings(self, label: str, task: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Flat settings of a run; ``overrides`` replace all others, for the methods that have them."""
        method, entry = self.method_of(label), self.tasks[task]
        own = self.methods.get(method, {})
        variant = {name: value for name, value in self.variants.get(label, {}).items() if name != "method"}
        found: dict[str, Any] = {
            "method": method,
            "data": entry.data,
            **suiting(self.defaults, method),
            **suiting(entry.settings, method),
            **own,
            **entry.methods.get(method, {}),
            **variant,
            **suiting(overrides, method),
            **SCORED_ONCE,
        }
        if args := found.pop("backbone_arg", None):
            from prompttune.backbones.names import join_args

            found["backbone"] = join_args(found["backbone"], args)
        return found


def check_open(name: str, value: Any) -> None:
    """Raise :class:`UsageError` for a setting that the protocol fixes."""
    if name in SCORED_ONCE:
        raise UsageError(f"{name} is not open: every run is scored after its last epoch alone; leave it out")
    if name == "task_type" and value != "classification":
        raise UsageError(f"task_type {value!r}: protocols compare classifications; leave it out")


def load_recipe(name: str, file: Path | None = None) -> Recipe:
    """Read the package's recipe ``name``, or a file instead.

    Raises:
        UsageError: the file is missing or wrong; one line that names the file and the error.
    """
    if file is not None:
        return read_recipe(file)
    choose("protocol", name, BUILT_IN)
    with resources.as_file(resources.files("prompttune.benchmark") / "recipes" / f"{name}.yaml") as path:
        return read_recipe(path)


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe file; see :func:`load_recipe`."""
    document = read_yaml(path)
    with _within(path):
        _check_parts(document, Recipe)
        tasks = _mapping(document, "tasks")
        if not tasks:
            raise UsageError("the recipe needs 'tasks', a mapping of names to group and data")
        return Recipe(
            **{"protocol": path.stem, **{name: document[name] for name in settings_of(Recipe) if name in document}},
            defaults=_settings("defaults", _mapping(document, "defaults")),
            tasks={name: _task(name, _mapping(tasks, name)) for name in tasks},
            methods=_by_method("methods", _mapping(document, "methods")),
            variants=_variants(_mapping(document, "variants")),
            grids=_grids(_mapping(document, "grids")),
        )


@contextlib.contextmanager
def _within(place: object) -> Iterator[None]:
    """Begin the block's errors with their place."""
    try:
        yield
    except UsageError as problem:
        raise UsageError(f"{place}: {problem}") from None


def _check_parts(values: Mapping[str, Any], kind: type[Any]) -> None:
    for name in values:
        choose("part", name, [known.name for known in fields(kind)])


def _mapping(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = document.get(key) or {}
    if not isinstance(value, dict):
        raise UsageError(f"{key} must be a mapping, not {value!r}")
    return {str(name): inner for name, inner in value.items()}


def _settings(where: str, values: Mapping[str, Any], method: str | None = None) -> dict[str, Any]:
    """Names of settings with underscores, known, allowed in a recipe, and those of ``method`` if it is given."""
    named = {name.replace("-", "_"): value for name, value in values.items()}
    with _within(where):
        for name, value in named.items():
            choose("setting", name, known_names())
            if name in _ELSEWHERE:
                raise UsageError(f"{name} is not a setting of a recipe: {_ELSEWHERE[name]}")
            check_open(name, value)
            if method is not None and name in method_fields():
                check_belongs(name, method)
    return named


def _by_method(where: str, entries: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    known = [method for method in entries if method in METHODS]
    return {method: _settings(f"{where}.{method}", _mapping(entries, method), method) for method in known}


def _task(name: str, entry: Mapping[str, Any]) -> TaskEntry:
    own = _settings(f"tasks.{name}", _mapping(entry, "settings"))
    methods = _by_method(f"tasks.{name}", _mapping(entry, "methods"))
    with _within(f"tasks.{name}"):
        _check_parts(entry, TaskEntry)
        if "data" not in entry:
            raise UsageError("the task needs 'data'")
        return TaskEntry(**{**entry, "settings": own, "methods": methods})


def _scored(data: str) -> str:
    """The part of a specification that names the scored images."""
    kind, _, name = data.partition("/")
    parts = name.split("/")
    return f"{kind}/{parts[0]}/{parts[-1]}" if kind in BENCHMARKS else data


def _variants(entries: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    made = {}
    for label in entries:
        values = _mapping(entries, label)
        method = choose(f"method of the variant {label}", values.pop("method", "sa2vp"), METHODS)
        made[label] = {"method": method, **_settings(f"variants.{label}", values, method)}
    return made


def _grids(entries: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    made = _by_method("grids", {name: grid for name, grid in entries.items() if name != ANY})
    if ANY in entries:
        made[ANY] = _settings(f"grids.{ANY}", _mapping(entries, ANY))
    for method, grid in made.items():
        for name, values in grid.items():
            if not isinstance(values, list) or not values:
                raise UsageError(f"grids.{method}.{name} must be a list of values, not {values!r}")
    return made


def chosen(kind: str, wanted: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """The requested names; all names by default.

    Raises:
        UsageError: a name is unknown or occurs twice.
    """
    if wanted is None:
        return list(known)
    names = [choose(kind, name, known) for name in wanted]
    if not names:
        raise UsageError(f"the list of {kind}s is empty; known: {', '.join(known)}")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"the {kind} {twice} is named twice")
    return names
