"""ONNX engines on full-size backbones: parity with PyTorch, and mixed batches."""

from pathlib import Path

import numpy as np
import pytest
import torch

import prompttune as pt
from tests.drawing import default_configs, drawn_model, drawn_weights

SMALL, BASE = "vit_small_patch14_dinov2", "vit_base_patch16_224"
CASES = [
    pytest.param(name, config, id=f"{config.method}-{name}")
    for config in default_configs()
    for name in (SMALL, BASE)
    if config.method in (("sa2vp", "lspt", "lora", "dam-vp") if name == SMALL else ("sa2vp",))
]
"""One method of each kind of graph: two pathways, a recurrence, matrices beside the frozen ones, two passes. The others
are proven on tiny models in tests/test_export_matrix.py; size and real weights add nothing that belongs to a method.
"""
ATOL = 1e-4
TASKS = 8


def save_tasks(backbone, config, folder):
    """Eight tasks whose ranks, weights γ and class counts differ where the method has them."""
    models, paths = {}, []
    for number in range(TASKS):
        settings = config.to_dict()
        own = {"rank": 4 + number, "gamma": 0.1 * (1 + number)}
        settings |= {name: value for name, value in own.items() if name in settings}
        model = drawn_model(backbone, type(config)(**settings), num_classes=5 + number, seed=number)
        # Features of the last norm are of order 1: keep the logits so as well, as a trained head does.
        model.head.weight.data.mul_(0.1)
        model.save(folder / f"task{number}")
        models[f"task{number}"] = model
        paths.append(folder / f"task{number}")
    return models, paths


def full_size(name, folder):
    if name == SMALL:
        return pt.load_backbone(name, 56)
    return pt.load_backbone(name, 224, drawn_weights(name, folder))


@pytest.mark.slow
@pytest.mark.real_weights
@pytest.mark.parametrize(("name", "config"), CASES)
def test_parity_and_mixed_batch(name, config, tmp_path: Path):
    backbone = full_size(name, tmp_path)
    models, paths = save_tasks(backbone, config, tmp_path)
    pt.export_engine(paths[:2], tmp_path / "engine", parity=False)
    engine = pt.Engine(tmp_path / "engine")
    for task in list(models)[2:]:
        engine.add_task(task, tmp_path / task, parity=False)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(TASKS, 3, backbone.image_size, backbone.image_size, generator=generator)
    mixed = engine.logits(images, list(models))
    for row, (task, model) in enumerate(models.items()):
        classes = len(model.labels)
        with torch.no_grad():
            expected = model(images[row : row + 1]).logits.numpy()[0]
        single = engine.logits(images[row : row + 1], task)[0]
        for found in (single, mixed[row]):
            assert np.abs(found[:classes] - expected).max() <= ATOL
            assert found.argmax() == expected.argmax()
            assert np.isneginf(found[classes:]).all()
        assert np.abs(single[:classes] - mixed[row][:classes]).max() <= 1e-5
