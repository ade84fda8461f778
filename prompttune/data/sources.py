"""From what a user names to a data set in two splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from prompttune.data.base import DataSplits
from prompttune.data.benchmarks import KINDS as BENCHMARK_KINDS
from prompttune.data.benchmarks import load_benchmark
from prompttune.data.builtin import load_builtin
from prompttune.data.folder import load_folder
from prompttune.data.roots import HUB_PREFIX
from prompttune.data.splitting import at_most
from prompttune.data.table import load_table
from prompttune.errors import DataError, UsageError


def load_data(
    spec: str, *, val_fraction: float = 0.2, seed: int = 0, root: str | None = None, limit: int | None = None
) -> DataSplits:
    """Load a data set.

    Args:
        spec: ``demo/NAME`` (built in), ``torch/NAME``, ``hfds/NAME`` or ``wds/NAME`` (timm's data set factory),
            ``vtab/…``, ``fgvc/…`` or ``tv/…`` (see :mod:`prompttune.data.benchmarks`), a ``.csv`` file or a
            folder of images. A folder whose own name begins so is written ``./demo/…``.
        val_fraction: share of each class held out where the data have no validation split of their own.
        seed: seed of that split, and of the choice that ``limit`` makes.
        root: folder that a relative path belongs to, and that timm's data sets are kept in.
        limit: use at most so many images of each split, each class represented if there are enough.

    Raises:
        UsageError: an unknown name, a fraction or a limit out of range.
        DataError: the data are missing, empty or contradict themselves; one line that says what to do.
        MissingExtraError: a library of the extra ``data`` is needed.
    """
    if not 0.0 < val_fraction < 1.0:
        raise UsageError(f"val_fraction must be above 0 and below 1, not {val_fraction}")
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, not {limit}")
    splits = _load(spec, val_fraction, seed, root)
    train, val = at_most(splits.train, limit, seed), at_most(splits.val, limit, seed)
    return dataclasses.replace(splits, train=train, val=val, name=spec)


def _load(spec: str, val_fraction: float, seed: int, root: str | None) -> DataSplits:
    kind, _, name = spec.partition("/")
    if kind == "demo":
        return load_builtin(name)
    if root is not None and root.startswith(HUB_PREFIX) and kind not in BENCHMARK_KINDS:
        raise UsageError(f"{root}: data of {', '.join(f'{one}/NAME' for one in BENCHMARK_KINDS)} are read from there; "
                         f"hfds/OWNER/NAME reads a data set of the hub, {spec} does not")  # fmt: skip
    if kind.lower() in _FACTORY and name:
        return _FACTORY[kind.lower()](name, root, val_fraction, seed)
    path = Path(root or "").expanduser() / Path(spec).expanduser()
    if path.suffix.lower() == ".csv":
        return load_table(path, val_fraction, seed)
    if not path.is_dir():
        raise DataError(f"no data at {path}; give a folder of images, a .csv file, demo/NAME, "
                        f"{', '.join(f'{kind}/NAME' for kind in _FACTORY)}")  # fmt: skip
    return load_folder(path, val_fraction, seed)


def _load_torch(name: str, root: str | None, val_fraction: float, seed: int) -> DataSplits:
    from prompttune.data.timm_factory import load_torch

    return load_torch(name, root, val_fraction, seed)


def _load_hfds(name: str, root: str | None, val_fraction: float, seed: int) -> DataSplits:
    from prompttune.data.timm_factory import load_hfds

    return load_hfds(name, root, val_fraction, seed)


def _load_wds(name: str, root: str | None, val_fraction: float, seed: int) -> DataSplits:
    from prompttune.data.shards import load_wds

    return load_wds(name, root, val_fraction, seed)


def _load_benchmark(kind: str) -> Callable[[str, str | None, float, int], DataSplits]:
    def load(name: str, root: str | None, val_fraction: float, seed: int) -> DataSplits:  # noqa: ARG001
        return load_benchmark(kind, name, root)

    return load


_FACTORY: dict[str, Callable[[str, str | None, float, int], DataSplits]] = {
    "torch": _load_torch,
    "hfds": _load_hfds,
    "wds": _load_wds,
    **{kind: _load_benchmark(kind) for kind in BENCHMARK_KINDS},
}
