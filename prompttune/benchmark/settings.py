"""Settings of ``prompttune benchmark``, from which its options are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prompttune.benchmark.recipe import SEED_LIMIT, check_open
from prompttune.errors import UsageError, choose
from prompttune.settings import setting
from prompttune.training.config import known_names

RESERVED = {
    "output": "--output",
    "seed": "--seeds",
    "method": "--methods",
    "data": "--tasks",
    "data_root": "--data-root",
}
"""Settings with their own option here."""
Change = tuple[str, Any]


def read_change(text: str | Change) -> Change:
    """A setting from ``name=value``, whose value is read as in YAML; one that has been read stays as it is."""
    if not isinstance(text, str):
        return text
    name, equals, value = text.partition("=")
    name = choose("setting", name.strip().replace("-", "_"), known_names())
    if not equals:
        raise UsageError(f"--set takes name=value, not {text!r}")
    if name in RESERVED:
        raise UsageError(f"--set {name}: use {RESERVED[name]}")
    try:
        made = yaml.safe_load(value)
    except Exception as problem:  # errors of YAML, and of Python for invalid numbers and dates
        raise UsageError(f"--set {text}: cannot read the value: {' '.join(str(problem).split())}") from None
    check_open(name, made)
    return name, made


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """What to compare, where, and with which settings instead of the recipe's."""

    methods: tuple[str, ...] | None = setting(None, "Methods to compare.", shown="all", metavar="A,B,…")
    variants: tuple[str, ...] | None = setting(None, "Variants to compare.", shown="all", metavar="A,B,…")
    data_root: str | None = setting(
        None, "Folder of the data sets, or hf://datasets/OWNER/NAME[@REVISION][/FOLDER] for one on the hub.",
        metavar="PLACE",
    )  # fmt: skip
    skip_missing: bool = setting(False, "Skip missing data sets.")
    download: bool = setting(False, "Download missing torchvision data sets into the folder.")
    tasks: tuple[str, ...] | None = setting(None, "Tasks of the protocol.", shown="all", metavar="A,B,…")
    seeds: tuple[int, ...] | None = setting(
        None, "Seeds of the runs.", low=0, below=SEED_LIMIT, shown="the recipe's", metavar="0,1,…"
    )
    output: Path | None = setting(None, "Folder of the benchmark.", short="-o", path="folder")
    jobs: int | None = setting(
        None, "Number of concurrent runs, which share the CPU cores.", low=1,
        shown="a core each, 4 at most; 1 on a GPU",
    )  # fmt: skip
    backbone: str | None = setting(None, "timm name of the backbone; replaces the recipe's.", metavar="NAME")
    backbone_arg: tuple[str, ...] = setting(
        (), "Argument of the timm model, such as init_values=1e-5; may be repeated.", repeat=True, metavar="NAME=VALUE"
    )
    image_size: int | None = setting(None, "Side of the input in pixels; replaces the recipe's.", low=1)
    weights: str | None = setting(None, "auto, random, random:SEED or a file; replaces the recipe's.", metavar="SOURCE")
    device: str | None = setting(None, "Device: auto, cpu, cuda or cuda:INDEX.")
    changes: tuple[Change, ...] = setting(
        (), "Setting of `prompttune train` for every run whose method has it; may be repeated.",
        option="set", kind=tuple[str, ...], read=read_change, repeat=True, metavar="NAME=VALUE",
    )  # fmt: skip
    recipe: Path | None = setting(None, "YAML file that replaces the package's recipe.", path="file")
    dry_run: bool = setting(False, "Print the runs and their state; do not train or download.")
    table_only: bool = setting(False, "Tabulate and plot the finished runs; do not train or download.")
    latency: bool = setting(True, "At the end, time each method's forward next to the plain backbone's.")

    def __post_init__(self) -> None:
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise UsageError("seeds must be different whole numbers, such as 0,1,2")

    @property
    def overrides(self) -> dict[str, Any]:
        """Settings of the runs that replace the recipe's."""
        named = ("data_root", "backbone", "backbone_arg", "image_size", "weights", "device")
        return {name: value for name in named if (value := getattr(self, name)) not in (None, ())} | dict(self.changes)
