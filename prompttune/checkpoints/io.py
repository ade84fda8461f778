"""Writing checkpoint folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from prompttune.checkpoints.card import model_card
from prompttune.checkpoints.format import CARD_FILE, CONFIG_FILE, MODEL_FILE
from prompttune.files import replacing, sha256_file, write_json, write_text
from prompttune.task_types import read_task_type
from prompttune.version import __version__


def save_checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], parameters: int, left: int
) -> None:
    """Write a task into ``folder``, each file atomically; other files in the folder stay.

    The tensors go first: a reader that comes between sees a digest that does not match, never a wrong model.

    Args:
        folder: made if it is missing.
        config: content of ``prompt_config.json`` without the versions and the digest.
        tensors: task parameters by name.
        parameters: number of trained parameters, the head aside.
        left: those of them that pruning has left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / MODEL_FILE) as temporary:
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(stored, temporary, metadata={"format": "pt"})
        digest = sha256_file(temporary)
    whole = {
        "format_version": read_task_type(config).format_version,
        "prompttune_version": __version__,
        **config,
        "model_sha256": digest,
    }
    write_json(folder / CONFIG_FILE, whole)
    write_text(folder / CARD_FILE, model_card(whole, parameters, left, (folder / MODEL_FILE).stat().st_size))
