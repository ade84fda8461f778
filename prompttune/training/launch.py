"""Lightning Fabric: devices, precision and the processes of a data parallel run.

Lightning is imported inside the functions: the import takes seconds, and the command line's help does not need it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from prompttune.errors import UsageError
from prompttune.training.config import PRECISIONS
from prompttune.training.scoring import resolve_device

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from prompttune.training.config import TrainConfig

T = TypeVar("T")
MOST_WORKERS = 8


def launch(config: TrainConfig) -> Fabric:
    """Create Fabric for a run and start its processes.

    Raises:
        UsageError: the devices do not exist, or do not support the precision.
    """
    device = resolve_device(config.device)
    if config.precision == "fp16" and device.type == "cpu":
        raise UsageError("precision fp16 needs a GPU; on the CPU use fp32 or bf16")
    if device.type == "cuda" and config.devices > torch.cuda.device_count():
        raise UsageError(f"devices is {config.devices}, but torch finds {torch.cuda.device_count()} GPUs")

    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    # without supervision of the prompt pathway, a late prompt map may not reach any output
    unsupervised = config.method_config().base_loss_weight == 1
    fabric = Fabric(
        accelerator=device.type,
        devices=config.devices if device.index is None else [device.index],
        strategy=DDPStrategy(find_unused_parameters=unsupervised) if config.devices > 1 else "auto",
        precision=PRECISIONS[config.precision],
    )
    fabric.launch()
    return fabric


def loader_workers(config: TrainConfig, device: torch.device) -> int:
    """Loader processes per device: the requested number, or enough to feed a GPU, or none next to a computing CPU."""
    if config.workers is not None:
        return config.workers
    return 0 if device.type == "cpu" else min(MOST_WORKERS, (os.cpu_count() or 1) // config.devices)


def on_rank_zero(fabric: Fabric, action: Callable[[], T]) -> T:
    """Run something only in the first process; every process gets its result or its error."""
    outcome: T | None = None
    problem: Exception | None = None
    if fabric.is_global_zero:
        try:
            outcome = action()
        except Exception as raised:  # raised in every process
            problem = raised
    outcome, problem = fabric.broadcast((outcome, problem))
    if problem is not None:
        raise problem
    return outcome


def gather_lines(fabric: Fabric, lines: Sequence[T]) -> list[T]:
    """The lines of all processes, those of the first process first."""
    if fabric.world_size == 1:
        return list(lines)
    gathered: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(gathered, list(lines))
    return [line for part in gathered for line in part]


def sum_over(fabric: Fabric, tensor: Tensor) -> Tensor:
    """Sum of a tensor over the processes, on the device; the tensor itself in a single one."""
    if fabric.world_size > 1:
        tensor = tensor.to(fabric.device)
        torch.distributed.all_reduce(tensor)  # Fabric's own waits for all processes first
    return tensor


def fetched(tensor: Tensor) -> Callable[[], list[float]]:
    """Start to copy a tensor to the host; what is returned gives its values, and waits for a GPU only then."""
    host = tensor.to("cpu", non_blocking=True)  # from a GPU into page-locked memory
    copied = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def values() -> list[float]:
        if copied is not None:
            copied.synchronize()
        return list(host.tolist())

    return values
