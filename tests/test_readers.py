"""Methods whose tasks only read the image: many tasks side by side, and what an image state holds."""

from unittest.mock import Mock

import pytest
import torch

import prompttune as pt
from prompttune.backbones import VitBackbone
from prompttune.errors import BackboneError, UsageError
from tests import engines
from tests.drawing import VITS, drawn_model
from tests.engines import config_of, noise

READERS = [("reader", {"mlp": True}), ("side", {"layers": (0, 2), "stem": False})]
"""Methods and settings beside those of the matrix in ``test_methods.py``."""
ALL = [("linear", {"layers": (0, 3), "pool": "map"}), ("reader", {}), ("side", {}), *READERS]


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize(("method", "settings"), READERS, ids=str)
def test_tasks_side_by_side_equal_single_runs(name, method, settings):
    backbone, images = engines.backbone(name), torch.from_numpy(noise(2))
    models = [drawn_model(backbone, config_of(method, **settings), seed=seed) for seed in range(3)]
    with torch.no_grad():
        states = [model.task_state() for model in models]
        rows = {key: torch.cat([one[key] for one in states] * 2) for key in states[0]}  # image-major
        image = models[0].image_state(images)
        assert all(len(tensor) == 2 for tensor in image.values())
        together = models[0].answer(image, rows).logits.unflatten(0, (2, 3))
        single = torch.stack([model(images).logits for model in models], dim=1)
        alone = models[1].answer(models[1].image_state(images[:1]), states[1]).logits
    bound = 1e-5 * max(1, single.abs().max().item())
    assert (together - single).abs().max() <= bound
    assert (alone - single[:1, 1]).abs().max() <= bound
    assert (single[:, 0] - single[:, 1]).abs().max() > 1e-3, "the tasks must differ"


@pytest.mark.parametrize(("method", "settings"), ALL, ids=str)
def test_the_answer_follows_from_the_image_state_alone(method, settings, monkeypatch):
    model, images = drawn_model(engines.backbone(), config_of(method, **settings)), torch.from_numpy(noise(2))
    with torch.no_grad():
        image, state, wanted = model.image_state(images), model.task_state(), model(images).logits
        seen = []
        for block in model.backbone.blocks:
            real = block.linear_qkv
            monkeypatch.setattr(
                block, "linear_qkv", lambda x, part, real=real: seen.append(x.shape[1]) or real(x, part)
            )
        assert torch.equal(model.answer(image, state).logits, wanted)
    assert not seen or max(seen) < model.backbone.num_tokens


@pytest.mark.parametrize("method", ["reader", "vqt"])
@pytest.mark.parametrize("name", ["test_swin", "test_resnet3"])
def test_other_backbones_are_refused_in_one_line(method, name):
    with pytest.raises(BackboneError, match=f"{method} runs on VitBackbone, not on ") as caught:
        pt.PromptModel(engines.backbone(name), config_of(method), 3)
    assert "\n" not in str(caught.value)


def test_a_reader_starts_as_the_class_token():
    backbone, images = engines.backbone(), torch.from_numpy(noise(1))
    tokens = pt.PromptModel(backbone, "reader", 3, num_prompts=2).method.tokens
    assert (tokens - backbone.embed(images)[0, 0]).abs().max() < 0.1
    with pytest.raises(UsageError, match="reader: num_prompts must be at most 16, below the tokens"):
        config_of("reader", num_prompts=17).build(backbone)


def test_a_side_network_reads_six_blocks_evenly():
    backbone = engines.backbone()
    assert pt.SideConfig().resolved(backbone).layers == (0, 1, 2, 3, 4, 5)
    assert pt.SideConfig().resolved(Mock(spec=VitBackbone, depth=12)).layers == (0, 2, 4, 6, 8, 11)
    with pytest.raises(UsageError, match=r"side: layers .* must rise, from 0 on"):
        pt.SideConfig(layers=(3, 2))
    with pytest.raises(UsageError, match="do not fit 6 blocks"):
        config_of("side", layers=(0, 6)).build(backbone)
