"""NVIDIA's Triton server itself, as the distribution ``nvidia-pytriton`` carries it, over a repository of a test."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

START_SECONDS = 90.0
STOP_SECONDS = 20.0


class Ports(NamedTuple):
    http: int
    grpc: int


def _carried(path: str) -> Path:
    return Path(str(metadata.distribution("nvidia-pytriton").locate_file(path)))


def available() -> bool:
    """Whether the server is installed, with the stub for this version of Python."""
    try:
        return _stub().is_file()
    except metadata.PackageNotFoundError:
        return False


def _stub() -> Path:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return _carried(f"pytriton/tritonserver/python_backend_stubs/{version}/triton_python_backend_stub")


def _backends(folder: Path) -> Path:
    """A folder of backends in which ``onnxruntime`` is our stand-in, run by Triton's Python backend."""
    shutil.copytree(_carried("pytriton/tritonserver/backends/python"), folder / "python")
    shutil.copy(_stub(), folder / "python")
    (folder / "onnxruntime").mkdir()
    shutil.copy(Path(__file__).with_name("triton_backend.py"), folder / "onnxruntime" / "model.py")
    return folder


def _free_ports() -> Ports:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        return Ports(one.getsockname()[1], two.getsockname()[1])


@contextlib.contextmanager
def triton_server(repository: Path, workspace: Path) -> Iterator[Ports]:
    """Triton over ``repository``, ready; its configuration is taken as it stands, nothing filled in from the model."""
    ports = _free_ports()
    command = [
        str(_carried("pytriton/tritonserver/bin/tritonserver")),
        *(f"--model-repository={repository}", f"--backend-directory={_backends(workspace / 'backends')}"),
        *("--disable-auto-complete-config", "--allow-metrics=false"),
        *("--http-address=127.0.0.1", f"--http-port={ports.http}"),
        *("--grpc-address=127.0.0.1", f"--grpc-port={ports.grpc}"),
    ]
    libraries = [str(_carried("nvidia_pytriton.libs")), str(sysconfig.get_config_var("LIBDIR"))]
    environment = os.environ | {
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "TRITON_TEST_PATH": os.pathsep.join(path for path in sys.path if path),
    }
    log = workspace / "triton.log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
    try:
        _await_ready(process, ports.http, log)
        yield ports
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_SECONDS)


def _await_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until Triton listens, which it does once every model is loaded; its log if it ends or takes too long."""
    limit = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < limit:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"Triton did not start:\n{log.read_text()[-4000:]}")
