"""What a training step asks of its device: nothing that a GPU would stand still for, and no cast twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import prompttune as pt
from prompttune.backbones import load_backbone
from prompttune.errors import TrainingError
from prompttune.methods import METHODS, MethodConfig
from prompttune.training import TrainResult, train
from prompttune.training import run as runs
from prompttune.training.launch import fetched
from prompttune.training.optim import Objective, make_optimizer, optimizer_tensors, restore_optimizer
from prompttune.training.run import Run
from prompttune.training.state import load
from tests import convs, swins  # noqa: F401  (registers tiny models)
from tests.drawing import default_configs, drawn_backbone, drawn_model
from tests.training_helpers import SIDE, config, no_pictures, one_thread, write_folder  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "lift_fresh", "equal")
"""Operators that wait for a GPU: reads of values, sizes that depend on values, tensors made of Python's numbers."""


@pytest.fixture(scope="module")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "bars", train=12, val=2)  # three steps


class Watch(TorchDispatchMode):
    """Notes what a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name == "index" and any(one is not None and one.dtype == torch.bool for one in args[1])
        if not self.paused and (masks or name.startswith(READS)):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_no_step_reads_from_its_device(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    watch, step, update = Watch(), Run._step, torch.optim.AdamW.step

    def watched(self: Run, batch: Any) -> torch.Tensor:
        with watch:
            return step(self, batch)

    def updated(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        watch.paused = True  # it counts its steps on the host
        update(self, *args, **kwargs)
        watch.paused = False

    monkeypatch.setattr(Run, "_step", watched)
    monkeypatch.setattr(torch.optim.AdamW, "step", updated)
    small = next(one for one in default_configs() if one.method == method).to_dict()
    small.pop("clusters", None)
    settings: dict[str, Any] = {**small, "method": method, "epochs": 2, "precision": "bf16", "grad_clip": 1.0}
    train(config(bars, tmp_path / "run", **settings))
    assert watch.found == []


def test_the_watch_notices_reads() -> None:
    values = torch.arange(3.0)
    for read in (lambda: values[0].item(), lambda: values[values > 1], lambda: bool(values.sum()), values.nonzero,
                 lambda: values.new_tensor(2.0)):  # fmt: skip
        with Watch() as watch:
            read()
        assert watch.found


def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The order of steps and reads of a run."""
    order: list[str] = []
    step, read = Run._step, runs.fetched

    def stepped(self: Run, batch: Any) -> torch.Tensor:
        order.append("step")
        return step(self, batch)

    def noted(tensor: torch.Tensor) -> Any:
        values = read(tensor)
        return lambda: order.append("read") or values()

    monkeypatch.setattr(Run, "_step", stepped)
    monkeypatch.setattr(runs, "fetched", noted)
    return order


def figures(result: TrainResult) -> list[tuple[Any, ...]]:
    return [(one["train_loss"], one["train_top1"], one["lr"], one["val_loss"]) for one in result.metrics["history"]]


def test_figures_are_read_a_step_late_on_a_gpu_and_change_nothing(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, steps = traced(monkeypatch), []

    def run(name: str) -> TrainResult:
        order.clear()
        steps.clear()
        settings = config(bars, tmp_path / name, epochs=2)
        return train(settings, on_progress=lambda news: news.phase == "train" and steps.append((news.epoch, news.step)))

    at_once = run("cpu")
    assert order == ["step", "read"] * 6
    monkeypatch.setattr(runs, "READ_LATE", ("cpu",))
    late = run("late")
    assert order == ["step", "step", "read", "step", "read", "read"] * 2
    assert steps == [(epoch, step) for epoch in (1, 2) for step in (1, 2, 3)]
    assert figures(late) == figures(at_once)
    files = [(tmp_path / name / "prompt_model.safetensors").read_bytes() for name in ("cpu", "late")]
    assert files[0] == files[1]


@pytest.mark.parametrize("at", [4, 5, 6])
def test_divergence_that_is_noticed_late_names_its_own_step(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(runs, "READ_LATE", ("cpu",))
    forward, numbers = Objective.forward, iter(range(1, 100))

    def poisoned(self: Objective, *batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, logits = forward(self, *batch)
        return (loss * float("nan") if next(numbers) == at else loss), logits

    monkeypatch.setattr(Objective, "forward", poisoned)
    with pytest.raises(TrainingError, match=f"the loss is nan at epoch 2, step {at - 3};"):
        train(config(bars, tmp_path / "run", epochs=3))
    saved = load(tmp_path / "run" / "last.safetensors")
    assert saved.progression.epoch == 1
    assert all(bool(value.isfinite().all()) for value in saved.task.values())


def test_values_of_a_gpu_are_waited_for_when_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Event:
        def synchronize(self) -> None:
            told.append("waited")

    class Stream:
        def record_event(self) -> Event:
            told.append("recorded")
            return Event()

    class OnGpu:
        is_cuda, device = True, "cuda:1"

        def to(self, device: str, non_blocking: bool = False) -> torch.Tensor:
            assert (device, non_blocking) == ("cpu", True)
            told.append("copying")
            return torch.tensor([1.0, 2.0])

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: told.append(device) or Stream())
    values = fetched(OnGpu())  # type: ignore[arg-type]
    assert told == ["copying", "cuda:1", "recorded"]
    assert values() == [1.0, 2.0]
    assert told[3:] == ["waited"]


# ------------------------------------------------------------------------------------------- the frozen weights' type

CASES = [
    *((one, "test_vit") for one in default_configs()),
    *((METHODS["vpt-deep"](num_prompts=3), name) for name in ("test_vit2", "test_swin2")),
    *((METHODS["sa2vp"](rank=4), name) for name in ("test_vit2", "test_swin2", "test_resnet3", "test_convnext4")),
]  # fmt: skip


class Casts(TorchDispatchMode):
    """Counts conversions of some tensors."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self._pointers = {one.untyped_storage().data_ptr() for one in tensors}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "_to_copy":
            self.count += args[0].untyped_storage().data_ptr() in self._pointers
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted(model: pt.PromptModel) -> Iterator[Casts]:
    layers = [one for one in model.backbone.modules() if isinstance(one, (torch.nn.Linear, torch.nn.Conv2d))]
    with Casts([one.weight for one in layers]) as casts:
        yield casts


@pytest.mark.parametrize(("settings", "name"), CASES, ids=[f"{one.method}-{name}" for one, name in CASES])
def test_weights_cast_once_give_the_same_bits(settings: MethodConfig, name: str, tmp_path: Path) -> None:
    backbone = drawn_backbone(name, tmp_path, 64)
    model = drawn_model(backbone, settings).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 2])

    def step() -> tuple[list[torch.Tensor], int]:
        torch.manual_seed(1)
        model.zero_grad()
        with counted(model) as casts, torch.autocast("cpu", torch.bfloat16):
            output = model(images)
            loss = pt.loss(output, targets)
        loss.backward()
        grads = [one.grad for one in model.trained_parameters().values() if one.grad is not None]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model.eval()
            evaluated = model(images).logits
            model.train()
        return [loss.detach(), output.logits.detach(), evaluated, *grads], casts.count

    expected, cast = step()
    with backbone.matrices_in(torch.bfloat16):
        found, cast_again = step()
    assert len(found) == len(expected) > 3
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert cast_again == 0 < cast or settings.method == "full"  # which trains a copy
    after = backbone.state_dict()
    assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in before.items())
    assert all(torch.equal(one, other) for one, other in zip(step()[0], expected, strict=True))


def test_a_run_in_half_precision_gives_the_backbone_back(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone("test_vit", SIDE, "random:0")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    seen = []
    epoch = Run._epoch
    monkeypatch.setattr(
        Run, "_epoch", lambda self: seen.append(backbone.blocks[0].timm.mlp.fc1.weight.dtype) or epoch(self)
    )
    train(config(bars, tmp_path / "run", epochs=1, precision="bf16"), backbone)

    def stop(news: Any) -> None:
        if news.phase == "train":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(bars, tmp_path / "broken", epochs=1, precision="bf16"), backbone, on_progress=stop)
    assert seen == [torch.bfloat16] * 2
    after = backbone.state_dict()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    assert backbone.token_dtype is None


# ------------------------------------------------------------------------------------------------------- the scaler


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_optimiser_of_fp16_needs_no_word_from_the_host(bars: Path, tmp_path: Path, name: str) -> None:
    def made(**changes: Any) -> torch.optim.Optimizer:
        weight = torch.nn.Parameter(torch.ones(3))
        return make_optimizer(config(bars, tmp_path, optimizer=name, device="cuda", **changes), {"weight": weight})

    fused = made(precision="fp16")
    assert getattr(fused, "_step_supports_amp_scaling", False)
    assert not getattr(made(precision="bf16"), "_step_supports_amp_scaling", False)
    assert not getattr(
        made(precision="fp16", grad_clip=1.0), "_step_supports_amp_scaling", False
    )  # Fabric refuses both
    resumed = made(precision="fp16")
    for optimizer in (fused, resumed):
        if optimizer is resumed:
            tensors, others = optimizer_tensors(fused, ["weight"])
            copies = {key: value.clone() for key, value in tensors.items()}
            restore_optimizer(resumed, ["weight"], {**copies, **others})
            resumed.param_groups[0]["params"][0].data.copy_(fused.param_groups[0]["params"][0])
            fused.param_groups[0]["params"][0].grad = torch.ones(3)
            fused.step()
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(fused.param_groups[0]["params"][0], resumed.param_groups[0]["params"][0])
