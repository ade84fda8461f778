"""Check that every TensorRT name in our sources exists in the oldest and the newest TensorRT that we support, and in
TensorRT for RTX.

Nothing here needs a GPU, and nothing is built or run: NVIDIA's Python bindings are asked for each class, method,
attribute, enumeration member and keyword that :mod:`tensorrt_names` finds. Those of TensorRT are imported with empty
libraries in the place of the real ones; TensorRT for RTX is installed with its libraries.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import tensorrt_stubs
from tensorrt_names import ROOT, Use, sources, used_names

BUILD = ROOT / "build" / "tensorrt-contract"
BINDINGS = ("tensorrt-cu13-bindings==10.13.3.*", "tensorrt-cu13-bindings==11.4.*")
RTX = "tensorrt_rtx_bindings"
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
"""What the bindings want to find in those libraries when they are imported."""

CHECK = """
import importlib, json, sys
trt = importlib.import_module(sys.argv[1])
missing = []
for use in json.load(sys.stdin):
    found, name = trt, use["name"]
    try:
        for part in name.split("."):
            found = getattr(found, part)
        known = use["keyword"] is None or f"{use['keyword']}:" in f"{found.__doc__} {found.__init__.__doc__}"
    except AttributeError:
        known = False
    if not known:
        missing.append(use)
json.dump({"version": trt.__version__, "missing": missing}, sys.stdout)
"""
"""Runs where the bindings are: tells the uses that they do not have."""


def bindings(requirement: str) -> tuple[Path, Path]:
    """Folders with the bindings unpacked and with empty libraries for them."""
    release = requirement.partition("==")[2].removesuffix(".*")
    place = BUILD / f"{release}-{sys.implementation.cache_tag}"
    unpacked, libraries = place / "bindings", place / "lib"
    if not unpacked.is_dir():
        libraries.mkdir(parents=True, exist_ok=True)
        source = place / "empty.c"
        source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS), encoding="utf-8")
        for name in LIBRARIES:
            output = libraries / f"lib{name}.so.{release.partition('.')[0]}"
            subprocess.run(["cc", "-shared", "-fPIC", "-o", str(output), str(source)], check=True)
        with tempfile.TemporaryDirectory(dir=place) as wheels:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels, requirement]
            subprocess.run(command, check=True)
            (wheel,) = Path(wheels).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(Path(wheels) / "unpacked")
            (Path(wheels) / "unpacked").replace(unpacked)
    return unpacked, libraries


def missing_uses(
    uses: Iterable[Use], unpacked: Path, libraries: Path, module: str = "tensorrt_bindings"
) -> tuple[str, list[Use]]:
    """The version of some bindings, and the uses that they do not have."""
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "LD_LIBRARY_PATH": str(libraries)}
    given = json.dumps([asdict(use) for use in uses])
    command = [sys.executable, "-c", CHECK, module]
    said = subprocess.run(command, input=given, env=environment, capture_output=True, text=True, check=False)
    if said.returncode:
        raise SystemExit(f"the bindings in {unpacked} cannot be imported:\n{said.stderr}")
    answer = json.loads(said.stdout)
    return answer["version"], [Use(**use) for use in answer["missing"]]


def broken(lacking: dict[str, list[Use]]) -> dict[Use, list[str]]:
    """Use → versions without it. What the source asks ``hasattr`` about may be missing, but not everywhere."""
    uses = dict.fromkeys(use for missing in lacking.values() for use in missing)
    where = {use: [version for version, missing in lacking.items() if use in missing] for use in uses}
    return {use: found for use, found in where.items() if not use.optional or len(found) == len(lacking)}


def main() -> None:
    """Print what was checked; exit code 1 if a version lacks a name."""
    if not sys.platform.startswith("linux") or "x86_64" not in sysconfig.get_platform():
        print("skipped: the bindings are fetched for Linux on x86-64 alone")
        return
    tensorrt_stubs.main()
    uses = used_names(sources())
    lacking = dict(missing_uses(uses, *bindings(requirement)) for requirement in BINDINGS)
    version, missing = missing_uses(uses, ROOT, ROOT, RTX)
    lacking[f"{version} for RTX"] = missing
    failed = broken(lacking)
    for use, versions in failed.items():
        what = f"has no keyword {use.keyword}" if use.keyword else "does not exist"
        print(f"{use.where}: {use.name} {what} in TensorRT {' and '.join(versions)}")
    names = {use.name for use in uses}
    print(f"{len(names)} names of TensorRT checked against {' and '.join(lacking)}, {len(failed)} missing")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
