"""Options of ``prompttune benchmark`` and how their values are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml

from prompttune.benchmark.recipe import check_open, is_seed
from prompttune.errors import UsageError, choose
from prompttune.training.config import known_names

Command = TypeVar("Command", bound=Callable[..., Any])
SEED_DIGITS = 19
"""Number of digits of the largest seed; Python refuses to read a number of thousands of digits."""
RESERVED = {
    "output": "--output",
    "seed": "--seeds",
    "method": "--methods",
    "data": "--tasks",
    "data_root": "--data-root",
}
"""Settings with their own option here."""


def words(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Read ``A,B,…``."""
    return None if value is None else tuple(one.strip() for one in value.split(",") if one.strip())


def _seeds(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    seeds = [
        int(one) if one.isdecimal() and len(one) <= SEED_DIGITS else -1 for one in map(str.strip, value.split(","))
    ]
    if not all(map(is_seed, seeds)) or len(set(seeds)) < len(seeds):
        raise click.BadParameter("give different whole numbers below 2**63, such as 0,1,2")
    return tuple(seeds)


def _settings(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """Settings from ``name=value``; a value is read as in YAML."""
    made = {}
    for text in values:
        name, equals, value = text.partition("=")
        name = choose("setting", name.strip().replace("-", "_"), known_names())
        if not equals:
            raise UsageError(f"--set takes name=value, not {text!r}")
        if name in RESERVED:
            raise UsageError(f"--set {name}: use {RESERVED[name]}")
        made[name] = _value(text, value)
        check_open(name, made[name])
    return made


def _value(text: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except Exception as problem:  # errors of YAML, and of Python for invalid numbers and dates
        raise UsageError(f"--set {text}: cannot read the value: {' '.join(str(problem).split())}") from None


_OPTIONS = [
    click.option("--tasks", metavar="A,B,…", callback=words, help="Tasks of the protocol.  [default: all]"),
    click.option("--seeds", metavar="0,1,…", callback=_seeds, help="Seeds of the runs.  [default: the recipe's]"),
    click.option("--output", "-o", type=click.Path(path_type=Path, file_okay=False), help="Folder of the benchmark."),
    click.option("--jobs", type=click.IntRange(1), help="Number of concurrent runs, which share the CPU cores.   "
                 "[default: a core each, 4 at most; 1 on a GPU]"),
    click.option("--backbone", metavar="NAME", help="timm name of the backbone; replaces the recipe's."),
    click.option("--image-size", type=click.IntRange(1), help="Side of the input in pixels; replaces the recipe's."),
    click.option("--weights", metavar="SOURCE", help="auto, random, random:SEED or a file; replaces the recipe's."),
    click.option("--device", help="Device: auto, cpu, cuda or cuda:INDEX."),
    click.option("--set", "changes", multiple=True, metavar="NAME=VALUE", callback=_settings,
                 help="Setting of `prompttune train` for every run whose method has it; may be repeated."),
    click.option("--recipe", "recipe_file", type=click.Path(path_type=Path, dir_okay=False),
                 help="YAML file that replaces the package's recipe."),
    click.option("--dry-run", is_flag=True, help="Print the runs and their state; do not train or download."),
    click.option("--table-only", is_flag=True,
                 help="Tabulate and plot the finished runs; do not train or download."),
    click.option("--latency/--no-latency", default=True, show_default=True,
                 help="At the end, time each method's forward next to the plain backbone's."),
    click.option("--json", "as_json", is_flag=True, help="Print the table and all runs as JSON."),
    click.option("--quiet", is_flag=True, help="Show no progress."),
]  # fmt: skip
_DATA_OPTIONS = [
    click.option("--data-root", metavar="PLACE",
                 help="Folder of the data sets, or hf://datasets/OWNER/NAME[@REVISION][/FOLDER] for one on the hub."),
    click.option("--skip-missing", is_flag=True, help="Skip missing data sets."),
]  # fmt: skip


def common_options(command: Command) -> Command:
    """Add the options of every protocol."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def data_options(command: Command) -> Command:
    """Add the options of a protocol whose data are not built in."""
    for option in reversed(_DATA_OPTIONS):
        command = option(command)
    return command
