"""DAM-VP: pixel prompts, one for each cluster of a task's images."""

from prompttune.methods.damvp.config import DAMVPConfig
from prompttune.methods.damvp.method import DAMVP

__all__ = ["DAMVP", "DAMVPConfig"]
