"""What methods have of their own, beside the matrix of all: counts, starts, pruning and rewinding, ranks, refusals."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

import prompttune as pt
from prompttune.backbones import VitBackbone
from prompttune.backbones.vit import VitBlock
from prompttune.errors import BackboneError, TrainingError, UsageError
from prompttune.methods import METHODS
from prompttune.training import train
from prompttune.training.optim import learning_rate
from prompttune.training.state import RunFolder, load
from tests import engines, equations_weights
from tests.drawing import VITS, drawn_model
from tests.engines import config_of, noise
from tests.swins import SWINS
from tests.training_helpers import config, no_pictures, one_thread, write_folder  # noqa: F401

MODEL = "prompt_model.safetensors"


@pytest.fixture(params=VITS)
def backbone(request):
    return engines.backbone(request.param)


@pytest.fixture(scope="module")
def vit():
    return engines.backbone("test_vit")


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(noise(2))


@pytest.mark.parametrize(
    ("method", "settings", "count"),
    [
        # L P D input prompts and L n D key-value prompts, which are of all heads together
        ("e2vpt", {"num_prompts": 10, "num_kv": 5}, 12 * (10 + 5) * 768),
        ("e2vpt", {"num_prompts": 10, "num_kv": 5, "share_kv": False}, 12 * (10 + 2 * 5) * 768),
        ("e2vpt", {"num_prompts": 10, "num_kv": 5, "deep": False}, (10 + 12 * 5) * 768),
        # P tokens; in each block P vectors behind the norm, 3 P behind q, k and v, P behind the projection
        ("expres", {"num_prompts": 1}, 46_848),
        ("expres", {"num_prompts": 10, "norm_residual": False}, 10 * 768 * (1 + 12 * 4)),
        ("expres", {"num_prompts": 10, "qkv_residual": False, "proj_residual": False}, 10 * 768 * (1 + 12)),
        ("vqt", {"num_queries": 1}, 9_216),
        # P tokens, 2 L P vectors, 2 L r D
        ("reader", {}, 4 * 768 * 25 + 12 * 2 * 16 * 768),
        # published
        ("adaptformer", {"rank": 64}, 1_189_632),
        ("lora", {"rank": 4}, 147_456),
        ("lora", {"rank": 4, "targets": "qkv"}, 147_456 * 3 // 2),
        ("ssf", {}, 205_824),
        ("gapt", {"num_prompts": 100}, 76_823),
        ("vpt-deep", {"num_prompts": 1}, 9_216),
        ("adapter", {"rank": 64}, 2 * 1_189_632),
    ],
    ids=str,
)
def test_trained_parameters_of_vit_b_beside_the_head(method, settings, count):
    with torch.device("meta"):
        built = METHODS[method](**settings).build(VitBackbone(timm.create_model("vit_base_patch16_224")))
    assert sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad) == count


def test_optimiser_and_counts_leave_out_what_gradients_do_not_train(vit, tmp_path):
    model = pt.PromptModel(vit, config_of("e2vpt"), num_classes=3)
    fixed = model.task_parameters().keys() - model.trained_parameters().keys()
    assert fixed == {f"method.{name}" for name in ("masks.token", "masks.segment", "initial.prompts", "initial.key")}
    width, depth = vit.width, vit.depth
    assert model.method.parameters_left() == depth * 3 * width + depth * 2 * width
    model.method.masks["token"].data[1] = 0
    model.method.masks["segment"].data[0, :2] = 0
    left = depth * (width + width // 2) + depth * 2 * width
    assert model.method.parameters_left() == left
    model.save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"{depth * 5 * width:,} parameters beside its head, of which pruning has left {left:,}" in card
    assert pt.PromptModel.load(tmp_path, vit).method.parameters_left() == left


def test_importance_is_the_gradient_of_the_masks_summed_without_signs(vit, images):
    model = drawn_model(vit, config_of("e2vpt")).train()
    method = model.method
    for mask in method.masks.values():
        mask.data.fill_(1.0)
    wanted = {name: torch.zeros_like(mask) for name, mask in method.masks.items()}
    for batch in (images, images.flip(-1) * 2):
        model(batch).logits.square().mean().backward()
        for mask in method.masks.values():
            mask.requires_grad_(True)
        gradients = torch.autograd.grad(model(batch).logits.square().mean(), list(method.masks.values()))
        for (name, mask), gradient in zip(method.masks.items(), gradients, strict=True):
            mask.requires_grad_(False)
            wanted[name] += gradient.abs()
    torch.testing.assert_close(method._token_importance, wanted["token"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(method._importance, wanted["segment"], rtol=1e-4, atol=1e-7)


def test_pruning_takes_the_least_important_and_rewinds_the_rest(vit, images):
    method = METHODS["e2vpt"](num_prompts=4, num_kv=2, segments=8, prune_tokens=0.5, prune_segments=0.29).build(vit)
    model = pt.PromptModel(vit, method.config, num_classes=3).train()
    method = model.method
    begun = {name: parameter.detach().clone() for name, parameter in method.named_parameters()}
    with torch.no_grad():
        method.prompts += 0.5
        method.key *= 2
    assert not method.end_epoch(0, 4)
    model(images).logits.square().mean().backward()
    tokens, segments = method._token_importance, method._importance
    assert method.end_epoch(1, 4)
    kept = method.masks["token"].bool()
    assert kept.sum() == 2
    assert tokens[kept].min() >= tokens[~kept].max()
    for importance, mask in zip(segments, method.masks["segment"].bool(), strict=True):
        assert mask.sum() == 8 - 2  # 0.29 of 8, rounded down
        assert importance[mask].min() >= importance[~mask].max()
    for name, parameter in method.named_parameters():
        if not name.startswith("masks."):
            assert torch.equal(parameter, begun[name]), name
    assert not method.end_epoch(2, 4)
    assert not method.end_epoch(3, 4)


def test_processes_of_a_data_parallel_run_prune_by_the_importance_of_all(vit, images, monkeypatch):
    model = pt.PromptModel(vit, METHODS["e2vpt"](num_prompts=4, segments=4), num_classes=3).train()
    model(images).logits.square().mean().backward()
    alone = model.method._token_importance.clone()

    def add_those_of_others(tensor):
        tensor.copy_(tensor.max() - tensor)  # others find the opposite

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", add_those_of_others)
    assert model.method.end_epoch(1, 4)
    kept = model.method.masks["token"].bool()
    assert alone[kept].max() <= alone[~kept].min()


def test_only_the_epoch_in_front_of_the_pruning_decides(vit, images):
    model = pt.PromptModel(vit, config_of("e2vpt"), num_classes=3).train()
    model(images).logits.square().mean().backward()
    assert not model.method.end_epoch(0, 4)
    with pytest.raises(TrainingError, match="no gradient of the prompts was seen"):
        model.method.end_epoch(1, 4)


def test_what_is_pruned_stays_zero_in_the_state_and_out_of_the_gradient(vit, images):
    model = drawn_model(vit, config_of("e2vpt")).train()
    model.method.masks["token"].data.copy_(torch.tensor([1.0, 0.0, 1.0]))
    model(images).logits.square().mean().backward()
    gone = model.method.mask() == 0
    assert gone[1].all()
    assert not gone.all()
    assert (model.task_state()["prompts"][0][:, gone] == 0).all()
    assert (model.method.prompts.grad[:, gone] == 0).all()


@pytest.fixture(scope="module")
def bars(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "bars", train=8, val=4)


PRUNED_RUN = {"method": "e2vpt", "epochs": 5, "prune_at": 0.4, "num_prompts": 4, "segments": 4, "prune_tokens": 0.5}


@pytest.fixture(scope="module")
def whole(bars, tmp_path_factory):
    """A run that prunes after the second of five epochs, and its news."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    news = []
    result = train(config(bars, tmp_path_factory.mktemp("runs") / "whole", **PRUNED_RUN), on_progress=news.append)
    torch.set_num_threads(threads)
    return result, news


def test_training_prunes_rewinds_and_begins_anew(whole):
    result, news = whole
    model = pt.PromptModel.load(result.path)
    method, state = model.method, load(RunFolder(result.path).last)
    assert method.masks["token"].sum() == 2
    assert (method.masks["segment"].sum(dim=1) == 2).all()
    assert result.best_epoch >= 3, "the best checkpoint is a pruned one"
    assert state.progression.rewound == 2
    depth, width = model.backbone.depth, model.backbone.width
    left, of = depth * (2 * width // 2 + 5 * width), depth * (4 + 5) * width
    assert method.parameters_left() == left
    head = sum(parameter.numel() for parameter in model.head.parameters())
    metrics = json.loads((result.path / "metrics.json").read_text())
    assert (metrics["run"]["task_parameters"], metrics["run"]["parameters_left"]) == (of + head, left + head)
    assert [one.text for one in news if "went back" in (one.text or "")] == [
        f"after epoch 2 e2vpt went back to its initial values; {left:,} of {of:,} parameters remain; "
        "optimiser, schedule and the best checkpoint start again"
    ]
    # 2 steps an epoch; three of them since the rewinding
    assert state.optimizer["step/method.prompts"] == 3 * 2
    history = metrics["history"]
    settings = config("-", "-", **PRUNED_RUN)
    rates = [learning_rate(settings, step, 2) for step in (1, 3)]
    rates += [learning_rate(settings, step, 2, epochs=3) for step in (1, 3, 5)]
    assert [record["lr"] for record in history] == rates
    assert rates[2] > rates[1]
    assert history[-1]["train_loss"] < history[2]["train_loss"]


@pytest.mark.usefixtures("one_thread", "no_pictures")
@pytest.mark.parametrize("stopped_in", [2, 3], ids=["before-the-pruning", "after-the-pruning"])
def test_a_stopped_run_goes_on_to_the_same_bits(bars, tmp_path, whole, stopped_in):
    class StopError(Exception):
        pass

    def stop(news):
        if (news.phase, news.epoch, news.step) == ("train", stopped_in, 1):
            raise StopError

    settings = config(bars, tmp_path / "run", **PRUNED_RUN)
    with pytest.raises(StopError):
        train(settings, on_progress=stop)
    result, (expected, _) = train(settings, resume=True), whole
    assert (result.path / MODEL).read_bytes() == (expected.path / MODEL).read_bytes()
    ours, theirs = load(RunFolder(result.path).last), load(RunFolder(expected.path).last)
    assert ours.task.keys() == theirs.task.keys()
    assert all(torch.equal(ours.task[name], theirs.task[name]) for name in theirs.task)
    assert ours.progression.rewound == theirs.progression.rewound


def test_new_tasks_start_as_the_papers_say(vit, images):
    fresh = METHODS["e2vpt"](num_prompts=50, num_kv=5).build(vit)
    bound = math.sqrt(6 / (5 * vit.head_dim))
    assert 0.9 * bound < fresh.key.abs().max() <= bound
    assert (fresh.mask() == 1).all()
    expres = pt.PromptModel(vit, METHODS["expres"](num_prompts=3), num_classes=3).eval()
    assert all((one == 0).all() for name, one in expres.method.named_parameters() if name != "prompts")


@pytest.mark.parametrize(
    ("method", "settings", "last"),
    [("e2vpt", {"num_prompts": 3}, 1), ("expres", {"num_prompts": 3}, 3)]
    + [(method, settings, 1) for method, settings in equations_weights.CASES[:-1]],
    ids=str,
)
def test_the_last_block_computes_what_the_head_reads(vit, images, monkeypatch, method, settings, last):
    rows, project = [], VitBlock.project

    def counted(block, attended):
        rows.append(attended.shape[1])
        return project(block, attended)

    monkeypatch.setattr(VitBlock, "project", counted)
    drawn_model(vit, METHODS[method](**settings))(images)
    tokens = vit.num_tokens + settings.get("num_prompts", 0)
    assert rows == [tokens] * (vit.depth - 1) + [last]


def test_segments_that_do_not_divide_the_width_are_refused_by_name(vit):
    with pytest.raises(BackboneError, match="7 segments do not divide the 64 channels of test_vit") as caught:
        METHODS["e2vpt"](segments=7).build(vit)
    assert "\n" not in str(caught.value)
    METHODS["e2vpt"](segments=7, prune_tokens=0, prune_segments=0).build(vit)


@pytest.mark.parametrize("method", ["e2vpt", "expres"])
def test_other_backbones_are_refused(method):
    swin = pt.load_backbone(SWINS[0], weights="random:0")
    with pytest.raises(BackboneError, match=f"{method} runs on VitBackbone, not on SwinBackbone"):
        METHODS[method]().build(swin)


def test_pruning_needs_epochs_on_both_sides():
    with pytest.raises(UsageError, match="e2vpt: pruning needs at least 2 epochs, not 1"):
        config("-", "-", method="e2vpt", epochs=1)
    config("-", "-", method="e2vpt", epochs=1, prune_tokens=0, prune_segments=0)
    settings = METHODS["e2vpt"](prune_at=0.01)
    assert [settings.epochs_before_pruning(epochs) for epochs in (2, 3, 100, 250)] == [1, 1, 1, 2]
    assert METHODS["e2vpt"](prune_at=0.99).epochs_before_pruning(3) == 2
    half_of_one = config("-", "-", method="e2vpt", epochs=1, num_prompts=1, prune_tokens=0.5, prune_segments=0)
    assert not half_of_one.method_config().prunes, "nothing to prune, so nothing is rewound"


@pytest.mark.parametrize("method", ["adaptformer", "lora"])
def test_a_new_task_is_the_plain_backbone(backbone, method, images):
    fresh = pt.PromptModel(backbone, METHODS[method](), num_classes=3).eval()
    torch.testing.assert_close(fresh(images).features, backbone(images), atol=2e-5, rtol=1e-4)


def test_new_serial_adapters_are_close_to_the_plain_backbone(vit, images):
    fresh = pt.PromptModel(vit, pt.AdapterConfig(), num_classes=3).eval()
    off = (fresh(images).features - vit(images)).abs().max()
    assert 0 < off < 1e-2
    assert max(parameter.abs().max() for parameter in fresh.method.parameters()) <= 2e-3


def test_ssf_starts_near_one_and_zero_and_is_the_plain_backbone_there(backbone, images):
    fresh = pt.PromptModel(backbone, pt.SSFConfig(), num_classes=3).eval()
    for place, scale in fresh.method.scale.items():
        assert abs(scale.mean() - 1) < 0.02
        assert 0.01 < scale.std() < 0.03
        assert 0.01 < fresh.method.shift[place].std() < 0.03
    for parameter in fresh.method.scale.values():
        parameter.data.fill_(1)
    for parameter in fresh.method.shift.values():
        parameter.data.zero_()
    torch.testing.assert_close(fresh(images).features, backbone(images), atol=2e-5, rtol=1e-4)


def test_gapt_starts_with_closed_gates_and_plain_attention(vit):
    state = pt.GaPTConfig(num_prompts=3, gate_init=5).build(vit).task_state()
    torch.testing.assert_close(state["gates"], torch.full((1, vit.depth - 1), 1 / (1 + np.exp(5))).float())
    assert torch.equal(state["sharpness"], torch.ones(1, vit.depth))


def test_gapt_with_open_gates_is_vpt_shallow(vit, images):
    gapt, vpt = (drawn_model(vit, config(num_prompts=3)) for config in (pt.GaPTConfig, pt.VPTShallowConfig))
    vpt.method.prompts.data.copy_(gapt.method.prompts.data.unsqueeze(0))
    gapt.method.gates.data.fill_(100.0)
    gapt.method.temperatures.data.fill_(1.0)
    torch.testing.assert_close(gapt(images).features, vpt(images).features, atol=2e-5, rtol=1e-4)


def test_gapt_temperatures_are_bounded_and_come_back(vit):
    """Training bounds the parameter itself: behind the bound it would go on drifting, and take as long to come back."""
    method = pt.GaPTConfig(num_prompts=2).build(vit).eval()
    method.temperatures.data[:3] = torch.tensor([-3.0, 0.5, 50.0])
    torch.testing.assert_close(method.task_state()["sharpness"][0, :3], torch.tensor([100.0, 2.0, 0.1]))
    assert method.temperatures[2] == 50, "evaluation changes no parameter"
    method.train()
    optimiser = torch.optim.SGD(method.parameters(), lr=0.5)

    def steps(count, wanted):
        for _ in range(count):
            optimiser.zero_grad()
            (1 / method.task_state()["sharpness"] - wanted).square().mean().backward()
            optimiser.step()
        return list(method.values_by_block()["temperature"].values())

    assert steps(60, 1000.0) == [10] * vit.depth
    assert steps(60, 2.0) == pytest.approx([2.0] * vit.depth, abs=0.01)


def test_a_task_of_lower_rank_is_padded_with_zeros(vit, images):
    for method, key in (("adaptformer", "adapters"), ("adapter", "mlp"), ("lora", "query")):
        model = drawn_model(vit, METHODS[method](rank=2))
        layout, state = model.state_layout(), model.task_state()
        assert layout[f"{key}.down"] == (vit.depth, vit.width, "rank")
        wide = {}
        for name, tensor in state.items():
            shape = [5 if axis == "rank" else size for axis, size in zip(layout[name], tensor.shape[1:], strict=True)]
            wide[name] = torch.zeros(1, *shape)
            wide[name][tuple(slice(size) for size in tensor.shape)] = tensor
        with torch.no_grad():
            padded = model.forward_state(images, wide).features
            torch.testing.assert_close(padded, model(images).features, atol=1e-5, rtol=1e-5)


def test_the_halves_of_a_block_are_timms_own(backbone, images):
    tokens = backbone.embed(images)
    with torch.no_grad():
        block = backbone.blocks[1]
        ours = tokens + block.self_attention(tokens, whole=True)
        torch.testing.assert_close(ours + block.mlp(ours), block.run_timm(tokens), atol=2e-5, rtol=1e-4)


def test_ssf_refuses_a_gated_mlp(vit, monkeypatch):
    gated = SimpleNamespace(timm=SimpleNamespace(mlp=torch.nn.Identity()))
    monkeypatch.setattr(vit, "blocks", (gated,))
    with pytest.raises(BackboneError, match=re.escape("ssf needs blocks with a plain MLP; test_vit has Identity")):
        pt.SSFConfig().build(vit)
