"""Classifying many image files: decode in threads, run in batches, answer in order."""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from prompttune.errors import DataError, UsageError
from prompttune.export.runtimes import Array
from prompttune.images import is_image, read_image
from prompttune.preprocess import Preprocess
from prompttune.serve.engine import TOP_K, Engine, Prediction

BATCH_SIZE = 32
WORKERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Result:
    """The answer for one image and one task, or why there is none."""

    source: str
    task: str
    task_version: str
    prediction: Prediction | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The row of a JSON lines file; its keys are the same whether or not there was an error."""
        answer = self.prediction
        return {
            "source": self.source,
            "task": self.task,
            "task_version": self.task_version,
            "label": answer.label if answer else None,
            "probability": answer.probability if answer else None,
            "top_k": [score._asdict() for score in answer.top_k] if answer else [],
            "error": self.error,
        }


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Image files in the order of ``inputs``: files, folders (all images below, sorted) and glob patterns.

    A file that is named is taken whatever its extension.

    Raises:
        UsageError: an input that does not exist, a pattern that matches nothing.
        DataError: a folder without images.
    """
    found: list[Path] = []
    for one in inputs:
        path = Path(one)
        if path.is_dir():
            below = list(_images_below(path))
            if not below:
                raise DataError(f"no images below {path}")
            found += below
        elif path.exists():
            found.append(path)
        elif glob.has_magic(one):
            matches = [Path(match) for match in sorted(glob.glob(one, recursive=True))]  # noqa: PTH207  # Path.glob takes no absolute pattern
            files = [match for match in matches if match.is_file()]
            if not files:
                raise UsageError(f"nothing matches {one}")
            found += files
        else:
            raise UsageError(f"no file or folder {one}")
    return found


def _images_below(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(parent) / name for name in sorted(files) if is_image(name))


@dataclass(frozen=True)
class _Decoded:
    """An image through each of the transforms asked for, or why it cannot be read."""

    arrays: dict[Preprocess, Array]
    error: str | None = None


def classify_files(
    engine: Engine,
    paths: Sequence[Path],
    tasks: Sequence[str],
    *,
    batch_size: int = BATCH_SIZE,
    top_k: int = TOP_K,
    workers: int = WORKERS,
) -> Generator[Result, None, None]:
    """Answer for each image and each task, in order: first image, first task; first image, second task; and so on.

    An image is decoded once, whatever the number of tasks. At most a few batches are held at a time. An image that
    cannot be read gives results with an error; the others go on.

    Args:
        engine: an open engine.
        paths: image files.
        tasks: which tasks, for every image.
        batch_size: rows of one call.
        top_k: classes of a result at most.
        workers: threads that decode.

    Raises:
        UsageError: an unknown task, or a size below 1.
    """
    if batch_size < 1 or workers < 1:
        raise UsageError("batch size and workers must be at least 1")
    preprocess = {task: engine.preprocess(task) for task in tasks}
    transforms = {one: engine.transform(one) for one in preprocess.values()}

    def decode(path: Path) -> _Decoded:
        try:
            image = read_image(path)
            return _Decoded({one: transform(image).numpy() for one, transform in transforms.items()})
        except (OSError, ValueError) as problem:
            return _Decoded({}, str(problem))

    pending: list[tuple[str, str, Array | str]] = []
    for path, decoded in _in_order(decode, paths, workers, 2 * batch_size):
        for task in tasks:
            pending.append((str(path), task, decoded.error or decoded.arrays[preprocess[task]]))
            if len(pending) == batch_size:
                yield from _classify(engine, pending, top_k)
                pending = []
    yield from _classify(engine, pending, top_k)


def _in_order(
    decode: Callable[[Path], _Decoded], paths: Sequence[Path], workers: int, ahead: int
) -> Iterator[tuple[Path, _Decoded]]:
    """Decode in threads, at most ``ahead`` images before the one that is asked for."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    left = iter(paths)
    try:
        window: deque[tuple[Path, Future[_Decoded]]] = deque(
            (path, pool.submit(decode, path)) for path in islice(left, ahead)
        )
        while window:
            path, future = window.popleft()
            decoded = future.result()
            window.extend((following, pool.submit(decode, following)) for following in islice(left, 1))
            yield path, decoded
    finally:
        pool.shutdown(cancel_futures=True)


def _classify(engine: Engine, rows: Sequence[tuple[str, str, Array | str]], top_k: int) -> Iterator[Result]:
    """One call for the rows that could be decoded; a string in place of an image is its error."""
    images = [image for _, _, image in rows if not isinstance(image, str)]
    tasks = [task for _, task, image in rows if not isinstance(image, str)]
    answers = iter(engine.predict(np.stack(images), tasks, top_k) if images else [])
    for source, task, image in rows:
        if isinstance(image, str):
            yield Result(source, task, engine.version(task), error=image)
        else:
            answer = next(answers)
            yield Result(source, task, answer.task_version, answer)
