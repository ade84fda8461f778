"""Import of checkpoints from other released code, one module per layout, into checkpoint folders."""

from prompttune.checkpoints.importing.run import LAYOUTS, Imported, ImportSettings, import_checkpoint

__all__ = ["LAYOUTS", "ImportSettings", "Imported", "import_checkpoint"]
