"""Results that a run keeps: the best checkpoint, the state to resume from, figures and pictures."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prompttune.errors import UsageError
from prompttune.evaluation.plots import save_png
from prompttune.files import write_json
from prompttune.training import state as states
from prompttune.training.optim import optimizer_tensors, restore_optimizer
from prompttune.training.report import TensorBoard, metrics_document
from prompttune.training.state import Progression, RunFolder, Saved

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from prompttune.model import PromptModel
    from prompttune.task_types import Result
    from prompttune.training.config import TrainConfig

SHARE_OF_WRITING = 0.05
"""Largest share of the time that short epochs spend on writing."""
LONGEST_UNWRITTEN_S = 10.0
"""Seconds after which the next finished epoch is written, whatever that costs."""


class RunWriter:
    """Holds a run's progress and its best parameters, and writes the run folder; only the first process writes.

    Epochs that end shortly after a write are kept in memory until the next write, or until the run ends in any way.
    """

    def __init__(
        self,
        config: TrainConfig,
        fabric: Fabric,
        model: PromptModel,
        optimizer: torch.optim.Optimizer,
        identity: dict[str, Any],
    ) -> None:
        self.config, self.fabric, self.model = config, fabric, model
        self.optimizer, self.identity = optimizer, identity
        self.folder = RunFolder.of(config.output)
        self.settings = config.to_flat()
        self.measures = model.task_type.measures
        self.parameters, self.trained = model.task_parameters(), list(model.trained_parameters())
        self.progression = Progression()
        self.best: dict[str, Tensor] = {}
        self._tensorboard: TensorBoard | None = None
        self._unwritten: Saved | None = None
        """State after the last finished epoch, while it is not on the disk."""
        self._best_is_new, self._written, self._cost = False, 0.0, 0.0
        """Whether the best parameters are not on the disk; time of the last write, and its seconds."""

    def begin(self, saved: Saved | None) -> None:
        """Start from the beginning, or resume from a saved state.

        A resumed run writes the best checkpoint again, since the run may have been killed between two of its files.

        Raises:
            UsageError: the state belongs to another backbone or other data.
        """
        if saved is not None:
            if names := [name for name, value in self.identity.items() if saved.identity.get(name) != value]:
                raise UsageError(f"cannot resume {self.folder.path}: {' and '.join(names)} changed since it began")
            self.progression, self.best = saved.progression, saved.best
            self.progression.status = "running"  # a run that was over is extended
            if self.best:
                self.load_best()
                self._save_best(self.progression)
            self._load(saved.task)
            restore_optimizer(self.optimizer, self.trained, saved.optimizer)
            self.fabric.strategy.precision.load_state_dict(saved.scaler)
        if not self.fabric.is_global_zero:
            return
        if saved is None:
            self.folder.clear()
            states.save(self.folder.last, self.snapshot())  # save first, so that the run can always be resumed
        self.folder.write_settings(self.settings)
        if self.config.tensorboard:
            self._tensorboard = TensorBoard(self.folder.tensorboard, self.progression.epoch, self.measures)

    def end_epoch(self, record: dict[str, Any], result: Result | None) -> bool:
        """Record a finished epoch, write everything if it is time to; return whether it is the best so far."""
        progression = self.progression
        progression.epoch += 1
        progression.seconds += record["seconds"]
        progression.history.append(record)
        is_best = result is not None and progression.judge(
            getattr(result, self.measures.score),
            getattr(result, self.measures.second),
            math.nan if result.loss is None else result.loss,
        )
        if is_best:
            self.best, self._best_is_new = self._copy(), True
        if self._tensorboard is not None:
            self._tensorboard.add(record)
        if self.fabric.is_global_zero:
            self._unwritten = self.snapshot()
            if time.monotonic() - self._written >= min(self._cost / SHARE_OF_WRITING, LONGEST_UNWRITTEN_S):
                self.flush()
            else:
                self._unwritten = self._unwritten.frozen()
        return is_best

    def flush(self) -> None:
        """Write the last finished epoch, unless it is on the disk: a new best checkpoint, state and figures."""
        if (saved := self._unwritten) is None:
            return
        began = time.monotonic()
        if self._best_is_new and saved.best:
            current = self._copy()
            self._load(saved.best)
            self._save_best(saved.progression)
            self._load(current)
        states.save(self.folder.last, saved)
        self._write_metrics(saved.progression)
        self._unwritten, self._best_is_new, self._written = None, False, time.monotonic()
        self._cost = self._written - began

    def rewind(self) -> None:
        """Drop the optimiser's state and the best parameters: the method has gone back to its beginning."""
        self.optimizer.state.clear()
        self.progression.rewind()
        self.best = {}

    def load_best(self) -> None:
        """Load the best parameters into the model."""
        self._load(self.best)

    def snapshot(self) -> Saved:
        """Everything needed to resume from here, with tensors copied and the progress by reference."""
        tensors, scalars = optimizer_tensors(self.optimizer, self.trained)
        return Saved(
            progression=self.progression,
            settings=self.settings,
            identity=self.identity,
            task=self._copy(),
            best=self.best,
            optimizer={**tensors, **scalars},
            scaler=self.fabric.strategy.precision.state_dict(),
        )

    def finish(self, last: Saved, result: Result, status: str) -> None:
        """Write the final figures and pictures of the best checkpoint, then mark the run as over.

        The mark comes last, so a run that is killed in between repeats this part.
        """
        from prompttune.training.plots import plot_curves

        self.progression.status = status
        if self.fabric.is_global_zero:
            plot_curves(self.folder.curves, self.progression.history, self.measures)
            save_png(self.model.task_type.figure(result), self.folder.confusion)
            self._write_metrics(self.progression, result.to_dict())
            states.save(self.folder.last, last)
        self.close()

    def close(self) -> None:
        """Write what is not on the disk yet, and close TensorBoard's files."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        self.flush()

    def _save_best(self, progression: Progression) -> None:
        """Write the checkpoint; the model must hold the best parameters."""
        if self.fabric.is_global_zero:
            self.model.save(self.folder.path, progression.best_metrics(self.measures))

    def _write_metrics(self, progression: Progression, final: dict[str, Any] | None = None) -> None:
        head = sum(parameter.numel() for parameter in self.model.head.parameters())
        run = self.identity | {"parameters_left": head + self.model.method.parameters_left()}
        document = metrics_document(progression, self.settings, run, self.measures, self.fabric.device, final)
        write_json(self.folder.metrics, document)

    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    def _load(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])
