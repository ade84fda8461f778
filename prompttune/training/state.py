"""The run folder: its files, and the file from which a stopped run is resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prompttune.checkpoints.format import CARD_FILE, CONFIG_FILE, MODEL_FILE
from prompttune.errors import CheckpointError, UsageError
from prompttune.files import replacing, visible, write_text
from prompttune.task_types import ClassificationConfig, Measures

FORMAT_VERSION = 1
HELD_OUT_FILE = "held_out.json"
_METADATA = "prompttune"
_FORMER = {"best_top1": "best_score", "best_top5": "best_second"}
"""Names of the best figures in files of earlier releases."""
_TASK, _BEST, _OPTIMIZER = "task", "best", "optimizer"


@dataclass
class Progression:
    """Progress of a run, apart from tensors."""

    epoch: int = 0
    """Number of finished epochs."""
    best_epoch: int = 0
    """Epoch of the best validation, counted from 1; 0 before the first."""
    best_score: float = -1.0
    """Score of the best validation, such as top-1; see :class:`Measures`."""
    best_second: float = -1.0
    """Second figure of the best validation, such as top-5."""
    best_loss: float = float("inf")
    stale: int = 0
    """Number of validations since the score last rose."""
    rewound: int = 0
    """Number of finished epochs at the last rewind, where the schedule starts again; 0 for never."""
    status: str = "running"
    """``running``, ``finished`` or ``stopped early``."""
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    """Records of the epochs."""
    corrupt: list[str] = field(default_factory=list)
    """One line for each image that could not be read."""

    def judge(self, score: float, second: float, loss: float) -> bool:
        """Record a validation of this epoch; return whether it is the best, by its score, then by its loss."""
        self.stale = 0 if score > self.best_score else self.stale + 1
        if (score, -loss) <= (self.best_score, -self.best_loss):
            return False
        self.best_epoch, self.best_score, self.best_second, self.best_loss = self.epoch, score, second, loss
        return True

    def rewind(self) -> None:
        """Start again after the current epoch: earlier best values belong to a model that does not exist any more."""
        self.rewound, self.stale = self.epoch + 1, 0
        self.best_epoch, self.best_score, self.best_second, self.best_loss = 0, -1.0, -1.0, float("inf")

    def best_metrics(self, measures: Measures = ClassificationConfig.measures) -> dict[str, Any]:
        """Figures of the best validation, as its checkpoint names them."""
        return {
            f"val_{measures.score}": self.best_score,
            f"val_{measures.second}": self.best_second,
            "val_loss": self.best_loss,
            "epoch": self.best_epoch,
        }

    @property
    def is_over(self) -> bool:
        """Whether the run has ended."""
        return self.status != "running"

    def goes_on(self, epochs: int, patience: int | None) -> bool:
        """Whether a run of this many epochs continues, with patience left."""
        return self.epoch < epochs and (patience is None or self.stale < patience)


@dataclass
class Saved:
    """Content of ``last.safetensors``."""

    progression: Progression
    settings: dict[str, Any]
    """The run's settings, flat."""
    identity: dict[str, Any]
    """Identity of the run besides its settings: the backbone's fingerprint, the classes, the number of images."""
    task: dict[str, Tensor]
    best: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]

    def frozen(self) -> Saved:
        """The same in memory of its own, which the steps of later epochs do not change."""
        progression = replace(self.progression, history=list(self.progression.history))
        optimizer = {
            name: value.to("cpu", copy=True) if isinstance(value, Tensor) else value
            for name, value in self.optimizer.items()
        }
        return replace(self, progression=progression, optimizer=optimizer)


def save(path: Path, saved: Saved) -> None:
    """Write ``last.safetensors`` atomically: the old file stays until the new one is complete."""
    groups = {
        _TASK: saved.task,
        _BEST: saved.best,
        _OPTIMIZER: {name: value for name, value in saved.optimizer.items() if isinstance(value, Tensor)},
    }
    # contiguous copies: safetensors refuses tensors that share memory
    tensors = {
        f"{group}/{name}": value.detach().cpu().contiguous().clone()
        for group, values in groups.items()
        for name, value in values.items()
    }
    document = {
        "format_version": FORMAT_VERSION,
        "progression": asdict(saved.progression),
        "settings": saved.settings,
        "identity": saved.identity,
        "optimizer": {name: value for name, value in saved.optimizer.items() if not isinstance(value, Tensor)},
        "scaler": saved.scaler,
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={_METADATA: json.dumps(document)})


def load(path: Path) -> Saved:
    """Read ``last.safetensors``.

    Raises:
        CheckpointError: the file is damaged, or was not written by this package.
    """
    groups: dict[str, dict[str, Any]] = {_TASK: {}, _BEST: {}, _OPTIMIZER: {}}
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads(file.metadata()[_METADATA])
            for key in file.keys():  # noqa: SIM118  (no mapping: it has no iterator)
                group, _, name = key.partition("/")
                groups[group][name] = file.get_tensor(key)
        if document["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format {document['format_version']}, this version reads {FORMAT_VERSION}"
            )
        return Saved(
            progression=Progression(**{_FORMER.get(name, name): one for name, one in document["progression"].items()}),
            settings=document["settings"],
            identity=document["identity"],
            task=groups[_TASK],
            best=groups[_BEST],
            optimizer={**groups[_OPTIMIZER], **document["optimizer"]},
            scaler=document["scaler"],
        )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as problem:
        raise CheckpointError(f"{path} is damaged ({problem}); start again with --overwrite") from None


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run folder's files. The best checkpoint is at its root."""

    path: Path

    @classmethod
    def of(cls, output: str) -> RunFolder:
        """The folder of ``TrainConfig.output``."""
        return cls(Path(output).expanduser())

    @property
    def last(self) -> Path:
        """State after the last finished epoch."""
        return self.path / "last.safetensors"

    @property
    def settings(self) -> Path:
        """All settings, for ``--config``."""
        return self.path / "train_config.yaml"

    @property
    def metrics(self) -> Path:
        """History and final figures."""
        return self.path / "metrics.json"

    @property
    def curves(self) -> Path:
        """Picture of the history."""
        return self.path / "curves.png"

    @property
    def confusion(self) -> Path:
        """Picture of the confusion matrix."""
        return self.path / "confusion_matrix.png"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    def check(self, *, resume: bool, overwrite: bool) -> bool:
        """Whether ``last.safetensors`` exists to resume from; no file is changed.

        Raises:
            UsageError: the folder is not empty and neither ``resume`` nor ``overwrite`` is set; or it has nothing to
                resume; or it does not hold a run that could be overwritten.
        """
        if resume and overwrite:
            raise UsageError("resume and overwrite contradict each other: give one")
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"the output {self.path} is a file, not a folder")
        if resume and self.last.exists():
            return True
        # a run that was killed while it wrote leaves temporary files, whose names start with a dot
        if not self.path.exists() or not any(visible(self.path)):
            return False
        if resume:
            raise UsageError(f"{self.path} holds no last.safetensors to resume from; start again with --overwrite")
        if not overwrite:
            raise UsageError(f"the output {self.path} is not empty; give --resume or --overwrite, or another folder")
        if not any(mark.exists() for mark in (self.last, self.settings, self.path / CONFIG_FILE)):
            raise UsageError(f"{self.path} holds files but no run that could be overwritten; give another folder")
        return False

    def clear(self) -> None:
        """Create the folder, or remove the files of an earlier run in it and nothing else."""
        self.path.mkdir(parents=True, exist_ok=True)
        names = [file.name for file in (self.last, self.settings, self.metrics, self.curves, self.confusion)]
        for name in (*names, HELD_OUT_FILE, CONFIG_FILE, MODEL_FILE, CARD_FILE):
            (self.path / name).unlink(missing_ok=True)
            for leftover in self.path.glob(f".{name}.*"):
                leftover.unlink()
        shutil.rmtree(self.tensorboard, ignore_errors=True)

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Write ``train_config.yaml``."""
        import yaml

        head = "# settings of this run; train with them again: prompttune train --config train_config.yaml\n"
        write_text(self.settings, head + yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
