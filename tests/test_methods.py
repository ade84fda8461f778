"""Every registered method through one matrix: seam, gradients, frozen backbone, save and load, mixed batches."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch

import prompttune as pt
from prompttune.backbones.blocks import KEY, QUERY, VALUE
from prompttune.errors import BackboneError, UsageError
from prompttune.export.precision.smooth import smoothed
from prompttune.methods import METHODS, config_from_dict, register
from prompttune.methods.base import MethodConfig
from tests import engines, equations, equations_prompts, equations_readers, equations_weights
from tests.convs import CONVS, ON_CONV
from tests.drawing import VITS, default_configs, drawn_model
from tests.engines import config_of, noise
from tests.evas import as_vit
from tests.plains import ON_PLAIN, PLAINS
from tests.swins import ON_SWIN, SWINS

MATRIX = [
    pytest.param(name, config, id=f"{config.method}-{name}")
    for names, methods in ((VITS, METHODS), (SWINS, ON_SWIN), (CONVS, ON_CONV), (PLAINS, ON_PLAIN))
    for name in names
    for config in default_configs()
    if config.method in methods
]
SHARED = [case for case in MATRIX if case.values[1].shares_backbone]
"""Those whose tasks mix in a batch; ``test_full.py`` holds the others to a refusal."""


@pytest.fixture(scope="module", params=VITS)
def backbone(request):
    return engines.backbone(request.param)


@pytest.fixture(scope="module")
def vit():
    return engines.backbone("test_vit")


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(noise(3))


@pytest.mark.parametrize(("backbone", "config"), MATRIX, indirect=["backbone"])
class TestMatrix:
    def test_state_has_the_declared_layout(self, backbone, config):
        model = drawn_model(backbone, config)
        state, layout = model.task_state(), model.state_layout()
        sizes = {"rank": getattr(config, "rank", 0), "clusters": getattr(config, "clusters", 0), "classes": 5}
        assert list(state) == list(layout)
        for name, tensor in state.items():
            expected = tuple(sizes.get(size, size) for size in layout[name])
            assert tuple(tensor.shape) == (1, *expected), name

    def test_forward_is_forward_state_of_task_state(self, backbone, config, images):
        model = drawn_model(backbone, config)
        with torch.no_grad():
            assert torch.equal(model(images).logits, model.forward_state(images, model.task_state()).logits)

    def test_aux_changes_nothing_for_the_base(self, backbone, config, images):
        model = drawn_model(backbone, config)
        with torch.no_grad():
            alone, both = model(images, aux=False), model(images, aux=True)
        torch.testing.assert_close(alone.logits, both.logits, atol=2e-5, rtol=1e-4)
        assert alone.aux_logits is None

    def test_gradients_reach_every_task_parameter_and_only_those(self, backbone, config, images):
        model = drawn_model(backbone, config).train()
        out = model(images)
        loss = out.logits.square().mean()
        if out.aux_logits is not None:
            loss = loss + out.aux_logits.square().mean()
        loss.backward()
        for name, parameter in model.trained_parameters().items():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        fixed = model.task_parameters().keys() - model.trained_parameters().keys()
        assert all(model.task_parameters()[name].grad is None for name in fixed)
        assert all(parameter.grad is None for parameter in backbone.parameters())
        assert not any(parameter.requires_grad for parameter in backbone.parameters())

    def test_backbone_stays_in_evaluation_mode(self, backbone, config):
        model = drawn_model(backbone, config).train()
        assert model.method.training
        assert not any(module.training for module in backbone.modules())

    def test_save_and_load_give_the_same_answers(self, backbone, config, images, tmp_path):
        model = drawn_model(backbone, config)
        model.labels = ["ant", "bee", "cat", "dog", "eel"]
        model.save(tmp_path / "task", metrics={"top1": 0.5})
        for loaded in (pt.PromptModel.load(tmp_path / "task"), pt.PromptModel.load(tmp_path / "task", backbone)):
            assert torch.equal(loaded(images).logits, model(images).logits)
            assert (loaded.config, loaded.labels, loaded.metrics) == (model.config, model.labels, {"top1": 0.5})


@pytest.mark.parametrize(("backbone", "config"), SHARED, indirect=["backbone"])
def test_a_mixed_batch_equals_single_runs(backbone, config, images):
    if "maxvit" in backbone.name:  # drawn weights amplify float32's rounding beyond the bound
        backbone, images = copy.deepcopy(backbone).double(), images.double()
    models = [drawn_model(backbone, config, seed=seed).to(images.dtype) for seed in range(3)]
    with torch.no_grad():
        states = [model.task_state() for model in models]
        mixed = {name: torch.cat([state[name] for state in states]) for name in states[0]}
        together = models[0].forward_state(images, mixed).logits
        single = torch.cat([model(images[row : row + 1]).logits for row, model in enumerate(models)])
    torch.testing.assert_close(together, single, atol=2e-5, rtol=1e-5)
    assert (single[0] - models[1](images[:1]).logits[0]).abs().max() > 1e-3, "the tasks must differ"


@pytest.mark.parametrize(
    ("features", "method", "settings"),
    [(one.features, *case) for one in (equations_prompts, equations_readers, equations_weights) for case in one.CASES],
    ids=lambda value: "" if callable(value) else str(value),
)
def test_features_equal_the_equations(backbone, features, method, settings, images):
    model = drawn_model(backbone, METHODS[method](**settings))
    wanted = features(drawn_model(as_vit(backbone), model.config), images)
    with torch.no_grad():
        found, other = (one(images).features for one in (model, drawn_model(backbone, model.config, seed=1)))
    assert (found - wanted).abs().max() <= 2e-5 * max(1, wanted.abs().max().item())
    assert (found - other).abs().max() > 1e-3, "the task must matter"


READING = [config for config in default_configs() if config.method not in ("linear",) and config.modules[0].only_reads]


@pytest.mark.parametrize("config", READING, ids=lambda config: config.method)
def test_tasks_that_read_one_image_side_by_side_equal_single_runs(backbone, config, images):
    models = [drawn_model(backbone, config, seed=seed) for seed in range(3)]
    asked = [[0, 1, 2], [2, 0, 1], [1, 1, 0]]  # of each image in turn
    assert models[0].method.width == models[0].head.weight.shape[1]
    with torch.no_grad():
        states = [model.method.task_state() for model in models]
        rows = {name: torch.cat([states[task][name] for row in asked for task in row]) for name in states[0]}
        image = models[0].image_state(images)
        together = models[0].method(image, rows).features.unflatten(0, (3, 3))
        for place, row in enumerate(asked):
            single = torch.cat([models[task](images[place : place + 1]).features for task in row])
            torch.testing.assert_close(together[place], single, atol=1e-5, rtol=1e-5)
    assert (together[0, 0] - together[0, 1]).abs().max() > 1e-3, "the tasks must differ"


DROPS = [config.method for config in default_configs() if "dropout" in config.to_dict()]


@pytest.mark.parametrize("method", DROPS)
def test_dropout_acts_in_training_alone(vit, images, method):
    model = drawn_model(vit, config_of(method, dropout=0.5))
    assert torch.equal(model(images).logits, model(images).logits)
    model.train()
    assert not torch.equal(model(images).logits, model(images).logits)


@pytest.mark.parametrize("name", ["test_vit", "test_eva2"])
@pytest.mark.parametrize(
    "method", ["e2vpt", "expres", "vqt", "reader", "side", "adaptformer", "adapter", "lora", "ssf", "gapt"]
)
def test_balancing_channels_for_int8_changes_no_answer(name, images, method):
    model = drawn_model(engines.backbone(name), config_of(method))
    with torch.no_grad():
        balanced = smoothed(model, [(images.numpy(), model.task_state())])
        torch.testing.assert_close(balanced(images).logits, model(images).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "name", "tasks"),
    [
        ("ssf", "test_vit2", [{}] * 3),
        ("gapt", "test_vit", [{"pool": "mean"}] * 3),
        ("lora", "test_vit2", [{"targets": "qkv", "rank": rank} for rank in (2, 3, 4)]),
        ("e2vpt", "test_vit", [{}, {"prune_tokens": 0, "prune_segments": 0}, {"segments": 8, "prune_at": 0.3}]),
        ("expres", "test_vit", [{}, {"norm_residual": False}, {"qkv_residual": False, "proj_residual": False}]),
    ],
    ids=["ssf", "gapt", "lora", "e2vpt", "expres"],
)
def test_tasks_of_other_settings_mix_in_one_engine(method, name, tasks, tmp_path):
    """On LayerScale, pooled means, key adapters, other pruning and other vectors."""
    models = {}
    for number, settings in enumerate(tasks):
        config = config_of(method, **settings)
        models[f"task{number}"] = drawn_model(engines.backbone(name), config, number + 2, seed=number)
        models[f"task{number}"].save(tmp_path / f"task{number}")
    pt.export_engine([tmp_path / "task0", tmp_path / "task1"], tmp_path / "engine", batch_sizes=(1, 3))
    engine = pt.Engine(tmp_path / "engine")
    engine.add_task("task2", tmp_path / "task2")  # for lora, of a rank above those that were exported
    batch = noise(len(models))
    mixed = engine.logits(batch, list(models))
    for row, (task, model) in enumerate(models.items()):
        with torch.no_grad():
            wanted = model(torch.from_numpy(batch[row : row + 1])).logits.numpy()[0]
        assert np.abs(mixed[row, : len(wanted)] - wanted).max() <= 1e-4
        single = engine.logits(batch[row : row + 1], task)[0, : len(wanted)]
        assert np.abs(mixed[row, : len(wanted)] - single).max() <= 1e-5


SA2VP_VARIANTS = [
    {},
    {"prompt_layers": (0,)},
    {"prompt_layers": (0, 2, 5)},
    {"prompt_layers": (0, 1, 2, 3)},
    {"window": 1},
    {"window": 5},
    {"attention": "global"},
    {"adapter": False},
    {"activation": "relu"},
    {"fusion": "paper"},
    {"map_scale": 0.5},
]


@pytest.mark.parametrize("settings", SA2VP_VARIANTS, ids=str)
def test_sa2vp_equals_its_equations(backbone, settings, images):
    model = drawn_model(backbone, pt.SA2VPConfig(rank=4, **settings))
    base, prompt = equations.features(drawn_model(as_vit(backbone), model.config), images)
    with torch.no_grad():
        both, alone = model(images, aux=True), model(images)
    scale = base.abs().max().item()
    assert (alone.features - base).abs().max() <= 2e-5 * max(1, scale)
    assert (both.features - base).abs().max() <= 2e-5 * max(1, scale)
    assert (both.aux_features - prompt).abs().max() <= 2e-5 * max(1, prompt.abs().max().item())


@pytest.mark.parametrize("method", ["sa2vp", "e2vpt", "expres"])
def test_every_switch_changes_the_answer(vit, images, method):
    cases = [own for name, own in equations_prompts.CASES if name == method]
    cases = [{"rank": 4, **settings} for settings in SA2VP_VARIANTS] if method == "sa2vp" else cases
    with torch.no_grad():
        answers = [drawn_model(vit, METHODS[method](**settings))(images).features for settings in cases]
    for (first, one), (second, other) in itertools.combinations(zip(cases, answers, strict=True), 2):
        assert (one - other).abs().max() > 1e-4, (first, second)


@pytest.mark.parametrize(
    "settings",
    [{}, {"long_term": False}, {"spatial": False}, {"long_term": False, "spatial": False}, {"cell_rank": 2}],
    ids=str,
)
def test_lspt_equals_its_equations(backbone, settings, images):
    model = drawn_model(backbone, pt.LSPTConfig(num_prompts=3, **settings))
    with torch.no_grad():
        expected = equations.lspt_features(drawn_model(as_vit(backbone), model.config), images)
        torch.testing.assert_close(model(images).features, expected, atol=3e-5, rtol=1e-4)


def test_lspt_without_codings_is_vpt_shallow(vit, images):
    lspt = drawn_model(vit, pt.LSPTConfig(num_prompts=3, long_term=False, spatial=False))
    vpt = drawn_model(vit, pt.VPTShallowConfig(num_prompts=3))
    vpt.method.prompts.data.copy_(lspt.method.prompts.data)
    vpt.head.load_state_dict(lspt.head.state_dict())
    assert torch.equal(lspt(images).logits, vpt(images).logits)


def test_vpt_deep_replaces_its_prompts(vit, images):
    deep = drawn_model(vit, pt.VPTDeepConfig(num_prompts=3))
    before = deep(images).logits
    deep.method.prompts.data[-1] += 1.0
    assert not torch.equal(before, deep(images).logits)


@pytest.mark.parametrize("name", ["test_vit", "test_eva2"])
def test_zero_init_starts_from_the_plain_backbone(name, images):
    vit = engines.backbone(name)
    fresh = pt.PromptModel(vit, pt.SA2VPConfig(), num_classes=3).eval()
    torch.testing.assert_close(fresh(images).features, vit(images), atol=2e-5, rtol=1e-4)
    released = pt.PromptModel(vit, pt.SA2VPConfig(init="released"), num_classes=3).eval()
    assert (released(images).features - vit(images)).abs().max() > 1e-3


def test_the_first_block_is_folded_with_one_projection_each(vit, monkeypatch):
    model, parts = drawn_model(vit, pt.SA2VPConfig(rank=4, prompt_layers=(0,))), []
    project = vit.blocks[0].linear_qkv
    monkeypatch.setattr(vit.blocks[0], "linear_qkv", lambda normed, part: parts.append(part) or project(normed, part))
    model.task_state()
    assert parts == [QUERY, KEY, VALUE]


def test_supervision_of_the_prompt_pathway_is_a_switch(vit, images):
    assert drawn_model(vit, pt.SA2VPConfig(rank=4)).train()(images).aux_logits is not None
    assert drawn_model(vit, pt.SA2VPConfig(rank=4, base_weight=1.0)).train()(images).aux_logits is None


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("sa2vq", {}, "did you mean sa2vp"),
        ("sa2vp", {"windows": 3}, "no setting 'windows'"),
        ("sa2vp", {"window": 2}, "odd"),
        ("sa2vp", {"window": "3"}, "window must be a whole number, not '3'"),
        ("sa2vp", {"rank": 0}, "rank"),
        ("sa2vp", {"activation": "gelo"}, "did you mean gelu"),
        ("sa2vp", {"prompt_layers": [4, 8]}, "rise from 0"),
        ("sa2vp", {"base_weight": 1.5}, "base_weight"),
        ("lspt", {"num_prompts": 0}, "num_prompts"),
        ("lspt", {"long_term": 1}, "long_term must be true or false, not 1"),
        ("lspt", {"long_term": False, "cell_rank": 2}, "cell_rank needs long_term"),
        ("sa2vp", {"gamma": float("nan")}, "gamma must be finite"),
        ("sa2vp", {"gamma": float("-inf")}, "gamma must be finite"),
        ("linear", {"rank": 4}, "its settings: layers, pool"),
        ("e2vpt", {"num_prompts": 0}, "num_prompts must be above 0"),
        ("e2vpt", {"num_kv": 0}, "num_kv must be above 0"),
        ("e2vpt", {"segments": 0}, "segments must be above 0"),
        ("e2vpt", {"prune_tokens": 1.0}, "prune_tokens must be at least 0 and below 1"),
        ("e2vpt", {"prune_segments": -0.1}, "prune_segments must be"),
        ("e2vpt", {"prune_at": 1}, "prune_at must be above 0 and below 1"),
        ("e2vpt", {"deep": 1}, "must be true or false"),
        ("expres", {"num_prompts": 0}, "num_prompts must be above 0"),
        ("expres", {"dropout": 1.0}, "dropout must be"),
        ("expres", {"residuals": True}, "no setting 'residuals'"),
        ("adaptformer", {"rank": 0}, "adaptformer: rank must be above 0"),
        ("adaptformer", {"dropout": 1.0}, "dropout must be"),
        ("adapter", {"rank": -1}, "adapter: rank must be above 0"),
        ("adapter", {"alpha": 1}, "no setting 'alpha'"),
        ("lora", {"rank": 0}, "lora: rank must be above 0"),
        ("lora", {"alpha": 0}, "alpha must be above 0"),
        ("lora", {"rank": 2.5}, "rank must be a whole number"),
        ("reader", {"num_prompts": 0}, "num_prompts must be above 0"),
        ("reader", {"rank": 0}, "reader: rank must be above 0"),
        ("side", {"width": 0}, "side: width must be above 0"),
        ("ssf", {"rank": 4}, "its settings: first_block"),
        ("gapt", {"num_prompts": 0}, "num_prompts must be above 0"),
        ("gapt", {"pool": "means"}, "did you mean mean"),
        ("gapt", {"dropout": -0.1}, "dropout must be"),
        ("gapt", {"gate_init": float("inf")}, "gate_init must be finite"),
        ("adaptformer", {"adapter_scale": float("nan")}, "adapter_scale must be finite"),
        ("vqt", {"num_queries": 0}, "num_queries must be above 0"),
        ("vpt-deep", {"first_block": -1}, "vpt-deep: first_block must be at least 0"),
    ],
)
def test_bad_settings_are_refused_in_one_line(method, settings, message):
    with pytest.raises(UsageError, match=message) as caught:
        config_from_dict(method, settings)
    assert "\n" not in str(caught.value)


def test_settings_survive_json(vit):
    config = pt.SA2VPConfig(prompt_layers=(0, 3), gamma=1).resolved(vit)
    assert config_from_dict("sa2vp", config.to_dict()) == config
    assert isinstance(config.gamma, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 3


@pytest.mark.parametrize(
    ("same", "changes"),
    [({"attention": "global"}, {"window": 5}), ({"adapter": False}, {"activation": "relu"})],
)
def test_settings_without_a_meaning_keep_no_tasks_apart(same, changes):
    assert pt.SA2VPConfig(**same, **changes).graph_settings() == pt.SA2VPConfig(**same).graph_settings()
    assert pt.SA2VPConfig(**changes).graph_settings() != pt.SA2VPConfig().graph_settings()


def test_prompt_layers_follow_the_depth(vit):
    assert pt.SA2VPConfig().resolved(vit).prompt_layers == (0, 4)
    with pytest.raises(UsageError, match="do not fit"):
        pt.SA2VPConfig(prompt_layers=(0, 9)).resolved(vit)


def test_a_name_cannot_be_registered_twice():
    @dataclasses.dataclass(frozen=True)
    class Again(MethodConfig):
        method = "sa2vp"

    with pytest.raises(UsageError, match="'sa2vp' is registered already, by prompttune"):
        register(Again)
    assert METHODS["sa2vp"] is pt.SA2VPConfig


def test_a_method_refuses_a_foreign_backbone(vit):
    foreign = pt.Backbone(torch.nn.Identity())
    foreign.depth, foreign.name = vit.depth, "other"
    with pytest.raises(BackboneError, match="sa2vp runs on ConvBackbone, SwinBackbone, VitBackbone, not on Backbone"):
        pt.SA2VPConfig().build(foreign)
