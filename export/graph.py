"""The multi-task graph: the model's own forward, fed from a bank of task states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from prompttune.errors import EngineError, first_line
from prompttune.export.layout import (
    BATCH,
    HEAD,
    HEAD_BIAS,
    IMAGE,
    TASK_INDEX,
    TASKS,
    Layout,
    State,
    TensorSpec,
    declare_inputs,
    declare_outputs,
    stack_states,
)
from prompttune.export.precision.casting import TORCH_DTYPES, typed_model
from prompttune.layers.attention import explicit_attention
from prompttune.layers.probe import recording
from prompttune.model import PromptModel

# Sizes to trace with: primes that occur nowhere else in a model, so that axes cannot be confused.
_SAMPLE_BATCH, _SAMPLE_TASKS, _SAMPLE_AXES = 3, 5, (7, 11, 13, 17)


OnProbes = Callable[[list[str]], None]


class MultiTaskGraph(nn.Module):
    """Every row of a batch answers for the task that its ``task_index`` names.

    Args:
        model: backbone and method; :func:`prompttune.export.precision.casting.typed_model` gives it a lower precision.
        dtype: dtype of the model's activations.
        probes: called with the names of intermediate results, which are then returned after the logits.
    """

    def __init__(self, model: PromptModel, dtype: torch.dtype = torch.float32, probes: OnProbes | None = None) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.probes = probes

    def forward(self, image: Tensor, task_index: Tensor, bank: Mapping[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        """Logits float32 [B, C] (for a segmentation [B, C, h, w]) of images [B, 3, S, S].

        Args:
            image: normalised float32 images [B, 3, S, S].
            task_index: int64 [B], the bank row of each image's task.
            bank: tensors [T, ...] by key, the states of T tasks.
        """
        # index_select becomes a plain Gather; bank[task_index] would become a GatherND.
        rows = {key: tensor.index_select(0, task_index) for key, tensor in bank.items()}
        with recording() as recorded:
            # Rows are converted after the gather, because the bank may hold thousands of tasks.
            logits = self.model.forward_state(image, _typed_state(rows, self.dtype)).logits.float()
        if self.probes is None:
            return logits
        self.probes(list(recorded))
        return (logits, *recorded.values())


class BakedGraph(MultiTaskGraph):
    """The same graph with the bank as constants of the model."""

    def __init__(
        self,
        model: PromptModel,
        bank: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
        probes: OnProbes | None = None,
    ) -> None:
        super().__init__(model, dtype, probes)
        self.keys = list(bank)
        for number, tensor in enumerate(bank.values()):
            self.register_buffer(f"bank_{number}", tensor)  # a key has dots, a buffer's name must not

    def forward(self, image: Tensor, task_index: Tensor) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        """See :meth:`MultiTaskGraph.forward`."""
        bank = {key: self.get_buffer(f"bank_{number}") for number, key in enumerate(self.keys)}
        return super().forward(image, task_index, bank)


def _typed_state(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A state in the precision of the activations, the head in float32."""
    return {key: row.float() if key.startswith(HEAD) else row.to(dtype) for key, row in state.items()}


@dataclass(frozen=True)
class Traced:
    """A captured graph, from which all export formats start."""

    program: ExportedProgram
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    dynamic: dict[str, Any]
    """Names of dynamic axes, by argument and axis, nested like the arguments."""
    probes: list[str]
    """Names of the outputs after the logits."""


def trace(
    model: PromptModel,
    *,
    precision: str = "fp32",
    bank_precision: str = "fp32",
    attention: str = "fused",
    baked: Mapping[str, State] | None = None,
    probes: bool = False,
    device: str = "cpu",
) -> Traced:
    """Capture the multi-task graph with every axis dynamic.

    Args:
        model: a model in fp32; the graph answers for every task that fits it.
        precision: fp32, fp16 or bf16, for weights and activations.
        bank_precision: fp32, fp16 or bf16, for the bank's tensors.
        attention: ``explicit`` or ``fused``, see :mod:`prompttune.layers.attention`.
        baked: tasks that become constants of the graph; None keeps the bank as an input.
        probes: whether to return intermediate results as further outputs.
        device: device of the graph's constants.

    Raises:
        EngineError: the forward cannot be captured, or it fixes an axis that must stay dynamic.
    """
    layout, size = model.state_layout(), model.backbone.image_size
    typed, dtype, bank_dtype = typed_model(model, precision), TORCH_DTYPES[precision], TORCH_DTYPES[bank_precision]
    # The caller's own stays what and where it is.
    typed = copy.deepcopy(typed).to(device) if device != "cpu" and typed is model else typed.to(device)
    sample: list[Any] = [torch.zeros(_SAMPLE_BATCH, 3, size, size), torch.arange(_SAMPLE_BATCH)]
    dynamic: dict[str, Any] = {IMAGE: {0: BATCH}, TASK_INDEX: {0: BATCH}}
    names: dict[str, None] = {}  # the forward is traced more than once
    told = (lambda found: names.update(dict.fromkeys(found))) if probes else None
    graph: MultiTaskGraph
    if baked is None:
        graph = MultiTaskGraph(typed, dtype, told)
        sample.append(_sample_bank(layout, bank_dtype))
        dynamic["bank"] = {
            key: {place: axis for place, axis in enumerate((TASKS, *shape)) if isinstance(axis, str)}
            for key, shape in layout.items()
        }
        inputs, outputs = declare_inputs(layout, size, bank_precision), declare_outputs(size=model.head.size)
    else:
        stacked = stack_states(layout, baked.values())
        rows = {key: torch.from_numpy(value).to(bank_dtype) for key, value in stacked.items()}
        graph = BakedGraph(typed, rows, dtype, told)
        inputs, outputs = declare_inputs({}, size), declare_outputs(stacked[HEAD_BIAS].shape[1], model.head.size)
    program = capture(graph, sample, dynamic, attention, device, model.config.method)
    return Traced(program, inputs, outputs, dynamic, list(names))


def _sample_bank(layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    names = dict.fromkeys(axis for shape in layout.values() for axis in shape if isinstance(axis, str))
    axes = dict(zip(names, _SAMPLE_AXES, strict=False))
    shapes = {key: [axes[axis] if isinstance(axis, str) else axis for axis in shape] for key, shape in layout.items()}
    return {key: torch.zeros(_SAMPLE_TASKS, *shape, dtype=dtype) for key, shape in shapes.items()}


def unbounded_attention(device: str) -> AbstractContextManager[None]:
    """Keep a CUDA device's attention to kernels that take any batch size: asked for flash attention in half precision,
    PyTorch 2.15 bounds the captured batch to 65,535 rows, which ``Dim`` without a bound refuses.
    """
    kernels = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return nullcontext() if torch.device(device).type == "cpu" else sdpa_kernel(kernels)


def capture(
    graph: nn.Module, sample: list[Any], dynamic: dict[str, Any], attention: str, device: str, name: str
) -> ExportedProgram:
    """Capture a module: ``sample`` arguments have sizes that no other axis has, ``dynamic`` names axes by argument.

    Raises:
        EngineError: the module cannot be captured.
    """
    names = dict.fromkeys(one for one in tree_leaves(dynamic) if isinstance(one, str))
    dims = {name: Dim(name, min=1) for name in names}
    arguments = tree_map(lambda tensor: tensor.to(device), tuple(sample))
    try:
        with torch.no_grad(), explicit_attention(attention == "explicit"), unbounded_attention(device):
            shapes = tree_map(lambda name: dims[name], dynamic)
            return torch.export.export(graph.eval().to(device), arguments, dynamic_shapes=shapes)
    except Exception as problem:
        raise EngineError(f"cannot capture the graph of {name}: {first_line(problem)}") from problem
