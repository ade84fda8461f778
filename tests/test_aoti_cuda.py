"""AOTInductor for CUDA, as far as a machine without a GPU shows it: PyTorch's CUDA build over a stand-in for CUDA."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import prompttune as pt
from prompttune.export.formats import ExportSettings
from prompttune.export.precision.casting import exact_convolutions
from tests.engines import checkpoint, model_of, noise

HERE = Path(__file__).parent
triton = importlib.util.find_spec("triton")
HEADERS = Path(triton.submodule_search_locations[0], "backends/nvidia/include") if triton else None
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1.5e-1}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What ``on_stand_in_cuda.py`` saw."""
    compiler, folder = shutil.which("gcc"), tmp_path_factory.mktemp("cuda")
    if compiler is None or HEADERS is None or not (torch.version.cuda or "").startswith("13."):
        pytest.skip("needs gcc, and PyTorch's build for CUDA 13 with Triton's headers")
    library = folder / "libcuda.so.1"
    build = [compiler, "-shared", "-fPIC", "-w", "-I", HEADERS, HERE / "stand_in_cuda.c", "-o", library]
    subprocess.run([*build, f"-Wl,-soname,{library.name}"], check=True)
    (folder / "libcuda.so").symlink_to(library)
    environment = {"LD_PRELOAD": library, "LD_LIBRARY_PATH": folder, "LIBRARY_PATH": folder, "PYTHONPATH": HERE.parent}
    done = subprocess.run(
        [sys.executable, HERE / "on_stand_in_cuda.py"],
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_half_precision_is_captured_for_any_batch(seen):
    """PyTorch 2.15 bounds the batch of flash attention to 65,535 rows, of two pathways to half of that."""
    assert seen["capability"] == [9, 0]
    assert len(seen["ranges"]) >= 4
    assert {tuple(one) for one in seen["ranges"]} == {(1, None)}


@pytest.mark.slow
def test_only_fp32_engines_keep_convolutions_exact(seen):
    assert seen["fp32"] == {"device": "cuda:0", "convolutions": "ieee"}
    assert seen["fp16"] == {"device": "cuda:0", "convolutions": "tf32"} != seen["fp32"]
    assert seen["afterwards"] == "tf32"


@pytest.mark.slow
def test_headers_of_cuda_come_with_pytorch_or_are_missed_before_the_work(seen):
    assert seen["toolkit"] == ""
    error = seen["no toolkit"]
    assert error.startswith("EngineError: AOTInductor cannot compile for CUDA here (")
    assert f"install the CUDA toolkit {torch.version.cuda} and set CUDA_HOME to it, or export with" in error
    assert "\n" not in error


@pytest.mark.slow
def test_a_device_that_is_not_there_is_one_line(seen):
    assert seen["second device"] == "UsageError: the device cuda:1 does not exist: this machine has 1"


def test_convolutions_are_exact_inside_alone():
    before = torch.backends.cudnn.conv.fp32_precision
    with exact_convolutions():
        assert torch.backends.cudnn.conv.fp32_precision == "ieee" != before
    with exact_convolutions(False):
        assert torch.backends.cudnn.conv.fp32_precision == before
    with pytest.raises(ZeroDivisionError), exact_convolutions():
        _ = 1 / 0
    assert torch.backends.cudnn.conv.fp32_precision == before


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("precision", TOLERANCES)
def test_programs_answer_as_pytorch(tmp_path, precision):
    """Compiled by Triton and run: what the stand-in cannot show."""
    settings = ExportSettings("aoti", precision, device="cuda")
    runs = [checkpoint("sa2vp", number) for number in (0, 1)]
    pt.export_engine(runs, tmp_path / "engine", format=settings, parity=False)
    engine = pt.Engine(tmp_path / "engine", device="cuda")
    for rows in (1, 3, 8):
        images = noise(rows)
        with torch.no_grad():
            wanted = model_of("sa2vp", 1)(torch.from_numpy(images)).logits.numpy()
        assert np.abs(engine.logits(images, "task1") - wanted).max() <= TOLERANCES[precision]
