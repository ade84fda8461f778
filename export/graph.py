"""The multi-task graph: the model's own forward, fed from a bank of task states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from prompttune.errors import EngineError, first_line
from prompttune.export.banks import BankForm, stack_states
from prompttune.export.layout import (
    BATCH,
    HEAD,
    STATE,
    TensorSpec,
    declare_inputs,
    declare_outputs,
    dynamic_axes,
    is_by_class,
)
from prompttune.export.layout import State as HostState
from prompttune.export.precision.casting import TORCH_DTYPES, typed_model
from prompttune.layers.attention import explicit_attention
from prompttune.layers.probe import recording
from prompttune.methods.base import State
from prompttune.model import PromptModel

# Sizes to trace with: primes that occur nowhere else in a model, so that axes cannot be confused.
_SAMPLE_AXES = (3, 2, 5, 7, 11, 13, 17, 19, 23, 29)


OnProbes = Callable[[list[str]], None]


class MultiTaskGraph(nn.Module):
    """Every image of a batch is answered for the K tasks that its ``task_index`` names.

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
        # The head's alone: methods fold their own states in float32, which this model may not be in.
        self.by_class = [key for key, shape in model.head.state_layout().items() if is_by_class(shape)]

    def forward(
        self,
        image: Tensor,
        task_index: Tensor,
        class_rows: Tensor,
        class_index: Tensor,
        bank: Mapping[str, Tensor],
    ) -> Tensor | tuple[Tensor, ...]:
        """Logits float32 [B, K, C] (for a segmentation [B, K, C, h, w]) of images [B, 3, S, S].

        Args:
            image: normalised float32 images [B, 3, S, S].
            task_index: int64 [B, K], the bank row of each task that an image is asked about.
            class_rows: int64 [R], the rows of the head that the call needs, row 0, which is padding, first.
            class_index: int64 [B, K, C], the place of each class among them.
            bank: the states of T tasks by key, see :mod:`prompttune.export.banks`.
        """
        return self._answers(image, task_index, class_index, self._choose(bank, class_rows))

    def _choose(self, bank: Mapping[str, Tensor], class_rows: Tensor) -> dict[str, Tensor]:
        """The bank with the chosen rows of the head alone."""
        return {key: one.index_select(0, class_rows) if key in self.by_class else one for key, one in bank.items()}

    def _answers(
        self, image: Tensor, task_index: Tensor, class_index: Tensor, bank: Mapping[str, Tensor]
    ) -> Tensor | tuple[Tensor, ...]:
        """See :meth:`forward`; ``bank`` has the chosen rows of the head."""
        with recording() as recorded:
            logits = self._logits(self.model.image_state(image), task_index, class_index, bank)
        if self.probes is None:
            return logits
        self.probes(list(recorded))
        return (logits, *recorded.values())

    def _logits(self, found: State, task_index: Tensor, class_index: Tensor, bank: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`forward`, for an image state."""
        asked, head = task_index.shape[1], self.model.head
        # index_select becomes a plain Gather; bank[task_index] would become a GatherND.
        rows = {key: one.index_select(0, task_index.flatten()) for key, one in bank.items() if key not in self.by_class}
        for key in self.by_class:
            if head.size:  # maps are large: each row gets its own classes
                every = bank[key].index_select(0, class_index.flatten())
                rows[key] = every.unflatten(0, (task_index.numel(), class_index.shape[2]))
            else:  # one task with all classes; each row's own are chosen behind the product
                rows[key] = bank[key].unsqueeze(0)
        if not self.model.only_reads:
            found = {key: _repeated(one, asked) for key, one in found.items()}
        # Rows are converted after the gather, because the bank may hold thousands of tasks.
        logits: Tensor = self.model.answer(found, _typed_state(rows, self.dtype)).logits.float()
        if head.size:
            maps: Tensor = logits.unflatten(0, (task_index.shape[0], asked))
            return maps
        taskless = self.model.only_reads and all(key.startswith(HEAD) for key in bank)
        return _chosen(logits, class_index, taskless)


def _chosen(logits: Tensor, class_index: Tensor, taskless: bool) -> Tensor:
    """The classes [B, K, C] that each row asks for, of logits [B K, R], or [B, R] of features without a task."""
    count, width = logits.shape
    first = torch.arange(count, device=logits.device) * width
    first = first[:, None, None] if taskless else first.view(*class_index.shape[:2], 1)
    return logits.flatten().index_select(0, (class_index + first).flatten()).view(class_index.shape)


def _repeated(tensor: Tensor, asked: int) -> Tensor:
    """Each image's row of [B, ...] once for each task that it is asked about, [B K, ...]."""
    return tensor.unsqueeze(1).expand(-1, asked, *tensor.shape[1:]).flatten(0, 1)


class ImageGraph(nn.Module):
    """The image state alone, its tensors in order."""

    def __init__(self, model: PromptModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """The image state [B, ...] of normalised float32 images [B, 3, S, S]."""
        return tuple(self.model.image_state(image).values())


class TaskGraph(MultiTaskGraph):
    """What is left of the graph when the image state is known."""

    def forward(  # type: ignore[override]
        self,
        found: Mapping[str, Tensor],
        task_index: Tensor,
        class_rows: Tensor,
        class_index: Tensor,
        bank: Mapping[str, Tensor],
    ) -> Tensor:
        """See :meth:`MultiTaskGraph.forward`, from an image state."""
        return self._logits(dict(found), task_index, class_index, self._choose(bank, class_rows))


class BakedGraph(MultiTaskGraph):
    """The same graph with the bank as constants of the model."""

    def __init__(
        self,
        model: PromptModel,
        bank: Mapping[str, Tensor],
        classes: Tensor,
        dtype: torch.dtype = torch.float32,
        probes: OnProbes | None = None,
    ) -> None:
        super().__init__(model, dtype, probes)
        self.keys = list(bank)
        self.register_buffer("classes", classes)  # [T, C], the class rows of each task
        for number, tensor in enumerate(bank.values()):
            self.register_buffer(f"bank_{number}", tensor)  # a key has dots, a buffer's name must not

    def forward(self, image: Tensor, task_index: Tensor) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        """See :meth:`MultiTaskGraph.forward`; all tasks have as many classes as the widest."""
        bank = {key: self.get_buffer(f"bank_{number}") for number, key in enumerate(self.keys)}
        classes = self.get_buffer("classes")
        index = classes.index_select(0, task_index.flatten()).unflatten(0, task_index.shape)
        return self._answers(image, task_index, index, bank)


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
    baked: Mapping[str, HostState] | None = None,
    probes: bool = False,
    device: str = "cpu",
) -> Traced:
    """Capture the multi-task graph with every axis dynamic.

    Args:
        model: a model in fp32; the graph answers for every task that fits it.
        precision: fp32, fp16 or bf16, for weights and activations.
        bank_precision: fp32, fp16 or bf16, for the bank's tensors.
        attention: ``explicit``, ``cpu`` (explicit, for runtimes on a CPU) or ``fused``, see
            :mod:`prompttune.layers.attention`.
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
    names: dict[str, None] = {}  # the forward is traced more than once
    told = (lambda found: names.update(dict.fromkeys(found))) if probes else None
    graph: MultiTaskGraph
    if baked is None:
        graph = MultiTaskGraph(typed, dtype, told)
        inputs, outputs = declare_inputs(layout, size, bank_precision), declare_outputs(size=model.head.size)
    else:
        stacked = stack_states(BankForm(layout), baked.values())
        rows = {key: torch.from_numpy(value).to(bank_dtype) for key, value in stacked.rows.items()}
        classes = torch.from_numpy(stacked.table())
        graph = BakedGraph(typed, rows, classes, dtype, told)
        inputs, outputs = declare_inputs({}, size), declare_outputs(classes.shape[1], model.head.size)
    sample, dynamic = _samples(inputs)
    program = capture(graph, sample, dynamic, attention, device, model.config.method)
    return Traced(program, inputs, outputs, dynamic, list(names))


def trace_parts(model: PromptModel, precision: str, bank_precision: str, attention: str) -> tuple[Traced, Traced]:
    """Capture the image's part and the tasks' part of the multi-task graph, see :func:`trace`.

    The outputs of the first, ``state.<key>``, are inputs of the second in the place of the image.
    """
    layout, size = model.state_layout(), model.backbone.image_size
    typed, dtype = typed_model(model, precision), TORCH_DTYPES[precision]
    with torch.no_grad():
        found = typed.image_state(torch.zeros(1, 3, size, size))
    states = [
        TensorSpec(f"{STATE}{key}", str(one.dtype).removeprefix("torch."), (BATCH, *one.shape[1:]))
        for key, one in found.items()
    ]
    inputs = declare_inputs(layout, size, bank_precision)
    parts = (
        (ImageGraph(typed), inputs[:1], states),
        (TaskGraph(typed, dtype), [*states, *inputs[1:]], declare_outputs(size=model.head.size)),
    )
    traced = []
    for graph, given, made in parts:
        sample, dynamic = _samples(given)
        program = capture(graph, sample, dynamic, attention, "cpu", model.config.method)
        traced.append(Traced(program, given, made, dynamic, []))
    return traced[0], traced[1]


def _samples(inputs: Sequence[TensorSpec]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments to trace a graph with, and the names of their dynamic axes; a bank and an image state are dicts."""
    sizes = dict(zip(dynamic_axes(inputs), _SAMPLE_AXES, strict=False))
    arguments: dict[str, Any] = {}
    dynamic: dict[str, Any] = {}
    for spec in inputs:
        group, _, key = spec.name.partition(".")
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
        made = torch.zeros(shape, dtype=getattr(torch, spec.dtype))
        axes = {place: axis for place, axis in enumerate(spec.shape) if isinstance(axis, str)}
        if key:
            group = "found" if spec.name.startswith(STATE) else group
            arguments.setdefault(group, {})[key] = made
            dynamic.setdefault(group, {})[key] = axes
        else:
            arguments[group], dynamic[group] = made, axes
    return list(arguments.values()), dynamic


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
        with torch.no_grad(), explicit_attention(attention != "fused", attention == "cpu"), unbounded_attention(device):
            shapes = tree_map(lambda name: dims[name], dynamic)
            return torch.export.export(graph.eval().to(device), arguments, dynamic_shapes=shapes)
    except Exception as problem:
        raise EngineError(f"cannot capture the graph of {name}: {first_line(problem)}") from problem
