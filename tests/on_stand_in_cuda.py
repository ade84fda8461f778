"""Run by ``test_aoti_cuda.py`` in a process whose CUDA libraries are the stand-in; prints what it saw as JSON."""

from __future__ import annotations

import json
import types

import numpy as np
import torch
from torch.utils import cpp_extension

from prompttune.export.formats import ExportSettings, aoti
from prompttune.export.graph import capture, trace
from prompttune.export.runtimes.aoti import AotiRuntime
from tests.engines import model_of


class Doubled(torch.nn.Module):
    """Twice the batch on one axis, as a method with two pathways has it."""

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        q = torch.cat([q, q])
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)


def captured() -> list[list[int | None]]:
    """Bounds of the axes of a program in half precision, and of one with twice the batch."""
    programs = [
        trace(model_of("linear", 0), precision="fp16", bank_precision="fp16", device="cuda").program,
        capture(Doubled(), [torch.zeros(3, 2, 5, 16).half()], {"q": {0: "batch"}}, "fused", "cuda", "two pathways"),
    ]
    ranges = [one for program in programs for one in program.range_constraints.values()]
    return [[int(one.lower), None if "oo" in str(one.upper) else int(one.upper)] for one in ranges]


def ran(precision: str) -> dict[str, str]:
    """What a program meets while it runs."""
    seen = {}

    def program(images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        seen.update(device=str(images.device), convolutions=torch.backends.cudnn.conv.fp32_precision)
        return images

    runtime = AotiRuntime.__new__(AotiRuntime)
    runtime._device, runtime._exact, runtime._program = torch.device("cuda", 0), precision == "fp32", program
    images = np.ones((2, 3), np.float32)
    given = {"image": images, "task_index": np.zeros((2, 1), np.int64)}
    assert np.array_equal(runtime.run(given, {}), images)
    return seen


def refused(make: object) -> str:
    try:
        make()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return ""


if __name__ == "__main__":
    settings = ExportSettings("aoti", device="cuda").resolved()
    made = types.SimpleNamespace(details={"device": "cuda", "compute_capability": "9.0", "gpu": "a GPU"})
    report = {
        "capability": torch.cuda.get_device_capability(),
        "ranges": captured(),
        "fp32": ran("fp32"),
        "fp16": ran("fp16"),
        "afterwards": torch.backends.cudnn.conv.fp32_precision,
        "toolkit": refused(lambda: aoti.AotiFormat().check(settings)),
        "second device": refused(lambda: AotiRuntime._check_device(made, 1)),
    }
    aoti._packaged = lambda *_: None
    cpp_extension.CUDA_HOME = None
    report["no toolkit"] = refused(lambda: aoti.AotiFormat().check(settings))
    print(json.dumps(report))
