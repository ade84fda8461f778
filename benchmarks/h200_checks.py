"""The checks of :mod:`benchmarks.h200`: which cases each one has, and a function that yields the rows of a case."""

from __future__ import annotations

import functools
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import prompttune as pt
from benchmarks.engines import CONFIGS
from prompttune.export import EngineFolder, EngineTask
from prompttune.export.banks import Place
from prompttune.export.formats import FORMATS
from prompttune.export.layout import CLASSES, IMAGE
from prompttune.export.parity.gate import NOISE
from prompttune.export.precision.casting import TORCH_DTYPES
from prompttune.export.runtimes import RuntimeOptions, open_runtime
from prompttune.methods import METHODS

Rows = Iterator[dict[str, Any]]
Calls = dict[Any, Callable[[], Any]]
SPREAD = 0.02
"""Standard deviation of what is drawn for tasks: fresh parameters are often zeros, which hide mistakes."""
TIMED = ("sa2vp", "reader", "lspt", "vpt-deep")
PLAIN, MAPS = "plain", "segmentation"


class Skipped(Exception):  # noqa: N818
    """The case cannot run here; the text says why."""


@dataclass(frozen=True)
class Setting:
    """Where and how large."""

    part: str
    device: str
    tiny: bool
    work: Path
    """Engines, one folder each, and training runs."""
    threads: int

    @property
    def cuda(self) -> bool:
        return self.device != "cpu"

    @property
    def format(self) -> str:
        return "aoti" if self.part == "torch" else "onnx"

    @property
    def model(self) -> tuple[str, int]:
        return ("test_vit", 64) if self.tiny else ("vit_base_patch16_224", 224)

    @property
    def precision(self) -> str:
        """Of the engines that are timed; part ``ort`` calls its engines by their precision."""
        return "bf16" if self.format == "aoti" else "fp16" if self.cuda else "fp32"

    @property
    def graphs(self) -> tuple[bool, ...]:
        """Without CUDA graphs and with them, where there are any."""
        return (False, True) if self.part == "ort" and self.cuda else (False,)

    def backbone(self) -> pt.Backbone:
        torch.set_num_threads(self.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        return pt.load_backbone(*self.model, "random")

    def images(self, rows: int) -> Tensor:
        """Seeded noise [rows, 3, S, S] on the host."""
        return torch.randn(rows, 3, *(self.model[1],) * 2, generator=torch.Generator().manual_seed(rows))

    def autocast(self, precision: str) -> Any:
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=precision == "bf16")

    def timed(self, calls: Calls) -> dict[Any, list[float]]:
        """Seconds of each call, taken in turn."""
        from prompttune.serve.bench import Rounds, interleaved

        torch.set_num_threads(self.threads)
        rounds = Rounds(1, 2) if self.tiny else Rounds(3, 15)
        return interleaved(calls, rounds, torch.cuda.synchronize if self.cuda else lambda: None)


def cases(setting: Setting) -> dict[str, list[str]]:
    """Check → its cases."""
    batches = [f"batch {batch}" for batch in ((1, 4) if setting.tiny else (1, 8, 64, 256))]
    return {
        "machine": ["device", "compiler" if setting.part == "torch" else "providers"],
        "forward": list(METHODS),
        "training": ["fp32", "bf16", "fp16"],
        "engines": batches,
        "fan_out": [f"{count} tasks" for count in ((1, 4) if setting.tiny else (1, 10, 100))],
        "tasks": [f"{count} tasks" for count in ((4, 8) if setting.tiny else (16, 256))],
        "eager": batches,
        "step": ["eager", "compiled"],
        "graphs": [setting.precision, MAPS],
        "loads": [setting.precision],
    }


def drawn(backbone: pt.Backbone, method: str, seed: int, maps: bool = False) -> pt.PromptModel:
    """A task of 100 classes, or of maps of 5, whose parameters are all off their start."""
    torch.manual_seed(seed)
    config, head = CONFIGS.get(method) or METHODS[method](), pt.SegmentationConfig() if maps else None
    model = pt.PromptModel(backbone, config, 5 if maps else 100, task_type=head).eval()
    for parameter in model.trained_parameters().values():
        parameter.data.add_(SPREAD * torch.randn_like(parameter))
    return model


def machine(setting: Setting, case: str) -> Rows:
    """What is there; a compiler or a provider that is missing fails."""
    if case == "device":
        found = {"cuda of torch": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        if setting.cuda:
            one = torch.cuda.get_device_properties(setting.device)
            found |= {"gpu": one.name, "capability": f"{one.major}.{one.minor}", "mib": one.total_memory >> 20}
        yield from ({"item": item, "value": value} for item, value in found.items())
    elif case == "compiler":  # C++, and cuda.h for CUDA
        FORMATS["aoti"]().check(pt.ExportSettings("aoti", "bf16", device=setting.device).resolved())
        yield {"item": "AOTInductor's needs", "value": "there"}
    else:
        import onnxruntime

        known = onnxruntime.get_available_providers()
        yield {"item": "providers", "value": f"{onnxruntime.__version__} {' '.join(known)}"}
        if setting.cuda and "CUDAExecutionProvider" not in known:
            raise LookupError(f"{onnxruntime.__file__} knows no CUDA: put onnxruntime-gpu first on PYTHONPATH")


@torch.inference_mode()
def forward(setting: Setting, method: str) -> Rows:
    """Logits on the device beside those of the CPU in fp32: one task for all rows, and a task a row."""
    backbone, images = setting.backbone(), setting.images(4)
    model = drawn(backbone, method, 0)
    states = {"single": model.task_state()}
    if METHODS[method].shares_backbone:
        two = (states["single"], drawn(backbone, method, 1).task_state())
        states["mixed"] = {key: torch.cat([two[row][key] for row in (0, 1, 1, 0)]) for key in two[0]}
    wanted = {rows: model.forward_state(images, state).logits for rows, state in states.items()}
    states = {rows: {key: value.to(setting.device) for key, value in one.items()} for rows, one in states.items()}
    model.to(setting.device)
    failures = []
    for rows, state in states.items():
        for precision in ("fp32", "bf16"):
            with setting.autocast(precision):
                logits = model.forward_state(images.to(setting.device), state).logits.float().cpu()
            apart = (logits - wanted[rows]).abs().max().item()
            allowed = NOISE[precision] * wanted[rows].abs().max().item()
            yield {"method": method, "rows": rows, "precision": precision, "max_abs": apart, "allowed": allowed}
            if not apart <= allowed:
                failures.append(f"{rows} {precision}: logits differ by {apart:.3g}, allowed {allowed:.3g}")
    if failures:
        raise AssertionError("; ".join(failures))


def training(setting: Setting, precision: str) -> Rows:
    """Three steps, then three more by resuming, through the same door as every run."""
    if precision == "fp16" and not setting.cuda:
        raise Skipped("fp16 trains on a GPU alone")
    torch.set_num_threads(setting.threads)
    (name, size), output = setting.model, setting.work / f"run-{precision}"
    shutil.rmtree(output, ignore_errors=True)
    shared = {"backbone": name, "image_size": size, "weights": "random", "data": "demo/location", "limit": 24}
    shared |= {"batch_size": 8, "device": setting.device, "tensorboard": False, "output": str(output)}
    losses: list[float] = []
    for epochs in (1, 2):
        config = pt.TrainConfig(**shared, precision=precision, epochs=epochs)
        result = pt.train(config, resume=epochs > 1, on_progress=partial(_note_loss, losses))
        yield {"precision": precision, "epochs": result.epochs, "train_loss": losses[-1], "status": result.status}
        if (result.epochs, len(losses)) != (epochs, epochs):  # a loss that is not finite is an error of the training
            raise AssertionError(f"{result.epochs} epochs and {len(losses)} losses instead of {epochs}")


def _note_loss(losses: list[float], news: Any) -> None:
    if news.phase == "epoch":
        losses.append(float(news.record["train_loss"]))


def build(setting: Setting, name: str) -> Rows:
    """Export one engine of two tasks and compare it with PyTorch, or export the plain backbone."""
    precision = name if name in NOISE else setting.precision
    if (setting.format, precision, setting.cuda) == ("onnx", "bf16", False):
        raise Skipped("ONNX Runtime runs bf16 on CUDA alone")
    backbone, target = setting.backbone(), setting.work / name
    torch.set_num_threads(max(1, setting.threads // 4))
    method = name if name in METHODS else "linear" if name == PLAIN else "sa2vp"
    checkpoints = {f"task{seed}": setting.work / f"{name}-task{seed}" for seed in (0, 1)}
    for seed, path in enumerate(checkpoints.values()):
        shutil.rmtree(path, ignore_errors=True)
        drawn(backbone, method, seed, name == MAPS).save(path)
    settings = pt.ExportSettings(setting.format, precision, device=setting.device)
    figures = dict.fromkeys(("max_abs", "max_rel", "agreement", "mixed_vs_single"), "")
    report = None
    if name == PLAIN:
        _build_plain(settings, checkpoints, backbone, target)
    else:
        pt.export_engine(checkpoints, target, format=settings, parity=False, overwrite=True)
        report = pt.validate_engine(target, batch_sizes=(1, 8), images=8, options=RuntimeOptions(setting.device))
        worst, least = (pick(report.comparisons, key=lambda one: one.max_rel) for pick in (max, min))
        figures |= {"max_abs": report.max_abs, "max_rel": worst.max_rel, "mixed_vs_single": report.mixed_vs_single}
        figures["agreement"] = min(one.agreement for one in (worst, least))
    yield {"engine": name, "format": setting.format, "precision": precision, **figures, "allowed": NOISE[precision]}
    if report is not None and not report.passed:
        raise AssertionError(report.failures[0])


def _build_plain(settings: Any, checkpoints: Mapping[str, Path], backbone: pt.Backbone, target: Path) -> None:
    """timm's own forward to pooled features, written by the format; the manifest is made from a small engine's."""
    from prompttune.export.folder import write_manifest
    from prompttune.serve.bench.plain import export_plain

    small = target.with_name("small")
    like = pt.export_engine(checkpoints, small, format="onnx", parity=False, overwrite=True)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    write_manifest(target, export_plain(like.manifest, backbone, settings, target))


@functools.cache
def opened(setting: Setting, name: str, cuda_graph: bool = False) -> tuple[EngineFolder, Any]:
    """An engine folder and its model, open."""
    folder = EngineFolder(setting.work / name, verify=False)
    options = RuntimeOptions(setting.device, setting.threads, cuda_graph)
    return folder, open_runtime(folder.path, folder.manifest, options)


@functools.cache
def bank_of(setting: Setting, name: str, count: int) -> tuple[dict[str, Tensor], list[Place]]:
    """The states of ``count`` tasks by key, drawn on the device, and where each task lies."""
    folder, _ = opened(setting, name)
    manifest = folder.manifest
    if not manifest.layout:
        return {}, [Place(0)] * count
    shapes = folder.read_task("task0").shapes()
    axes = manifest.axes_of(shapes, "task0")
    sizes, classes = manifest.form.needed([axes] * count), axes[CLASSES]
    generator = torch.Generator(setting.device).manual_seed(count)
    dtype = TORCH_DTYPES[manifest.bank_precision]
    bank = {}
    for key, shape in shapes.items():
        by_class = manifest.form.lies_by_class(key)
        size = (sizes[CLASSES], *shape[2:]) if by_class else (count, *shape[1:])
        bank[key] = (SPREAD * torch.randn(size, device=setting.device, generator=generator)).to(dtype)
        if by_class:
            bank[key][0] = 0 if len(shape) > 2 else -torch.inf
    return bank, [Place(row, 1 + row * classes, classes) for row in range(count)]


def call_of(
    setting: Setting, name: str, images: Any, count: int, mixed: bool, graph: bool, each: int = 1
) -> Callable[[], Any]:
    """From images on the host to logits there; the rows go round ``count`` tasks, or all ask for the first ``each``."""
    folder, runtime = opened(setting, name, graph)
    rows, places = bank_of(setting, name, count)
    bank: dict[str, Any] = dict(rows)
    if setting.format == "onnx" and not setting.cuda:
        bank = {key: runtime.place(one.numpy()) for key, one in bank.items()}
    asked = [[places[row % count]] if mixed else places[:each] for row in range(len(images))]
    return partial(runtime.run, {IMAGE: images, **folder.manifest.form.index(asked, runtime.sizes)}, bank)


def subjects(setting: Setting) -> list[str]:
    """What was built and can be timed beside the plain backbone, which comes first."""
    names = (PLAIN, *(TIMED if setting.part == "torch" else (setting.precision,)))
    there = [name for name in names if (setting.work / name / "engine.json").exists()]
    if there[:1] != [PLAIN] or len(there) < 2:
        raise Skipped(f"only these were built: {', '.join(there) or 'none'}")
    return there


def _speed(subject: str, batch: int, seconds: Sequence[float], floor: Sequence[float], **more: Any) -> dict[str, Any]:
    from prompttune.serve.bench import Latency, Ratio

    latency, over = Latency.of(seconds), Ratio.of(seconds, floor)
    own = {"tasks": "", "mix": "", "cuda_graph": False, "gather_share": "", "peak_mib": "", **more}
    ratios = {
        name: f"{getattr(over, field):.4f}" for name, field in zip(_RATIOS, ("median", "p25", "p75"), strict=True)
    }
    figures = {"p50_ms": f"{latency.p50_ms:.4f}", "images_per_s": f"{latency.per(batch):.2f}", "rounds": len(seconds)}
    return {"subject": subject, "batch": batch, **own, **figures, **ratios}


_RATIOS = ("over_plain", "over_plain_p25", "over_plain_p75")


def engines(setting: Setting, case: str) -> Rows:
    """Engines of 16 tasks in mixed rows beside the plain backbone in the same runtime."""
    images, names = setting.images(int(case.split()[1])).numpy(), subjects(setting)
    calls = {(name, on): call_of(setting, name, images, 16, True, on) for on in setting.graphs for name in names}
    seconds = setting.timed(calls)
    for (name, on), values in seconds.items():
        yield _speed(name, len(images), values, seconds[PLAIN, on], tasks=16, mix="all", cuda_graph=on)


def tasks(setting: Setting, case: str) -> Rows:
    """As many images as tasks: all for one task, a task each, and the share that gathering their states takes."""
    count = int(case.split()[0])
    images = setting.images(count).numpy()
    calls: Calls = {}
    for name in subjects(setting):
        calls[name, "one"] = call_of(setting, name, images, count, False, False)
        if name != PLAIN:
            calls[name, "all"] = call_of(setting, name, images, count, True, False)
            calls[name, "gather"] = partial(_gather, bank_of(setting, name, count)[0])
    seconds = setting.timed(calls)
    for (name, mix), values in seconds.items():
        share = np.median(values) / np.median(seconds[name, "all"]) if mix == "gather" else ""
        yield _speed(name, count, values, seconds[PLAIN, "one"], tasks=count, mix=mix, gather_share=share)


def fan_out(setting: Setting, case: str) -> Rows:
    """Several tasks of each image in one call, beside the plain backbone's pass."""
    count, names = int(case.split()[0]), subjects(setting)
    for batch in (1, 8):
        images = setting.images(batch).numpy()
        calls: Calls = {
            name: call_of(setting, name, images, 1 if name == PLAIN else count, False, False, count) for name in names
        }
        seconds = setting.timed(calls)
        for name in names[1:]:
            yield _speed(name, batch, seconds[name], seconds[PLAIN], tasks=count, mix="an image")


def _gather(bank: Mapping[str, Tensor]) -> None:
    for rows in bank.values():
        rows.index_select(0, torch.arange(len(rows), device=rows.device))


@torch.inference_mode()
def eager(setting: Setting, case: str) -> Rows:
    """PyTorch under bf16 autocast, images on the device: each method beside timm's own forward."""
    images, (plain, models) = setting.images(int(case.split()[1])).to(setting.device), _models(setting)
    calls: Calls = {f"{name} eager": partial(one.forward_state, images, one.task_state()) for name, one in models}
    with setting.autocast("bf16"):
        seconds = setting.timed({"plain eager": partial(plain, images), **calls})
    for name, values in seconds.items():
        yield _speed(name, len(images), values, seconds["plain eager"], tasks=1, mix="one")


@functools.cache
def _models(setting: Setting) -> tuple[Any, list[tuple[str, pt.PromptModel]]]:
    backbone = setting.backbone().to(setting.device)
    return backbone.model, [(name, drawn(backbone, name, 0).to(setting.device)) for name in TIMED]


def step(setting: Setting, case: str) -> Rows:
    """A training step of SA²VP in bf16 over a forward of the plain model, and its peak memory."""
    from benchmarks.training_step import peak_mib, training_step

    if case == "compiled" and not setting.cuda:
        raise Skipped("compiled steps are timed on a GPU alone; benchmarks.training_step does it on a CPU")
    batch, target = (4 if setting.tiny else 64), torch.device(setting.device)
    images, backbone = setting.images(batch).to(target), setting.backbone().to(target)
    targets = torch.randint(0, 100, (batch,), device=target)
    steps: Calls = {"plain forward": torch.inference_mode()(lambda: backbone.model(images))}
    for name in dict.fromkeys(("eager", case)):
        model = drawn(backbone, "sa2vp", 0).to(target).train()
        if name == "compiled":
            model.compile()
        steps[f"step {name}"] = training_step(model, images, targets)
    memory = {}
    with setting.autocast("bf16"):
        for name, one in steps.items():
            one()  # compiles
            if setting.cuda:
                torch.cuda.reset_peak_memory_stats(target)
            one()
            memory[name] = f"{peak_mib(target):.0f}"
        seconds = setting.timed(steps)
    for name, values in seconds.items():
        yield _speed(name, batch, values, seconds["plain forward"], peak_mib=memory[name])


def _engines(setting: Setting, name: str) -> list[pt.Engine]:
    """The same engine twice: as it is, and with CUDA graphs where there is a GPU."""
    if not (setting.work / name / "engine.json").exists():
        raise Skipped(f"the engine {name} was not built")
    options = {"device": setting.device, "threads": setting.threads}
    return [pt.Engine(setting.work / name, **options, cuda_graph=graph) for graph in (False, setting.cuda)]


def graphs(setting: Setting, name: str) -> Rows:
    """Replayed CUDA graphs beside runs without: every batch size three times, then again after the bank has moved."""
    plain, replayed = _engines(setting, name)
    task = plain.folder.read_task("task1")
    for moved in (False, True):
        for number, engine in ((n, engine) for n in range(8 * moved) for engine in (plain, replayed)):
            engine.bank.put(f"more{number}", task)
        for batch in (1, 3, 8):
            images, names = setting.images(batch).numpy(), [f"task{row % 2}" for row in range(batch)]
            wanted = plain.logits(images, names)
            apart = max(float(np.abs(replayed.logits(images, names) - wanted).max()) for _ in range(3))
            yield {"engine": name, "batch": batch, "bank_moved": moved, "cuda_graph": setting.cuda, "max_abs": apart}
            if apart:
                raise AssertionError(f"batch {batch}: answers of CUDA graphs differ by {apart:.3g}")


def loads(setting: Setting, name: str) -> Rows:
    """Tasks are replaced and added by one thread while another one captures graphs: each answer is one version's."""
    plain, replayed = _engines(setting, name)
    versions = [plain.folder.read_task(one) for one in ("task0", "task1")]
    batches = {rows: setting.images(rows).numpy() for rows in range(1, 5 if setting.tiny else 17)}
    wanted = {rows: [plain.logits(images, one) for one in ("task0", "task1")] for rows, images in batches.items()}
    replayed.bank.put("moving", versions[0])
    ended, problems, loaded = threading.Event(), list[Exception](), list[int]()
    thread = threading.Thread(target=_load, args=(replayed, versions, ended, problems, loaded), daemon=True)
    thread.start()
    for _, rows in ((again, rows) for again in range(3) for rows in batches):
        for task, known in (("task1", wanted[rows][1:]), ("moving", wanted[rows])):
            logits = replayed.logits(batches[rows], task)
            if not any(np.abs(logits - one).max() <= 1e-3 * np.abs(one).max() for one in known):
                problems.append(AssertionError(f"{rows} rows, {len(loaded)} loads: {task} gave no version's answer"))
    ended.set()
    thread.join(20)
    yield {"engine": name, "calls": 6 * len(batches), "loads": len(loaded), "cuda_graph": setting.cuda}
    if problems or not loaded:
        raise problems[0] if problems else AssertionError("nothing was loaded meanwhile")


def _load(
    engine: pt.Engine, versions: list[EngineTask], ended: Any, problems: list[Exception], loaded: list[int]
) -> None:
    try:
        while not ended.wait(0.002):
            engine.bank.put("moving", versions[len(loaded) % 2 - 1], replace=True)
            if len(loaded) % 20 == 19:
                engine.bank.put(f"new{len(loaded)}", versions[1])  # the bank grows now and then
            loaded.append(len(loaded))
    except Exception as problem:
        problems.append(problem)
