"""The script for a rented GPU machine, rehearsed on the CPU: all kinds of checks, kills, limits, missing packages."""

from __future__ import annotations

import csv
import hashlib
import importlib
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.h200 import PARTS, TINY_BUILDS, Table
from benchmarks.h200_wheel import ARCHIVE, PROVIDER, main

ROOT = Path(__file__).parents[1]


def started(part: str, folder: Path, *words: str, packages: Path | None = None) -> subprocess.Popen[str]:
    """The script, in a process group of its own."""
    command = [sys.executable, "-m", "benchmarks.h200", "--part", part, "--device", "cpu", "--tiny"]
    command += ["--results", str(folder / "results"), "--work", str(folder / "work"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if packages is not None:
        environment["PYTHONPATH"] = str(packages)
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=900)
    return output


def ledger(folder: Path, part: str) -> dict[tuple[str, str], str]:
    """Check and case → its last status and the reason."""
    path = folder / f"results/{part}_checks.csv"
    return {(row["check"], row["case"]): f"{row['status']} {row['reason']}".strip() for row in rows_of(path)}


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file in which every line is whole."""
    text = path.read_text()
    assert text.endswith("\n")
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == text.count("\n") - 1
    assert all(None not in row and None not in row.values() for row in rows)
    return rows


@pytest.mark.slow
def test_part_ort_is_killed_at_random_moments_and_ends_at_last(tmp_path):
    dice = random.Random(0)
    for _ in range(3):
        process = started("ort", tmp_path, "--deadline", "600")
        while not (tmp_path / "results/ort_checks.csv").exists() and process.poll() is None:
            time.sleep(0.1)
        time.sleep(dice.uniform(0, 8))
        os.killpg(process.pid, signal.SIGKILL)
        ended(process)
        for path in (tmp_path / "results").glob("*.csv"):
            assert rows_of(path)
    before = {key for key, said in ledger(tmp_path, "ort").items() if said.startswith("passed")}
    assert ("machine", "packages") in before
    process = started("ort", tmp_path, "--deadline", "600")
    output = ended(process)
    assert process.returncode == 0, output
    assert not [line for line in output.splitlines() if line.startswith("passed     machine   packages")]
    found = ledger(tmp_path, "ort")
    skipped = {key: said for key, said in found.items() if not said.startswith("passed")}
    assert skipped == {("build", "bf16"): "skipped ONNX Runtime runs bf16 on CUDA alone"}
    assert {key[0] for key in found} == {"build", *(check.name for check in PARTS["ort"])}
    assert {case for name, case in found if name == "build"} == set(TINY_BUILDS["ort"])
    speed = rows_of(tmp_path / "results/ort_speed.csv")
    assert {row["subject"] for row in speed} == {"plain", "fp32"}
    assert all(float(row["over_plain"]) > 0 and row["hardware"] and row["torch"] and row["command"] for row in speed)
    (loads,) = rows_of(tmp_path / "results/ort_loads.csv")[-1:]
    assert int(loads["loads"]) > 0


@pytest.mark.slow
def test_a_check_beyond_its_limit_and_a_missing_package_cost_their_own_rows(tmp_path):
    """AOTInductor's builds take a minute of CPU time each: only a rehearsal by hand has them."""
    (tmp_path / "packages").mkdir()
    missing = "raise ModuleNotFoundError(\"No module named 'matplotlib'\", name='matplotlib')"
    (tmp_path / "packages/matplotlib.py").write_text(missing)
    chosen = [word for name in ("machine", "forward", "training", "eager", "step") for word in ("--only", name)]
    limited = ("--deadline", "300", "--limit", "forward=0", *chosen)
    process = started("torch", tmp_path, *limited, packages=tmp_path / "packages")
    output = ended(process)
    assert process.returncode == 1, output
    found = ledger(tmp_path, "torch")
    assert [said for key, said in found.items() if key[0] == "forward"] == ["timed out the limit is 0 s"] * 3
    assert found["training", "bf16"] == "skipped no module matplotlib"
    assert found["eager", "batch 1"] == "passed"
    assert found["machine", "device"] == "passed"

    process = started("torch", tmp_path, "--deadline", "600", *chosen)
    output = ended(process)
    assert process.returncode == 0, output
    assert "machine" not in output
    left = {key: said for key, said in ledger(tmp_path, "torch").items() if not said.startswith("passed")}
    assert left == {
        ("training", "fp16"): "skipped fp16 trains on a GPU alone",
        ("step", "compiled"): "skipped compiled steps are timed on a GPU alone; benchmarks.training_step does it on "
        "a CPU",
    }
    forward = rows_of(tmp_path / "results/torch_forward.csv")
    assert {"single", "mixed"} == {row["rows"] for row in forward}
    assert all(float(row["max_abs"]) <= float(row["allowed"]) for row in forward)


def test_every_case_belongs_to_a_check():
    checks = importlib.import_module("benchmarks.h200_checks")
    for part, listed in PARTS.items():
        setting = checks.Setting(part, "cuda", False, Path(), 1)
        assert all(checks.cases(setting)[check.name] and callable(getattr(checks, check.name)) for check in listed)


@pytest.mark.slow
def test_a_process_that_has_loaded_the_driver_is_left_by_exec(tmp_path):
    (tmp_path / "libcuda.so.1").write_bytes(b"driver")
    (tmp_path / "sitecustomize.py").write_text(
        "import mmap, os, sys\n"
        "if '--child' not in sys.argv:\n"
        f"    held = mmap.mmap(os.open({str(tmp_path / 'libcuda.so.1')!r}, os.O_RDONLY), 0, prot=mmap.PROT_READ)\n"
    )
    process = started("torch", tmp_path, "--deadline", "200", "--only", "machine", packages=tmp_path)
    output = ended(process)
    assert "passed     machine   device" in output
    assert process.returncode == 0, output


def test_a_line_that_a_kill_has_cut_is_taken_out(tmp_path):
    table = Table(tmp_path / "rows.csv", {"hardware": "a, b"})
    table.add({"what": "one\ntwo", "figure": 1})
    table.add({"what": "three", "figure": 2})
    whole = table.path.read_bytes()
    table.path.write_bytes(whole + b"four,3,a")
    assert [row["what"] for row in table.rows()] == ["one two", "three"]
    table.add({"what": "five", "figure": 4})
    assert table.path.read_bytes() == whole + b'five,4,"a, b"\n'
    with pytest.raises(ValueError, match="has the columns"):
        table.add({"other": 1})


# ---------------------------------------------------------------------------------------------------------- the wheel


def entry(kind: int, capability: int, payload: bytes) -> bytes:
    """One entry of a container: 48 bytes of header, then machine code."""
    return (
        struct.pack("<HHIQ", kind, 257, 48, len(payload)).ljust(28, b"\1")
        + struct.pack("<I", capability).ljust(20, b"\2")
        + payload
    )


def library(*entries: bytes) -> bytes:
    """An ELF file of three sections: none, ``.nv_fatbin`` with a container an entry, the names."""
    containers = b"".join(struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(one)) + one + bytes(8) for one in entries)
    names = b"\0.nv_fatbin\0"
    begin, table = 64, 64 + len(containers) + len(names)
    header = bytearray(64)
    header[:4] = b"\x7fELF"
    struct.pack_into("<Q", header, 40, table)
    struct.pack_into("<HHH", header, 58, 64, 3, 2)
    sections = struct.pack("<IIQQQQIIQQ", *[0] * 10)
    sections += struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, begin, len(containers), 0, 0, 0, 0)
    sections += struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, begin + len(containers), len(names), 0, 0, 0, 0)
    return bytes(header) + containers + names + sections


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "onnxruntime_gpu-9.9-cp312-cp312-linux_x86_64.whl"
    code = [entry(2, 80, b"A" * 400), entry(2, 90, b"H" * 300), entry(1, 90, b"P" * 200), entry(2, 120, b"B" * 100)]
    with zipfile.ZipFile(path, "w") as files:
        files.mkdir("onnxruntime")
        files.writestr("onnxruntime/__init__.py", "__version__ = '9.9'\n")
        files.writestr(f"onnxruntime/capi/{PROVIDER}", library(*code))
        files.writestr("onnxruntime/capi/libonnxruntime.so.9.9", random.Random(0).randbytes(5000))
    return path


def run(*words: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def test_wheel_keeps_one_capability_and_comes_back_from_pieces(wheel, tmp_path):
    assert "1 entries kept, 3 zeroed" in run("pack", wheel, tmp_path / "pieces", "--piece-mib", 0.0001)
    pieces = sorted(tmp_path.glob(f"pieces/{ARCHIVE}.*"))
    assert len(pieces) > 1
    assert all(piece.stat().st_size <= 104 for piece in pieces)
    run("unpack", tmp_path / "pieces", tmp_path / "site")
    kept = (tmp_path / f"site/onnxruntime/capi/{PROVIDER}").read_bytes()
    whole = zipfile.ZipFile(wheel).read(f"onnxruntime/capi/{PROVIDER}")
    assert kept == whole.replace(b"A" * 400, bytes(400)).replace(b"P" * 200, bytes(200)).replace(b"B" * 100, bytes(100))
    assert not list(tmp_path.glob("site/onnxruntime/capi/libonnxruntime.so*"))
    version = subprocess.run(
        [sys.executable, "-c", "import onnxruntime; print(onnxruntime.__version__)"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert version.stdout == "9.9\n"


def test_wheel_can_stay_whole(wheel, tmp_path):
    run("pack", wheel, tmp_path / "pieces", "--whole")
    run("unpack", tmp_path / "pieces", tmp_path / "site")
    with zipfile.ZipFile(wheel) as files:
        for name in (one for one in files.namelist() if not one.endswith("/")):
            assert (tmp_path / "site" / name).read_bytes() == files.read(name)


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_a_piece_that_did_not_arrive_is_named(wheel, tmp_path, how):
    run("pack", wheel, tmp_path / "pieces", "--piece-mib", 0.0001)
    piece = tmp_path / f"pieces/{ARCHIVE}.1"
    if how == "missing":
        piece.unlink()
    else:
        piece.write_bytes(hashlib.sha256(b"").digest())
    result = CliRunner().invoke(main, ["unpack", str(tmp_path / "pieces"), str(tmp_path / "site")])
    assert result.exit_code == 1
    assert result.output == f"Error: {piece} is {how}: copy it again\n"
    assert not (tmp_path / "site").exists()


def test_a_capability_that_the_wheel_lacks_is_refused(wheel, tmp_path):
    result = CliRunner().invoke(main, ["pack", str(wheel), str(tmp_path / "pieces"), "--capability", "70"])
    assert result.exit_code == 1
    assert result.output.endswith("holds no code for compute capability 7.0: use --whole\n")
