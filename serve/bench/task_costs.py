"""Costs of a task in an open engine: adding it, switching between two tasks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from prompttune.errors import UsageError
from prompttune.serve.bench.report import Adding, Switching
from prompttune.serve.bench.subjects import noise
from prompttune.serve.bench.timing import Latency, Ratio, Rounds, interleaved
from prompttune.serve.engine import Engine

SWITCHING_CALLS = 4
"""Number of calls in one round of the switching measurement; even, so that both tasks have the same number."""
ADDED_CHECKPOINTS = 3
"""Number of times that a checkpoint is added; folding takes seconds on a large backbone."""


def measure_switching(engine: Engine, tasks: Sequence[str], rounds: Rounds, seed: int = 0) -> Switching | None:
    """Time calls of one row, A B A B against A A A A, with A and B the first of ``tasks``; None for a single task."""
    if len(tasks) < 2:
        return None
    first, second = tasks[:2]
    images = noise(1, engine.image_size, seed)

    def calls(names: Sequence[str]) -> None:
        for name in names:
            engine.logits(images, name)

    rows = {"same": [first] * SWITCHING_CALLS, "alternating": [first, second] * (SWITCHING_CALLS // 2)}
    seconds = interleaved({name: partial(calls, names) for name, names in rows.items()}, rounds)
    each = {name: [value / SWITCHING_CALLS for value in values] for name, values in seconds.items()}
    over = Ratio.of(each["alternating"], each["same"])
    return Switching((first, second), SWITCHING_CALLS, Latency.of(each["same"]), Latency.of(each["alternating"]), over)


def measure_adding(
    engine: Engine, rounds: Rounds, checkpoint: str | Path | None = None, weights: str | Path | None = None
) -> Adding | None:
    """Time making one more task resident: a copy of the engine's first one under another name. No file is written.

    Args:
        engine: the engine, which is unchanged afterwards, except for room for one more task.
        rounds: numbers of warm-up and measured rounds.
        checkpoint: checkpoint whose adding is timed too.
        weights: source of the backbone's weights.

    Returns:
        The times; None if the tasks are part of the model.

    Raises:
        UsageError: a checkpoint is given, but the tasks are part of the model.
    """
    if engine.folder.manifest.baked is not None:
        if checkpoint is not None:
            raise UsageError(f"{engine.folder.path} holds its tasks as constants: a checkpoint cannot be added")
        return None
    bank = engine.bank
    task = engine.folder.read_task(engine.folder.tasks()[0])
    name = next(one for one in map("bench-{}".format, itertools.count()) if one not in bank.entries)

    def timed(add: Callable[[], None]) -> float:
        began = time.perf_counter()
        add()
        seconds = time.perf_counter() - began
        engine.remove_task(name, save=False)
        return seconds

    state = [timed(lambda: bank.put(name, task)) for _ in range(rounds.warmup + rounds.repeats)]
    folded = Latency.of(state[rounds.warmup :])
    if checkpoint is None:
        return Adding(folded, None, None)
    first, *others = (
        timed(lambda: engine.add_task(name, checkpoint, save=False, parity=False, weights=weights))
        for _ in range(1 + ADDED_CHECKPOINTS)
    )
    return Adding(folded, Latency.of(others), first)
