"""Training and evaluation: settings, the loop on Lightning Fabric, run folders."""

from prompttune.training.config import TrainConfig
from prompttune.training.loop import TrainResult, train
from prompttune.training.progress import Progress
from prompttune.training.scoring import evaluate

__all__ = ["Progress", "TrainConfig", "TrainResult", "evaluate", "train"]
