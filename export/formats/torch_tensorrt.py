"""Torch-TensorRT: the captured PyTorch program with TensorRT engines inside, as one file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from prompttune.errors import EngineError, UsageError, first_line
from prompttune.export.banks import needed_sizes
from prompttune.export.formats.base import BuildRequest, Built, ExportSettings, Format
from prompttune.export.formats.tensorrt_options import TensorRTOptions
from prompttune.export.graph import unbounded_attention
from prompttune.export.layout import (
    Range,
    TensorSpec,
    axis_ranges,
    bank_input,
    dynamic_axes,
    input_shapes,
    is_bank_input,
)
from prompttune.export.runtimes.tensorrt_compatibility import gpu_record
from prompttune.export.runtimes.tensorrt_library import require_cuda, require_torch_tensorrt
from prompttune.export.runtimes.torch_tensorrt import MODEL_FILE, versions


class TorchTensorRTFormat(Format):
    """``model.ep``. It runs with exactly the versions of torch and Torch-TensorRT and the kind of GPU that built it."""

    name, title = "torch-trt", "Torch-TensorRT"
    options = TensorRTOptions
    precisions = ("fp32", "fp16", "bf16")
    default_attention = "fused"
    default_device = "cuda"

    def check(self, settings: ExportSettings) -> None:
        """See :meth:`Format.check`.

        Raises:
            MissingExtraError: Torch-TensorRT is not installed.
            UsageError: Torch-TensorRT does not support a setting, or the device is not a GPU.
            EngineError: this machine does not have a GPU, or TensorRT's libraries do not load.
        """
        options = TensorRTOptions.parse(settings.options)
        if options.hardware_compatibility == "same_compute_capability":
            raise UsageError("torch-trt only supports the hardware_compatibility none and ampere_plus")
        require_torch_tensorrt()
        require_cuda(settings.target, "building a Torch-TensorRT engine")

    def build(self, request: BuildRequest, folder: Path) -> Built:
        """See :meth:`Format.build`."""
        settings, options = request.settings, TensorRTOptions.parse(request.settings.options)
        library = require_torch_tensorrt()
        index = require_cuda(settings.target, "building a Torch-TensorRT engine")
        device = f"cuda:{index}"
        traced = request.trace(device=device)
        needed = needed_sizes(request.model.state_layout(), request.states)
        ranges = widened(axis_ranges(traced.inputs, needed, request.axes))
        with torch.cuda.device(index), unbounded_attention(device):
            program = bounded(traced.program, traced.inputs, ranges, device)
            request.on_stage("compiling with Torch-TensorRT")
            compile_program(library, program, traced.inputs, ranges, options, settings.precision, folder / MODEL_FILE)
        details = {
            **versions(library),
            **gpu_record(index),
            "profile": {axis: list(sizes) for axis, sizes in ranges.items()},
            **options.to_dict(),
        }
        return Built(traced.inputs, traced.outputs, [MODEL_FILE], details=details)


class _Positional(nn.Module):
    """A graph with every bank tensor as a positional input: Torch-TensorRT does not support nested inputs."""

    def __init__(self, graph: nn.Module, inputs: Sequence[TensorSpec]) -> None:
        super().__init__()
        self.captured = graph  # not "graph": a traced module has an attribute of that name
        self.keys = [spec.name.removeprefix(bank_input("")) for spec in inputs if is_bank_input(spec.name)]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits [B, K, C] of the declared inputs in their order, the bank's tensors last."""
        own = len(inputs) - len(self.keys)
        bank = (dict(zip(self.keys, inputs[own:], strict=True)),) if self.keys else ()
        logits: Tensor = self.captured(*inputs[:own], *bank)
        return logits


def widened(ranges: Mapping[str, Range]) -> dict[str, Range]:
    """The ranges with a likeliest size of at least 2 on every dynamic axis: PyTorch treats a sample of 1 as fixed."""
    return {axis: (low, min(max(likely, 2), high), high) for axis, (low, likely, high) in ranges.items()}


def bounded(
    program: ExportedProgram, inputs: Sequence[TensorSpec], ranges: Mapping[str, Range], device: str
) -> ExportedProgram:
    """The program, captured again with bounds on its axes; raises :class:`EngineError` if that fails.

    Torch-TensorRT reads the smallest and largest size of an axis from the program instead of its own ``Input``, and the
    likeliest one from the sample that it was captured with.
    """
    dims = {axis: Dim(axis, min=low, max=high) for axis, (low, _, high) in ranges.items() if low < high}
    sample = tuple(
        torch.zeros(input_shapes(spec, ranges)[1], dtype=getattr(torch, spec.dtype), device=device) for spec in inputs
    )
    shapes = tuple(
        {place: dims[axis] for place, axis in enumerate(spec.shape) if isinstance(axis, str) and axis in dims}
        for spec in inputs
    )
    graph = _Positional(program.module(), inputs)
    try:
        with torch.no_grad():
            return torch.export.export(graph, sample, dynamic_shapes={"inputs": shapes})
    except Exception as problem:  # torch.export's errors share no base class below Exception
        raise EngineError(f"the graph cannot be captured for these sizes: {first_line(problem)}") from None


def compile_program(
    library: ModuleType,
    program: ExportedProgram,
    inputs: Sequence[TensorSpec],
    ranges: Mapping[str, Range],
    options: TensorRTOptions,
    precision: str,
    path: Path,
) -> None:
    """Compile a program with bounds on its axes, and write it; raises :class:`EngineError` if that fails."""
    compiler = library.dynamo.compile
    try:
        compiled = compiler(
            program,
            arg_inputs=[_declared(library, spec, ranges) for spec in inputs],
            **compile_settings(options, precision, inspect.signature(compiler).parameters),
        )
        # Without a retrace, because a new capture would need the bounds again.
        library.save(compiled, str(path), output_format="exported_program", retrace=False)
    except Exception as problem:  # Torch-TensorRT's errors share no base class below Exception
        raise EngineError(f"Torch-TensorRT failed: {first_line(problem)}") from problem


def _declared(library: ModuleType, spec: TensorSpec, ranges: Mapping[str, Range]) -> Any:
    low, likely, high = input_shapes(spec, ranges)
    dtype = getattr(torch, spec.dtype)
    if not dynamic_axes([spec]):
        return library.Input(shape=likely, dtype=dtype, name=spec.name)
    return library.Input(min_shape=low, opt_shape=likely, max_shape=high, dtype=dtype, name=spec.name)


def compile_settings(options: TensorRTOptions, precision: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for ``torch_tensorrt.dynamo.compile``; ``known`` are those of the installed version."""
    settings: dict[str, Any] = {
        "immutable_weights": True,  # a task is an input, so nothing is ever refitted
        "disable_tf32": precision == "fp32",
        "attn_bias_is_causal": False,  # by default a causal mask silently takes the place of a method's own
        "version_compatible": options.version_compatible,
        "hardware_compatible": options.hardware_compatibility == "ampere_plus",
        "optimization_level": options.optimization_level,
    }
    if options.workspace is not None:
        settings["workspace_size"] = options.workspace
    if options.timing_cache is not None:
        settings["timing_cache_path"] = str(options.timing_cache)
    if "use_explicit_typing" in known:  # from 2.13 on always, and no longer an argument
        settings["use_explicit_typing"] = True
    return settings
