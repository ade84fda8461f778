"""Writing and reading checkpoint folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from prompttune import __version__
from prompttune.backbones import Backbone, load_backbone
from prompttune.checkpoints.card import model_card
from prompttune.checkpoints.format import (
    CARD_FILE,
    CONFIG_FILE,
    FORMAT_VERSION,
    MODEL_FILE,
    SEGMENTATION_VERSION,
    read_config,
    read_tensors,
)
from prompttune.errors import CheckpointError, UsageError
from prompttune.files import replacing, sha256_file, write_json, write_text
from prompttune.methods import config_from_dict
from prompttune.model import PromptModel
from prompttune.preprocess import Preprocess
from prompttune.segmentation.config import SegmentationConfig


def checkpoint_config(model: PromptModel, model_sha256: str) -> dict[str, Any]:
    """The content of ``prompt_config.json``."""
    backbone = model.backbone
    extra = {} if model.segmentation is None else {"segmentation": model.segmentation.to_dict()}
    return {
        "format_version": SEGMENTATION_VERSION if extra else FORMAT_VERSION,
        "prompttune_version": __version__,
        "method": model.config.method,
        "settings": model.config.to_dict(),
        "backbone": {
            "name": backbone.name,
            "image_size": backbone.image_size,
            "weights": backbone.weights,
            "weights_source": backbone.weights_source,
            "fingerprint": backbone.fingerprint,
        },
        "preprocess": model.preprocess.to_dict(),
        "labels": model.labels,
        "metrics": model.metrics,
        "model_sha256": model_sha256,
        **extra,
    }


def save_checkpoint(model: PromptModel, folder: Path) -> None:
    """Write ``model``'s task into ``folder``, each file atomically; other files in the folder stay.

    The tensors go first: a reader that comes between sees a digest that does not match, never a wrong model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {
        name: parameter.detach().cpu().contiguous() for name, parameter in model.task_parameters().items()
    }
    with replacing(folder / MODEL_FILE) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
        digest = sha256_file(temporary)
    config = checkpoint_config(model, digest)
    write_json(folder / CONFIG_FILE, config)
    trained = model.trained_parameters()
    count = sum(parameter.numel() for name, parameter in trained.items() if name.startswith("method."))
    size = (folder / MODEL_FILE).stat().st_size
    write_text(folder / CARD_FILE, model_card(config, count, model.method.parameters_left(), size))


def load_checkpoint(folder: Path, backbone: Backbone | None = None, weights: str | Path | None = None) -> PromptModel:
    """Read a task; its backbone is loaded from where training took it unless one is given.

    Raises:
        CheckpointError: the folder is damaged, or does not fit the backbone.
        BackboneError: the backbone's weights cannot be found.
    """
    config = read_config(folder)
    wanted = config["backbone"]
    if backbone is None:
        backbone = load_backbone(wanted["name"], wanted["image_size"], weights or wanted["weights"])
    _check_backbone(folder, wanted, backbone)
    try:
        settings = config_from_dict(config["method"], config["settings"])
        preprocess = Preprocess.from_dict(config["preprocess"])
        model = PromptModel(
            backbone,
            settings,
            labels=config["labels"],
            preprocess=preprocess,
            segmentation=segmentation_of(config),
        )
    except (UsageError, TypeError, KeyError) as problem:
        raise CheckpointError(f"{folder / CONFIG_FILE} does not fit this prompttune: {problem}") from None
    _load_tensors(model, read_tensors(folder, config), folder)
    model.metrics = config["metrics"]
    return model.eval()


def segmentation_of(config: Mapping[str, Any]) -> SegmentationConfig | None:
    """The segmentation that a checkpoint's config names, None for a classification.

    Raises:
        UsageError, TypeError: settings that this version does not know.
    """
    found = config.get("segmentation")
    return None if found is None else SegmentationConfig.from_dict(found)


def _check_backbone(folder: Path, wanted: dict[str, Any], backbone: Backbone) -> None:
    if backbone.image_size != wanted["image_size"]:
        raise CheckpointError(
            f"{folder} was trained at image size {wanted['image_size']}, the backbone has {backbone.image_size}"
        )
    if backbone.fingerprint != wanted["fingerprint"]:
        raise CheckpointError(
            f"{folder} was trained over {wanted['name']} with fingerprint {wanted['fingerprint'][:12]} "
            f"({wanted['weights_source']}), the backbone is {backbone.name} with {backbone.fingerprint[:12]} "
            f"({backbone.weights_source}); give the right file with --weights"
        )


def _load_tensors(model: PromptModel, tensors: dict[str, Tensor], folder: Path) -> None:
    model.take_sizes(tensors)
    parameters = model.task_parameters()
    missing = sorted(parameters.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - parameters.keys())
    if missing or unknown:
        raise CheckpointError(f"{folder / MODEL_FILE} lacks {missing[:3]} and has unknown {unknown[:3]}")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise CheckpointError(
                f"{folder / MODEL_FILE}: {name} is {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}"
            )
        parameter.data.copy_(tensors[name])
