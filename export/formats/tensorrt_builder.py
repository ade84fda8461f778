"""From a typed ONNX file to a plan.

The network is strongly typed: every precision comes from the ONNX file, and TensorRT does not choose any. This module
therefore has neither precision flags nor a calibrator nor layer precisions, all of which TensorRT 11 has removed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prompttune.errors import UsageError, first_line
from prompttune.export.formats.tensorrt_newer import decompose_attention, target_capabilities
from prompttune.export.formats.tensorrt_options import TensorRTOptions
from prompttune.export.layout import Shapes
from prompttune.export.runtimes.tensorrt_library import ErrorLog, TensorRT, error_log
from prompttune.files import replacing

if TYPE_CHECKING:
    import tensorrt as trt
    from tensorrt import IHostMemory


OnProgress = Callable[[float], None]
"""Called with the finished share, which rises from 0 to 1, at every further percent."""
_BAR = 24
"""Number of characters of a bar."""


class BuildProgress:
    """One share from the nested phases of a build, which several threads of TensorRT report.

    Nothing may be raised inside TensorRT's code, so an error of ``on_progress`` is kept and ends the build.
    """

    def __init__(self, on_progress: OnProgress) -> None:
        self.problem: BaseException | None = None
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # name → parent, steps, finished steps
        self._percent = -1

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase has started; ``parent`` is the phase that it is a step of, or None."""
        with self._lock:
            self._phases[name] = (parent, max(steps, 1), 0)
            self._report()

    def advance(self, name: str, done: int | None = None) -> bool:
        """A phase has finished ``done`` steps, or has ended if None; returns whether the build may go on."""
        with self._lock:
            if name in self._phases:
                parent, steps, _ = self._phases[name]
                self._phases[name] = (parent, steps, steps if done is None else done)
                self._report()
                if done is None:
                    del self._phases[name]
            return self.problem is None

    def _report(self) -> None:
        share = min(self._share(name) for name, (parent, *_) in self._phases.items() if parent not in self._phases)
        if self.problem is None and int(100 * share) > self._percent:  # a phase that begins late does not take it back
            self._percent = int(100 * share)
            try:
                self._on_progress(share)
            except BaseException as problem:  # KeyboardInterrupt too: it would end the process
                self.problem = problem

    def _share(self, name: str) -> float:
        _, steps, done = self._phases[name]
        inner = max((self._share(one) for one, (parent, *_) in self._phases.items() if parent == name), default=0.0)
        return min((done + inner) / steps, 1.0)


def bar(share: float) -> str:
    """A share as a bar with a percentage, in plain text."""
    filled = int(_BAR * share)
    return f"{'━' * filled}{'─' * (_BAR - filled)} {share:.0%}"


def _monitor(library: TensorRT, progress: BuildProgress) -> trt.IProgressMonitor:
    if not TYPE_CHECKING:
        trt = library

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.advance(phase_name, step + 1)

        def phase_finish(self, phase_name: str) -> None:
            progress.advance(phase_name)

    return Monitor()


def build_plan(
    trt: TensorRT,
    onnx_file: Path,
    plan_file: Path,
    shapes: Mapping[str, Shapes],
    options: TensorRTOptions,
    *,
    tf32: bool,
    on_progress: OnProgress,
) -> None:
    """Build a plan: for the current CUDA device, or for the compute capabilities that ``options`` name.

    The ONNX file is typed and has its weights beside it; ``shapes`` has every input with a dynamic axis; ``tf32`` lets
    fp32 matrix products round their factors to TF32.

    Raises:
        EngineError: TensorRT cannot parse or build it; one line with TensorRT's own reasons.
        UsageError: the timing cache file is not one of this TensorRT and GPU.
    """
    log = error_log(trt)
    log.clear()
    try:
        builder = trt.Builder(log.logger)
        # TensorRT 11 types every network strongly; the flag's number has changed there, so it goes by name.
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log.logger)  # it owns the weights: it must live until the plan is built
        _read_onnx(parser, log, onnx_file)
        decompose_attention(trt, network)
        config = builder.create_builder_config()
        _configure(trt, config, options, tf32)
        _add_profile(trt, builder, config, log, shapes)
        progress = BuildProgress(on_progress)
        config.progress_monitor = _monitor(trt, progress)
        if options.timing_cache is not None:
            _attach_timing_cache(config, log, options.timing_cache)
        plan: IHostMemory | None = builder.build_serialized_network(network, config)
        if progress.problem is not None:
            raise progress.problem
        if plan is None:
            raise log.failure("TensorRT cannot build the plan")
        plan_file.write_bytes(memoryview(plan))
        if options.timing_cache is not None:
            with replacing(options.timing_cache) as temporary:
                temporary.write_bytes(memoryview(config.get_timing_cache().serialize()))
    except (RuntimeError, TypeError, ValueError) as problem:  # pybind11 turns TensorRT's null pointers into these
        raise log.failure("TensorRT cannot build the plan", first_line(problem)) from None


def _read_onnx(parser: trt.OnnxParser, log: ErrorLog, path: Path) -> None:
    if not parser.parse_from_file(str(path)):
        errors: list[trt.ParserError] = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = (f"{error.desc()} (node {error.node_name()!r})" for error in errors)
        raise log.failure("TensorRT cannot read the model", *reasons)


def _configure(trt: TensorRT, config: trt.IBuilderConfig, options: TensorRTOptions, tf32: bool) -> None:
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    config.builder_optimization_level = options.optimization_level
    if not tf32:
        config.clear_flag(trt.BuilderFlag.TF32)  # TensorRT sets it unasked
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatibility == "ampere_plus":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif options.hardware_compatibility == "same_compute_capability":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # keeps the layers' precisions in the plan
    target_capabilities(trt, config, options.compute_capability)


def _add_profile(
    trt: TensorRT, builder: trt.Builder, config: trt.IBuilderConfig, log: ErrorLog, shapes: Mapping[str, Shapes]
) -> None:
    profile = builder.create_optimization_profile()
    for name, (low, likely, high) in shapes.items():
        profile.set_shape(name, trt.Dims([*low]), trt.Dims([*likely]), trt.Dims([*high]))
    if config.add_optimization_profile(profile) < 0:
        raise log.failure("TensorRT refuses the optimisation profile")


def _attach_timing_cache(config: trt.IBuilderConfig, log: ErrorLog, path: Path) -> None:
    """Give the builder the timings in ``path``; the file is rewritten later, so it must be a timing cache or new."""
    try:
        stored = path.read_bytes() if path.exists() else b""
    except OSError as problem:
        raise UsageError(f"cannot read the timing cache {path}: {problem}") from None
    cache: trt.ITimingCache | None = config.create_timing_cache(stored)
    if cache is None or not config.set_timing_cache(cache, False):
        reason = log.failure(f"{path} is not a timing cache of this TensorRT and GPU")
        raise UsageError(f"{reason}; delete it or name another file")
