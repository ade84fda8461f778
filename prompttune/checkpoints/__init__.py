"""Prompt checkpoints: a folder of a task's parameters, its settings and a model card, never the backbone."""

from prompttune.checkpoints.format import CONFIG_FILE, MODEL_FILE, read_config
from prompttune.checkpoints.io import save_checkpoint

__all__ = ["CONFIG_FILE", "MODEL_FILE", "read_config", "save_checkpoint"]
