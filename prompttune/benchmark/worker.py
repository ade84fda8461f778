"""One run of a plan, in this process or in its own worker."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompttune.benchmark.plan import ERROR, RECORD_FILE, RunSpec, train_again
from prompttune.errors import CheckpointError, DivergedError, TrainingError, UsageError, describe_failure
from prompttune.files import write_json
from prompttune.training.progress import OnProgress, Progress

if TYPE_CHECKING:
    from prompttune.backbones import Backbone

Backbones = dict[tuple[str, int | None, str], "Backbone"]
"""Loaded backbones of a process by name, image size and weights; only the last one is kept."""
SHARE_STEP = 0.01
"""Smallest share of a run between two progress messages of a worker."""
_OVERWRITE = "; start again with --overwrite"
"""End of resume errors, which names an option that a benchmark does not have."""


def run_one(spec: RunSpec, output: Path, backbones: Backbones, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Train or resume a run and write its record; return the row of figures.

    The checkpoint of the last epoch counts, whatever the results of earlier epochs: the protocol validates only after
    it. The state for resuming is removed once the record is written. A diverged candidate also has a result, a record
    without figures: it would diverge again.
    """
    from prompttune.backbones import load_backbone
    from prompttune.training.loop import train
    from prompttune.training.state import RunFolder

    config = spec.config(output)
    key = (config.backbone, config.image_size, config.weights)
    if key not in backbones:
        backbones.clear()
        backbones[key] = load_backbone(*key)
    backbone = backbones[key]
    folder = RunFolder.of(config.output)
    try:
        metrics = train(config, backbone, resume=True, on_progress=on_progress).metrics
        width = config.method_config().build(backbone).width
        row = {**_identity(spec), **_figures(backbone, width, metrics)}
    except DivergedError as problem:
        if spec.candidate is None:
            advice = f"give a lower lr or grad_clip=1 with --set or a recipe and {train_again(folder.path)}"
            raise TrainingError(f"{problem.what}; {advice}") from None
        row = {**_identity(spec), ERROR: problem.what}
    except (CheckpointError, UsageError) as problem:
        raise _told_here(problem, folder.path) from None
    write_json(folder.path / RECORD_FILE, row)
    folder.last.unlink(missing_ok=True)
    return row


def _told_here(problem: CheckpointError | UsageError, folder: Path) -> CheckpointError | UsageError:
    """A run's error without the options of ``prompttune train``, which a benchmark does not have."""
    text = str(problem)
    if str(folder) not in text:  # the error is not about the folder's content
        return problem
    return type(problem)(f"{text.removesuffix(_OVERWRITE)}; {train_again(folder)}")


def _identity(spec: RunSpec) -> dict[str, Any]:
    """What a record says about every run."""
    return {
        "protocol": spec.protocol,
        "group": spec.group,
        "task": spec.task,
        "label": spec.label,
        "method": spec.settings["method"],
        "seed": spec.seed,
        "settings_digest": spec.digest,
    }


def _figures(backbone: Backbone, width: int, metrics: dict[str, Any]) -> dict[str, Any]:
    classes = len(metrics["run"]["classes"])
    head = classes * (width + 1)
    trained = metrics["run"]["task_parameters"]
    frozen = sum(parameter.numel() for parameter in backbone.model.parameters())
    versions = metrics["versions"]
    return {
        "accuracy": metrics["final"]["top1"],
        "test_images": metrics["final"]["n"],
        "train_images": metrics["run"]["train_images"],
        "classes": classes,
        "trainable_parameters": trained,
        "parameters_beside_head": trained - head,
        "backbone_parameters": frozen,
        "share_of_backbone": (trained - head) / frozen,
        "epochs": len(metrics["history"]),
        "seconds": metrics["wall_seconds"],
        "backbone": backbone.name,
        "image_size": backbone.image_size,
        "fingerprint": backbone.fingerprint,
        "prompttune": versions["prompttune"],
        "torch": versions["torch"],
        "timm": versions["timm"],
        "device": versions["device"],
    }


def share_teller(tell: Callable[[float], None]) -> OnProgress:
    """Turn a run's news into its finished share, reported in steps."""
    told = 0.0

    def on_progress(news: Progress) -> None:
        nonlocal told
        if news.phase == "train" and news.epochs and news.steps:
            share = (news.epoch - 1 + news.step / news.steps) / news.epochs
            if share >= told + SHARE_STEP:
                told = share
                tell(share)

    return on_progress


def serve_runs(channel: Connection, output: Path, threads: int) -> None:
    """Main loop of a worker process: the channel brings runs and takes shares and rows; None ends the loop."""
    import torch

    torch.set_num_threads(threads)
    backbones: Backbones = {}
    while True:
        try:
            spec = channel.recv()
        except (EOFError, ConnectionResetError):
            return
        if spec is None:
            return
        try:
            row = run_one(spec, output, backbones, share_teller(lambda share: channel.send(("share", share))))
            channel.send(("row", row))
        except BrokenPipeError:
            return
        except Exception as problem:  # any error belongs to this run
            channel.send(("error", describe_failure(problem)))


def _follow(parent: int) -> None:
    """End the worker with its parent: otherwise it would train into folders that the next call resumes."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main(descriptor: int, parent: int, threads: int, output: str) -> None:
    """Main function of ``python -m prompttune.benchmark``; see :func:`prompttune.benchmark.runner.execute`."""
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    try:
        serve_runs(Connection(descriptor), Path(output), threads)
    except KeyboardInterrupt:
        sys.exit(130)  # Ctrl-C also reaches the workers; the parent reports it
