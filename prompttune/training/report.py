"""Files of a run for people: ``metrics.json``, TensorBoard curves, pictures."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch

from prompttune.version import __version__

if TYPE_CHECKING:
    from prompttune.task_types import Measures
    from prompttune.training.state import Progression


def versions(device: torch.device) -> dict[str, str]:
    """Versions and hardware that affect a result."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    return {
        "prompttune": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "lightning": metadata.version("lightning"),
        "python": platform.python_version(),
        "device": f"{device.type} ({hardware}), {torch.get_num_threads()} threads",
    }


def metrics_document(
    progression: Progression,
    settings: dict[str, Any],
    identity: dict[str, Any],
    measures: Measures,
    device: torch.device,
    final: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of ``metrics.json``; ``final`` is the evaluation of the best checkpoint, if it exists."""
    done = progression.best_epoch > 0
    return {
        "status": progression.status,
        "best": {
            "epoch": progression.best_epoch,
            measures.score: progression.best_score,
            "loss": progression.best_loss,
        }
        if done
        else None,
        "final": final,
        "wall_seconds": round(progression.seconds, 3),
        "history": progression.history,
        "corrupt_images": progression.corrupt,
        "settings": settings,
        "run": identity,
        "versions": versions(device),
    }


class TensorBoard:
    """TensorBoard's event files of a run."""

    def __init__(self, folder: Path, epochs_done: int, measures: Measures) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # marks the events of a killed run's unfinished epoch as void
        self._writer = SummaryWriter(str(folder), purge_step=epochs_done + 1)
        self._measures = measures

    def add(self, record: dict[str, Any]) -> None:
        """Write one epoch's record."""
        measures = self._measures
        names = {
            "train_loss": "loss/train",
            "val_loss": "loss/validation",
            f"train_{measures.train}": f"{measures.train}/train",
            f"val_{measures.score}": f"{measures.score}/validation",
            "lr": "learning_rate",
            "images_per_second": "images_per_second",
        }
        for key, name in names.items():
            if record[key] is not None:
                self._writer.add_scalar(name, record[key], record["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
