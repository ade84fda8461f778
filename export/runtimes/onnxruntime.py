"""ONNX Runtime, the default: on the CPU, on CUDA, and on TensorRT through its provider."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from prompttune.errors import EngineError, MissingExtraError, UsageError, choose, first_line
from prompttune.export.banks import Index
from prompttune.export.folder import IMAGE_PART, ONNX_FILE, ONNX_WEIGHTS_FILE, TASK_PART, Manifest
from prompttune.export.layout import IMAGE, LOGITS, Sizes, bank_input
from prompttune.export.options import PROVIDERS
from prompttune.export.quiet import quiet
from prompttune.export.runtimes.base import Array, BankArray, Runtime, RuntimeOptions
from prompttune.export.runtimes.choice import takes_onnxruntime

if TYPE_CHECKING:
    from prompttune.export.runtimes.onnxruntime_cuda import CudaCalls

_QUIET = 4
"""ONNX Runtime's severity 'fatal': its errors arrive as exceptions and need not be logged too."""
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Option for the folder of the weights, for a model that is given as bytes."""
CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
_WITHOUT_TENSORRT = "or leave the provider out, which runs on CUDA"
CPU_INT8 = (
    "ONNX Runtime has no int8 on CUDA: products stay in float with static scales, and go to the CPU with dynamic ones; "
    "choose fp16, or int8 in the format trt"
)


def providers(options: RuntimeOptions) -> list[Any]:
    """Execution providers in order of preference.

    Raises:
        UsageError: the device or the provider is unknown, or they cannot be combined.
        MissingExtraError: ONNX Runtime was installed without CUDA or without TensorRT.
    """
    index = options.cuda_index
    if options.provider is not None:
        choose("provider", options.provider, PROVIDERS)
    if index is None:
        if options.provider or options.cuda_graph or options.cache:
            raise UsageError("providers, their cache and CUDA graphs belong to a GPU: give the device cuda")
        return ["CPUExecutionProvider"]
    available = ort.get_available_providers()
    if CUDA not in available:
        raise MissingExtraError("onnxruntime-gpu", "gpu", "or run on the device cpu")
    # TF32 moves logits of fp32 by 4e-4 to 9e-4; in half precision the head and the norms are in fp32.
    cuda: dict[str, Any] = {"device_id": index, "use_tf32": 0}
    if options.provider is None:
        if options.cache:
            raise UsageError("a cache belongs to the provider tensorrt")
        return [(CUDA, cuda | {"enable_cuda_graph": options.cuda_graph}), "CPUExecutionProvider"]
    if TENSORRT not in available:
        raise MissingExtraError("TensorRT for ONNX Runtime", "gpu-tensorrt", _WITHOUT_TENSORRT)
    # The precision is in the model's types: trt_fp16_enable would let TensorRT choose anew, norms included.
    tensorrt: dict[str, Any] = {"device_id": index, "trt_cuda_graph_enable": options.cuda_graph}
    return [(TENSORRT, tensorrt), (CUDA, cuda), "CPUExecutionProvider"]


def open_session(
    folder: Path, options: RuntimeOptions, model: onnx.ModelProto | None = None, wanted: list[Any] | None = None
) -> Any:
    """A session of a folder's ONNX file, or of ``model``, a changed one without its weights.

    ``wanted`` are the providers, None those of ``options``. ONNX Runtime leaves out one whose libraries it cannot load,
    and says so in its log alone: the first one must be there.

    ONNX Runtime refuses weights behind a symbolic link (1.24.1 all, others some), and the hub's cache is made of links
    to files of other names. The model then names the weights' real file.
    """
    path, weights = folder / ONNX_FILE, folder / ONNX_WEIGHTS_FILE
    settings, wanted = ort.SessionOptions(), wanted or providers(options)
    settings.log_severity_level = _QUIET
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", str(int(options.spin)))
    # x86 without VNNI adds products of int8 in 16 bits, which overflow: this takes exact kernels there, slower ones.
    settings.add_session_config_entry("session.x64quantprecision", "1")
    if options.cuda_index is not None:
        ort.set_default_logger_severity(_QUIET)
        with quiet():
            ort.preload_dlls()  # torch brings the CUDA libraries
    if options.provider is not None:
        with contextlib.suppress(ImportError):
            importlib.import_module("tensorrt_libs")  # loads TensorRT's, from where pip has put them
    if model is None and not weights.is_symlink():
        return _session(str(path), settings, wanted)
    model = onnx.load(str(path), load_external_data=False) if model is None else model
    real = weights.resolve()
    settings.add_session_config_entry(_WEIGHTS_FOLDER, str(real.parent))
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = real.name
    return _session(model.SerializeToString(), settings, wanted)


def _session(model: str | bytes, settings: Any, wanted: list[Any]) -> Any:
    # Without this ONNX Runtime prints a provider's failure and goes on with another provider.
    session = ort.InferenceSession(model, settings, providers=wanted, enable_fallback=0)
    asked, found = wanted[0] if len(wanted) == 1 else wanted[0][0], session.get_providers()[0]
    if found != asked:
        raise EngineError(f"it runs on {found}, not on {asked}")
    return session


def _missing_library(options: RuntimeOptions) -> str:
    """What ONNX Runtime's own library for a provider lacks, empty if it loads; ONNX Runtime logs it and raises less."""
    kind, extra = ("tensorrt", "gpu-tensorrt") if options.provider else ("cuda", "gpu")
    libraries = Path(ort.__file__).parent / "capi"
    try:
        for name in ("shared", kind) if options.cuda_index is not None else ():
            ctypes.CDLL(str(libraries / f"libonnxruntime_providers_{name}.so"), ctypes.RTLD_GLOBAL)
    except OSError as problem:
        return f"; {first_line(problem)}: pip install 'prompttune[{extra}]'"
    return ""


class OnnxRuntime(Runtime):
    """An ONNX file in ONNX Runtime.

    On the CPU ``OrtValue`` refers to the bank in host memory without a copy, so a changed row is seen at once. On CUDA
    the bank lies on the device, inputs and outputs are bound to tensors there, and a changed row is copied alone.
    """

    def __init__(self, folder: Path, manifest: Manifest, options: RuntimeOptions) -> None:
        wanted, on_cpu = providers(options), options.cuda_index is None
        if manifest.precision == "int8" and not takes_onnxruntime(manifest):
            raise EngineError(
                "the engine has the int8 weights of OpenVINO: give the runtime openvino, or export it anew"
            )
        if on_cpu and not takes_onnxruntime(manifest):
            raise EngineError(
                "ONNX Runtime runs bf16 on CUDA alone: open the engine on cuda, give the runtime openvino, or export it"
                " as fp16 or fp32"
            )
        if manifest.precision == "int8" and not on_cpu:
            raise EngineError(f"{CPU_INT8}; or open the engine on the cpu")
        if options.provider is not None:
            from prompttune.export.runtimes.onnxruntime_tensorrt import provider_ranges, tensorrt_settings

            self.sizes = Sizes(provider_ranges(folder, manifest))
            wanted[0][1].update(tensorrt_settings(manifest, self.sizes.ranges, options.cache))
        self._parts = [spec["name"] for spec in manifest.details.get("parts", ())]
        self.keeps_images = bool(self._parts)
        if self._parts and not on_cpu:
            raise EngineError("an engine in two parts runs on the cpu: open it there, or export it without split")
        try:
            self._session = open_session(folder / TASK_PART if self._parts else folder, options, wanted=wanted)
            self._image = open_session(folder / IMAGE_PART, options, wanted=wanted) if self._parts else None
        except Exception as problem:  # ONNX Runtime's errors share no base class below Exception
            why = first_line(problem) + _missing_library(options)
            raise EngineError(f"ONNX Runtime cannot open {folder / ONNX_FILE}: {why}") from None
        self._provider: str = self._session.get_providers()[0]
        # The TensorRT provider has no option for TF32: this variable is the one way to keep it from it.
        if options.provider and manifest.precision == "fp32" and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0":
            self._provider += ", fp32 in TF32"
        self._graphs = True
        self._cuda: CudaCalls | None = None
        if options.cuda_index is not None:
            from prompttune.export.runtimes.onnxruntime_cuda import CudaCalls  # needs torch, which the CPU does not

            self._cuda = CudaCalls(self._session, manifest, options)

    @property
    def description(self) -> str:
        """See :attr:`Runtime.description`."""
        return f"ONNX Runtime {ort.__version__}, {self._provider}"

    def place(self, rows: BankArray) -> Any:
        """See :meth:`Runtime.place`."""
        return ort.OrtValue.ortvalue_from_numpy(rows) if self._cuda is None else self._cuda.place(rows)

    def update(self, placed: Any, rows: BankArray, changed: slice) -> None:
        """See :meth:`Runtime.update`; on the CPU the placed tensor is the host's copy."""
        if self._cuda is not None:
            self._cuda.update(placed, rows, changed)

    def without_graphs(self) -> Runtime:
        """See :meth:`Runtime.without_graphs`."""
        plain = copy.copy(self)
        plain._graphs = False
        return plain

    def run(self, inputs: Mapping[str, NDArray[Any]], bank: Mapping[str, Any]) -> Array:
        """See :meth:`Runtime.run`."""
        named = {bank_input(key): placed for key, placed in bank.items()}
        if self._cuda is not None:
            return self._cuda.run(inputs, named, self._graphs)
        feeds = {name: ort.OrtValue.ortvalue_from_numpy(one) for name, one in inputs.items()} | named
        if self._image is not None:
            found = self._run(self._image, self._parts, {IMAGE: feeds.pop(IMAGE)})
            feeds |= dict(zip(self._parts, found, strict=True))
        logits: Array = self._run(self._session, [LOGITS], feeds)[0].numpy()
        return logits

    def image_state(self, images: Array) -> dict[str, BankArray]:
        """See :meth:`Runtime.image_state`."""
        found = self._run(self._image, self._parts, {IMAGE: ort.OrtValue.ortvalue_from_numpy(images)})
        return {name: value.numpy() for name, value in zip(self._parts, found, strict=True)}

    def answer(self, found: Mapping[str, BankArray], index: Index, bank: Mapping[str, Any]) -> Array:
        """See :meth:`Runtime.answer`."""
        given = {name: ort.OrtValue.ortvalue_from_numpy(one) for name, one in {**found, **index}.items()}
        named = {bank_input(key): placed for key, placed in bank.items()}
        logits: Array = self._run(self._session, [LOGITS], given | named)[0].numpy()
        return logits

    @staticmethod
    def _run(session: Any, outputs: list[str], feeds: Mapping[str, Any]) -> list[Any]:
        try:
            return list(session.run_with_ort_values(outputs, feeds))
        except Exception as problem:
            raise EngineError(f"ONNX Runtime failed: {first_line(problem)}") from None
