"""E²VPT and EXPRES, beside the matrix of all methods: counts, pruning and rewinding, refusals."""

import json
import math

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
from tests import engines
from tests.drawing import drawn_model
from tests.engines import config_of, noise
from tests.swins import SWINS
from tests.training_helpers import config, no_pictures, one_thread, write_folder  # noqa: F401

MODEL = "prompt_model.safetensors"


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
    ],
    ids=str,
)
def test_trained_parameters_of_vit_b(method, settings, count):
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


def test_the_last_block_computes_what_the_head_reads(vit, images, monkeypatch):
    rows, project = [], VitBlock.project

    def counted(block, attended):
        rows.append(attended.shape[1])
        return project(block, attended)

    monkeypatch.setattr(VitBlock, "project", counted)
    for method, last in (("e2vpt", 1), ("expres", 3)):
        rows.clear()
        drawn_model(vit, config_of(method))(images)
        assert rows == [vit.num_tokens + 3] * (vit.depth - 1) + [last]


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
