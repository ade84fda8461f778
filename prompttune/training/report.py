"""Files of a run for people: ``metrics.json``, TensorBoard curves, pictures."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch

from prompttune.training.measures import measures_for, measures_of
from prompttune.version import __version__

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

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
    device: torch.device,
    final: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of ``metrics.json``; ``final`` is the evaluation of the best checkpoint, if it exists."""
    done = progression.best_epoch > 0
    measures = measures_for(settings.get("task"))
    return {
        "status": progression.status,
        "best": {
            "epoch": progression.best_epoch,
            measures.score: progression.best_top1,
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
    """TensorBoard's event files of a run, or a stand-in that does nothing."""

    def __init__(self, folder: Path | None, epochs_done: int) -> None:
        self._writer: SummaryWriter | None = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            # marks the events of a killed run's unfinished epoch as void
            self._writer = SummaryWriter(str(folder), purge_step=epochs_done + 1)

    def add(self, record: dict[str, Any]) -> None:
        """Write one epoch's record."""
        if self._writer is None:
            return
        measures = measures_of(record)
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
        if self._writer is not None:
            self._writer.close()
