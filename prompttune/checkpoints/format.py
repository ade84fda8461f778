"""The format of a checkpoint folder: version 1, or 2 for tasks that earlier versions must refuse.

``prompt_config.json`` names the method and every setting, the backbone and its fingerprint, preprocessing, labels,
metrics and the digest of ``prompt_model.safetensors``, which holds the tensors ``method.*`` and ``head.*``.
``README.md`` is the model card. The type of a task other than a classification has its own entry, see
:func:`prompttune.task_types.read_task_type`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prompttune.errors import CheckpointError
from prompttune.files import read_json, sha256_file
from prompttune.images.preprocess import LONGEST_SIDE
from prompttune.task_types import entry_keys

VERSIONS = (1, 2)
CONFIG_FILE = "prompt_config.json"
MODEL_FILE = "prompt_model.safetensors"
CARD_FILE = "README.md"
_REQUIRED: dict[str, type] = {
    "method": str,
    "settings": dict,
    "backbone": dict,
    "preprocess": dict,
    "labels": list,
    "metrics": dict,
    "model_sha256": str,
    "backbone.name": str,
    "backbone.image_size": int,
    "backbone.weights": str,
    "backbone.weights_source": str,
    "backbone.fingerprint": str,
}
"""JSON type of each value; a dot leads into an object."""


def read_config(path: str | Path) -> dict[str, Any]:
    """Read and check ``prompt_config.json`` of a checkpoint folder.

    Raises:
        CheckpointError: the folder or its config does not exist, its format is newer, or a part is missing, of
            the wrong type or out of range.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder at {folder}")
    config = read_json(folder / CONFIG_FILE, CheckpointError, "checkpoint config")
    version = config.get("format_version")
    if version not in VERSIONS:
        raise CheckpointError(
            f"{folder} has checkpoint format {version!r}, this prompttune reads {' and '.join(map(str, VERSIONS))}; "
            "use the version that wrote it, or a newer one"
        )
    if wrong := _wrong_parts(config, version):
        raise CheckpointError(f"{folder / CONFIG_FILE} lacks {', '.join(wrong)}, or holds it in the wrong type")
    size = config["backbone"]["image_size"]
    if not 1 <= size <= LONGEST_SIDE:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: backbone.image_size must be from 1 to {LONGEST_SIDE}, not {size}; "
            "get the checkpoint again from where it was trained"
        )
    return config


def _wrong_parts(config: dict[str, Any], version: int) -> list[str]:
    # the exact type: JSON has no others, and true must not count as a number
    wrong = [name for name, kind in _REQUIRED.items() if type(_part(config, name)) is not kind]
    if "labels" not in wrong and not all(isinstance(label, str) for label in config["labels"]):
        wrong.append("labels")
    types = [key for key in entry_keys() if key in config]
    if version > 1 and not types:
        wrong.append("task_type")
    return wrong + [key for key in types if not isinstance(config[key], dict)]


def _part(config: Any, name: str) -> Any:
    for key in name.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def read_tensors(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Read the task's tensors and check their digest.

    Raises:
        CheckpointError: the file is missing, truncated or not the one that the config was written with.
    """
    path = folder / MODEL_FILE
    if not path.is_file():
        raise CheckpointError(f"no {MODEL_FILE} in {folder}")
    if sha256_file(path) != config["model_sha256"]:
        raise CheckpointError(f"{path} is damaged or was changed: its digest is not the one in {CONFIG_FILE}")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as problem:
        raise CheckpointError(f"{path} is damaged: {problem}") from None
    return tensors
