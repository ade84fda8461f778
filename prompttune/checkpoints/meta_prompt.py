"""A meta-learned prompt on disk: a safetensors file with one tensor and the settings that it fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prompttune.backbones.base import Backbone
from prompttune.checkpoints.format import read_config, read_tensors
from prompttune.errors import CheckpointError
from prompttune.files import replacing

FORMAT_VERSION = 1
_METHOD = "dam-vp"
_METADATA, _PROMPT = "prompttune", "prompt"


def write_prompt(path: Path, prompt: Tensor, backbone: Backbone, prompt_size: int, made: dict[str, Any]) -> None:
    """Write a prompt [3, P] atomically.

    Args:
        path: the file.
        prompt: the border's pixels, see :func:`prompttune.methods.damvp.method.add_border`.
        backbone: backbone that it was learned over.
        prompt_size: width of the border.
        made: facts about the learning: data sets, settings, losses.
    """
    document = {
        "format_version": FORMAT_VERSION,
        "backbone": backbone.name,
        "fingerprint": backbone.fingerprint,
        "image_size": backbone.image_size,
        "prompt_size": prompt_size,
        "made": made,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        tensors = {_PROMPT: prompt.detach().cpu().contiguous().clone()}
        save_file(tensors, temporary, metadata={_METADATA: json.dumps(document)})


def read_prompt(source: str | Path, backbone: Backbone, prompt_size: int) -> Tensor:
    """The prompt [3, P] in a file of :func:`write_prompt`, or the mean of the prompts in a dam-vp checkpoint folder.

    Raises:
        CheckpointError: the prompt is missing or damaged, or was made for another backbone, image size or border.
    """
    path = Path(source).expanduser()
    found, prompt = _read_checkpoint(path) if path.is_dir() else _read_file(path)
    wanted = {
        "fingerprint": backbone.fingerprint[:12],
        "image_size": backbone.image_size,
        "prompt_size": prompt_size,
    }
    found = {**found, "fingerprint": str(found["fingerprint"])[:12]}
    for name, value in wanted.items():
        if found[name] != value:
            what = "backbone" if name == "fingerprint" else name.replace("_", " ")
            raise CheckpointError(
                f"the prompt in {path} does not fit: its {what} is {found[name]}, this one is {value}"
            )
    return prompt


def _read_file(path: Path) -> tuple[dict[str, Any], Tensor]:
    if not path.is_file():
        raise CheckpointError(f"no meta prompt at {path}: make one with prompttune meta")
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads((file.metadata() or {})[_METADATA])
            prompt: Tensor = file.get_tensor(_PROMPT)
        version = document["format_version"]
        found = {name: document[name] for name in ("fingerprint", "image_size", "prompt_size")}
    except (SafetensorError, KeyError, TypeError, ValueError) as problem:
        raise CheckpointError(f"{path} is not a meta prompt, or is damaged: {problem}") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has meta prompt format {version!r}, this prompttune reads {FORMAT_VERSION}")
    return found, prompt


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], Tensor]:
    config = read_config(path)
    if config["method"] != _METHOD:
        raise CheckpointError(f"{path} is a checkpoint of {config['method']}, not of {_METHOD}")
    tensors = read_tensors(path, config)
    if "method.prompts" not in tensors:
        raise CheckpointError(f"{path} does not hold prompts")
    backbone, settings = config["backbone"], config["settings"]
    found = {
        "fingerprint": backbone["fingerprint"],
        "image_size": backbone["image_size"],
        "prompt_size": settings.get("prompt_size"),
    }
    return found, tensors["method.prompts"].mean(dim=0)
