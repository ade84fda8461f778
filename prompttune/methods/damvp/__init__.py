"""DAM-VP: pixel prompts, one for each cluster of a task's images."""

from prompttune.methods.damvp.config import DAMVPConfig

__all__ = ["DAMVPConfig"]
