"""Put type stubs of TensorRT into ``typings/``, for mypy alone.

The stubs' package pins TensorRT itself and, installed, would make ``import tensorrt`` succeed with nothing in it. So
its wheel is only downloaded and unpacked, never installed, and mended where mypy cannot read it: parameters are named
``in``, one without a default follows one with a default, and a variable called ``bool`` hides the type.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

DISTRIBUTION = "tensorrt-stubs==10.13.0.35.1"
TYPINGS = Path(__file__).parent.parent / "typings"
FOLDERS = ("tensorrt", "tensorrt_bindings")
MENDED = (
    (r"\bin: list\[", "input_: list["),
    (r"\bchannel_axis: int\)", "channel_axis: int = ...)"),
    (r"(?<=-> )bool\b|(?<=: )bool\b", "builtins.bool"),
    (r"^import typing$", "import builtins\nimport typing"),
)


def mended(text: str) -> str:
    """A stub file in a form that mypy reads."""
    for pattern, replacement in MENDED:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text


def main() -> None:
    """Fill ``typings/`` unless it holds these very stubs already."""
    stamp = TYPINGS / ".tensorrt-stubs"
    made = f"{DISTRIBUTION} {MENDED}"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == made:
        return
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, DISTRIBUTION]
        subprocess.run(command, check=True)
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
        for folder in FOLDERS:
            shutil.rmtree(TYPINGS / folder, ignore_errors=True)
            for source in (Path(place) / folder).rglob("*.pyi"):
                target = TYPINGS / source.relative_to(place)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(mended(source.read_text(encoding="utf-8")), encoding="utf-8")
    stamp.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
