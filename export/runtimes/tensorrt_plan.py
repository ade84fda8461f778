"""Running a plan.

TensorRT reports failures by a return value and in its log, so every one is checked here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prompttune.errors import EngineError, first_line
from prompttune.export.layout import LOGITS, TensorSpec, is_bank_input
from prompttune.export.runtimes.tensorrt_layers import summarise
from prompttune.export.runtimes.tensorrt_library import TensorRT, error_log
from prompttune.export.runtimes.tensors import CAPTURE_LOCK, check_tensors

if TYPE_CHECKING:
    import tensorrt as trt
    from tensorrt import ICudaEngine

STREAMS = 2
"""Calls that run at once: while one computes, the next one's images are copied."""
_GRAPHS = 8
"""CUDA graphs that a stream keeps, each with an execution context and its memory; the longest unused one goes first."""
_PROFILE = 0


class TensorRTPlan:
    """A plan, deserialised for the current CUDA device.

    Raises:
        EngineError: TensorRT cannot open it, or its tensors are not the declared ones.
    """

    def __init__(
        self,
        trt: TensorRT,
        path: Path,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        version_compatible: bool,
    ) -> None:
        self._trt = trt
        self.log = error_log(trt)
        self.log.clear()
        try:
            self._runtime = trt.Runtime(self.log.logger)
            if version_compatible:
                self._runtime.engine_host_code_allowed = True
            engine: ICudaEngine | None = self._runtime.deserialize_cuda_engine(path.read_bytes())
        except (RuntimeError, TypeError) as problem:  # pybind11 turns TensorRT's null pointers into these
            raise self.log.failure(f"TensorRT cannot open {path}", first_line(problem)) from None
        if engine is None:
            raise self.log.failure(f"TensorRT cannot open {path}")
        self._engine = engine
        self._contexts = threading.Lock()
        self.dtypes = {spec.name: getattr(torch, spec.dtype) for spec in (*inputs, *outputs)}
        self._check_tensors(path, {spec.name for spec in inputs}, {spec.name for spec in outputs})

    def _check_tensors(self, path: Path, inputs: set[str], outputs: set[str]) -> None:
        trt, engine = self._trt, self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        found = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        if {name for name in names if found[name]} != inputs or {name for name in names if not found[name]} != outputs:
            raise EngineError(f"{path} has the tensors {', '.join(names)}, not the declared ones: export it again")
        known = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
            trt.DataType.INT64: torch.int64,
        }
        for name in names:
            dtype = engine.get_tensor_dtype(name)
            if known.get(dtype) != self.dtypes[name]:
                raise EngineError(f"{path}: {name} is {dtype}, declared was {self.dtypes[name]}: export it again")

    def layers(self) -> dict[str, Any]:
        """Figures of its layers: see :func:`~prompttune.export.runtimes.tensorrt_layers.summarise`."""
        form = self._trt.LayerInformationFormat.JSON
        return summarise(self._engine.create_engine_inspector().get_engine_information(form))

    def new_context(self, stream: torch.cuda.Stream) -> trt.IExecutionContext:
        """An execution context on ``stream``, with the plan's profile."""
        with self._contexts:
            context: trt.IExecutionContext | None = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(_PROFILE, stream.cuda_stream):
            raise self.log.failure("TensorRT cannot make an execution context")
        stream.synchronize()
        return context


class Session:
    """An execution context on a stream; for one thread at a time."""

    def __init__(self, plan: TensorRTPlan, stream: torch.cuda.Stream) -> None:
        self._plan = plan
        self._stream = stream
        self._context = plan.new_context(stream)

    def bind(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Give TensorRT the inputs' shapes and addresses; returns the tensor that will hold the logits [B, C].

        The caller keeps all of them alive until the stream is synchronised.
        """
        check_tensors(inputs, self._plan.dtypes)
        for name, tensor in inputs.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise self._plan.log.failure(f"TensorRT refuses the shape {list(tensor.shape)} of {name}")
            self._bind_address(name, tensor)
        missing = self._context.infer_shapes()
        if missing:
            raise self._plan.log.failure(f"TensorRT lacks {', '.join(missing)}")
        dims = self._context.get_tensor_shape(LOGITS)
        shape = [dims[axis] for axis in range(len(dims))]
        logits = torch.empty(shape, dtype=self._plan.dtypes[LOGITS], device=self._stream.device)
        self._bind_address(LOGITS, logits)
        return logits

    def _bind_address(self, name: str, tensor: Tensor) -> None:
        if not self._context.set_tensor_address(name, tensor.data_ptr()):
            raise self._plan.log.failure(f"TensorRT refuses the address of {name}")

    def enqueue(self) -> None:
        """Start a run on the stream."""
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise self._plan.log.failure("TensorRT failed to run")


class CapturedSession:
    """A session whose run is a CUDA graph: shapes and addresses are frozen, images and indices are copied in.

    It has an execution context of its own, because a captured graph goes on using it: binding another shape there
    would change what the graph does. Hold :data:`CAPTURE_LOCK` to make one.
    """

    def __init__(self, plan: TensorRTPlan, stream: torch.cuda.Stream, inputs: Mapping[str, Tensor]) -> None:
        self._session = Session(plan, stream)
        self._inputs = {
            name: tensor if is_bank_input(name) else tensor.to(stream.device, copy=True)
            for name, tensor in inputs.items()
        }
        self._logits = self._session.bind(self._inputs)
        self._session.enqueue()  # TensorRT finishes its preparations in the first run, which must not be captured
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._session.enqueue()

    def fits(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether the bank is still where and as large as it was."""
        return all(
            tensor.data_ptr() == inputs[name].data_ptr() and tensor.shape == inputs[name].shape
            for name, tensor in self._inputs.items()
            if is_bank_input(name)
        )

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, C], overwritten by the next run."""
        for name, tensor in inputs.items():
            if not is_bank_input(name):
                self._inputs[name].copy_(tensor)
        self._graph.replay()
        return self._logits


class PlanStream:
    """A stream of its own and what runs on it; for one thread at a time."""

    def __init__(self, plan: TensorRTPlan, device: torch.device, cuda_graph: bool) -> None:
        self._plan = plan
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._session = None if cuda_graph else Session(plan, self._stream)
        self._graphs: OrderedDict[tuple[tuple[int, ...], ...], CapturedSession] = OrderedDict()

    def run(self, given: Mapping[str, Tensor], bank: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, K, C] on the host, of host tensors and a bank on the device, by input name."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream), torch.inference_mode():
            try:
                inputs: Mapping[str, Tensor] = {**given, **bank}
                if self._session is None:  # a graph has its own tensors, so no memory is allocated for a call
                    logits = self._captured(inputs).run(inputs)
                else:
                    inputs = {name: one.to(self._device) for name, one in inputs.items()}
                    logits = self._session.bind(inputs)
                    self._session.enqueue()
                return logits.to("cpu")
            finally:
                self._stream.synchronize()  # before any tensor of this call is given back

    def _captured(self, inputs: Mapping[str, Tensor]) -> CapturedSession:
        shapes = tuple(tuple(tensor.shape) for name, tensor in inputs.items() if not is_bank_input(name))
        found = self._graphs.pop(shapes, None)
        if found is None or not found.fits(inputs):
            with CAPTURE_LOCK:
                self._graphs = OrderedDict((key, one) for key, one in self._graphs.items() if one.fits(inputs))
                if len(self._graphs) >= _GRAPHS:
                    self._graphs.popitem(last=False)
                found = CapturedSession(self._plan, self._stream, inputs)
        self._graphs[shapes] = found
        return found
