"""Checkpoints of other people's released code, one file a layout, made into checkpoint folders."""

from prompttune.checkpoints.importing.run import LAYOUTS, Imported, import_checkpoint

__all__ = ["LAYOUTS", "Imported", "import_checkpoint"]
