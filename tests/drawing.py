"""Backbones and methods with parameters drawn at random but far from trivial, so that comparisons can fail.

A freshly initialised model hides mistakes: LayerScale starts at 1e-5, adapters' last layers and many biases at 0.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import prompttune as pt
from prompttune.methods import METHODS, MethodConfig
from tests import convs, evas, swins  # noqa: F401  # load_backbone then knows their models
from tests.reference.draw import draw

VITS = ("test_vit", "test_vit2", "test_vit3", "test_vit4", "test_eva")
"""Class token; register, average pooling and LayerScale; attention pooling; RMS norms; rotary embedding."""

FACTORS = ("method.scale", "method.temperatures")
"""Parameters that multiply what the backbone computes: they are drawn around 1."""

SWITCHES = ("method.masks.",)
"""Parameters that are 0 or 1."""


def drawn_weights(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a weights file for timm model ``name`` at its native size; returns its path."""
    path = folder / f"{name}-{seed}.safetensors"
    if not path.exists():
        plain = pt.load_backbone(name, weights="random")
        tensors = {}
        unnamed = _unnamed_norms(plain.model)
        for key, value in plain.model.state_dict().items():
            if key.rpartition(".")[0] in unnamed:
                tensors[key] = _of_norm(key, value, seed)
                continue
            tensor = torch.as_tensor(draw(key, tuple(value.shape), seed))
            # draw() knows norms; LayerScale is 1 and matrices keep the size of their input.
            if key.endswith(("gamma", "gamma_1", "gamma_2")):
                tensor = 1 + tensor
            elif tensor.ndim >= 2 and "embed" not in key and "token" not in key:
                tensor = tensor / 0.04 * tensor[0].numel() ** -0.5
            tensors[key] = tensor
        save_file(tensors, path)
    return path


def _unnamed_norms(model: nn.Module) -> set[str]:
    """Norms that draw() does not know: those whose names do not say so, and batch norms for their variances."""
    batch = nn.modules.batchnorm._BatchNorm
    return {
        name
        for name, one in model.named_modules()
        if isinstance(one, batch) or (isinstance(one, nn.LayerNorm) and "norm" not in name.rpartition(".")[2])
    }


def _of_norm(key: str, value: Tensor, seed: int) -> Tensor:
    """Weights and variances around 1, biases and means around 0; a count of batches as it is."""
    if not value.is_floating_point():
        return value
    tensor = torch.as_tensor(draw(key, tuple(value.shape), seed)) * 2.5  # 0.1 z, as draw() has it for norms
    if key.endswith("var"):
        return 1 + tensor.abs()
    return 1 + tensor if key.endswith("weight") else tensor


def drawn_backbone(name: str, folder: Path, image_size: int, seed: int = 0) -> pt.Backbone:
    """A backbone whose every tensor matters."""
    return pt.load_backbone(name, image_size, drawn_weights(name, folder, seed))


def drawn_model(backbone: pt.Backbone, config: MethodConfig, num_classes: int = 5, seed: int = 0) -> pt.PromptModel:
    """A task whose every parameter matters, in evaluation mode."""
    model = pt.PromptModel(backbone, config, num_classes)
    for name, parameter in model.task_parameters().items():
        drawn = draw(name, tuple(parameter.shape), seed + 1)
        parameter.data.copy_(torch.from_numpy(drawn) * (1.0 if "norm" in name else 5.0))
        if name.startswith(SWITCHES):
            parameter.data.copy_((parameter > -0.1).float())
        if name.startswith(FACTORS):
            parameter.data.add_(1.0)
    return model.eval()


def default_configs() -> list[MethodConfig]:
    """One small config for each registered method; a method without one fails collection."""
    small = {
        "sa2vp": {"rank": 4},
        "lspt": {"num_prompts": 3},
        "gapt": {"num_prompts": 3},
        "vpt-shallow": {"num_prompts": 3},
        "vpt-deep": {"num_prompts": 3},
        "e2vpt": {"num_prompts": 3, "num_kv": 2, "segments": 4},
        "expres": {"num_prompts": 3},
        "vqt": {"num_queries": 2},
        "adaptformer": {"rank": 4},
        "adapter": {"rank": 4},
        "lora": {"rank": 4},
        "ssf": {},
        "bitfit": {},
        "reader": {"num_prompts": 3, "rank": 4},
        "side": {"width": 8},
        "linear": {},
        "full": {},
        "dam-vp": {"clusters": 3},
    }
    missing = METHODS.keys() - small.keys()
    if missing:
        raise LookupError(f"methods without a test config: {sorted(missing)}")
    return [METHODS[name](**settings) for name, settings in small.items()]
