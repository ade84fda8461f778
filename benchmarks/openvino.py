"""SA²VP and the plain backbone in ONNX Runtime, OpenVINO and PyTorch on a CPU, timed in turn; starts with a cache."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from statistics import median
from typing import Any

import click
import torch

import prompttune as pt
from benchmarks.common import Model, Run, batch_option, model_options, ratio, run_options
from benchmarks.engines import CONFIGS, make_engine, save_checkpoint, workshop
from prompttune.export import EngineFolder
from prompttune.export.runtimes import RuntimeOptions
from prompttune.export.runtimes.choice import COMPILED, ONNXRUNTIME, OPENVINO
from prompttune.serve.bench.settings import ALL
from prompttune.serve.bench.subjects import (
    BenchSubject,
    OpenSubject,
    assignments,
    engine_subject,
    noise,
    plain_subject,
    torch_subject,
)

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "int8": {"precision": "int8", "quantization": "static", "options": {"runtime": OPENVINO}},
}
_CALIBRATION_IMAGES = 32
_STARTS = 3


def subjects_of(
    frozen: pt.Backbone, engines: dict[str, EngineFolder], threads: int, stack: ExitStack
) -> dict[str, BenchSubject]:
    """Every side by name; that of the plain backbone beside ``NAME`` is ``plain NAME``."""
    found = {}
    for precision, folder in engines.items():
        for runtime in (ONNXRUNTIME, OPENVINO):
            if (runtime, precision) in ((ONNXRUNTIME, "bf16"), (ONNXRUNTIME, "int8")):  # not its files
                continue
            options, name = RuntimeOptions(threads=threads, runtime=runtime), f"{runtime} {precision}"
            found[name] = engine_subject(name, folder.path, options)
            found[f"plain {name}"] = plain_subject(folder.manifest, options, None, stack)
    found["torch fp32"] = torch_subject(engines["fp32"], RuntimeOptions(threads=threads), None)

    @torch.inference_mode()
    def plain(images: object, _tasks: object) -> object:
        return frozen.run_timm(torch.as_tensor(images)).numpy()  # all tokens, as the plain models of the runtimes

    found["plain torch fp32"] = BenchSubject("plain", [], frozen.image_size, lambda: lambda: OpenSubject("timm", plain))
    return found


_START = """
import sys, time
import openvino
import prompttune as pt
from prompttune.serve.bench.subjects import noise

images, began = noise(1, int(sys.argv[3]), 0), time.perf_counter()
engine = pt.Engine(sys.argv[1], threads=int(sys.argv[2]), runtime="openvino")
engine.logits(images, engine.tasks[:1])
answered = time.perf_counter()
engine.logits(images, engine.tasks[:1])
print(answered - began, time.perf_counter() - answered)
"""


def start_s(folder: EngineFolder, threads: int) -> dict[str, str]:
    """Median seconds in which a new process opens an engine in OpenVINO and answers an image, imports aside: without a
    cache (``first``), and with one (``second``); and without what an answer of the open engine takes (``alone``).
    """
    command = [sys.executable, "-c", _START, folder.path, threads, folder.manifest.image_size]
    seconds: dict[str, list[list[float]]] = {"first": [], "second": []}
    for _ in range(_STARTS):
        for blob in (folder.path / COMPILED).glob("*.blob"):
            blob.unlink()
        for which in seconds:
            said = subprocess.check_output([*map(str, command)], text=True).split()
            seconds[which].append([float(one) for one in said])
    columns = {f"{which}_start_s": median(first for first, _ in runs) for which, runs in seconds.items()}
    columns |= {
        f"{which}_start_alone_s": median(first - later for first, later in runs) for which, runs in seconds.items()
    }
    return {name: f"{value:.2f}" for name, value in columns.items()}


@click.command(help=__doc__)
@model_options
@click.option("--method", type=click.Choice(list(CONFIGS)), default="sa2vp", show_default=True)
@batch_option(1, 4, 8)
@click.option("--precision", "precisions", multiple=True, type=click.Choice(list(PRECISIONS)), help="Default: all.")
@click.option("--tasks", type=click.IntRange(1), default=4, show_default=True)
@run_options
def main(
    model: Model, method: str, batches: tuple[int, ...], precisions: tuple[str, ...], tasks: int, run: Run
) -> None:
    frozen = model.load()
    rows = []
    with workshop() as folder, ExitStack() as stack:
        checkpoint = save_checkpoint(method, frozen, folder)
        engines = {}
        for name in dict.fromkeys(("fp32", *(precisions or PRECISIONS))):  # fp32 is what all are held against
            settings = replace(pt.ExportSettings(**PRECISIONS[name]), calibration_images=_CALIBRATION_IMAGES)
            engines[name] = make_engine(checkpoint, folder / name, settings, tasks)
        starts = {f"{OPENVINO} {name}": start_s(one, run.threads) for name, one in engines.items()}
        subjects = subjects_of(frozen, engines, run.threads, stack)
        opened = {name: subject.prepare()() for name, subject in subjects.items()}
        for batch in batches:
            images = noise(batch, frozen.image_size, 0)
            calls = {
                name: one.call(images, assignments(subjects[name].tasks, batch, ALL)) for name, one in opened.items()
            }
            seconds = run.interleaved(calls)
            for name, values in seconds.items():
                beside = seconds[name if name.startswith("plain") else f"plain {name}"]
                rows.append(
                    {
                        **model.columns,
                        "method": method,
                        "side": name,
                        "batch": batch,
                        "over_onnxruntime_fp32": f"{ratio(values, seconds[f'{ONNXRUNTIME} fp32']):.3f}",
                        "over_plain_onnxruntime_fp32": f"{ratio(values, seconds[f'plain {ONNXRUNTIME} fp32']):.3f}",
                        "over_plain_of_its_own": f"{ratio(values, beside):.3f}",
                        "p50_ms": f"{median(values) * 1e3:.1f}",
                        **starts.get(name, dict.fromkeys(next(iter(starts.values())), "")),
                    }
                )
                click.echo(" ".join(f"{key}={value}" for key, value in list(rows[-1].items())[3:]))
    run.write_csv(f"openvino_{method}_cpu", rows)


if __name__ == "__main__":
    main()
