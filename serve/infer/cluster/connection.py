"""Connection to the cluster: its address, its resources, and console output that does not hide the progress bar."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from prompttune.errors import UsageError, first_line

CONNECT_S = 5.0
"""Seconds to wait for the first answer of a cluster's address."""


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Use the Ray instance that runs in this process, or start one for the length of the block.

    Raises:
        UsageError: there is not a cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    try:
        if address == "auto":
            _connect_or_start()
        else:
            _check_reachable(address)
            _init(address=address)
        yield
    finally:
        ray.shutdown()


def _connect_or_start() -> None:
    try:
        _init(address="auto")
    except ConnectionError:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        _init(address="local", num_cpus=max(2, os.cpu_count() or 1), include_dashboard=False)


def _init(**options: Any) -> None:
    try:
        with _without_native_lines():
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except ConnectionError as problem:
        if options["address"] == "auto":
            raise
        raise UsageError(f"cannot join the Ray cluster at {options['address']}: {first_line(problem)}") from None
    except (RuntimeError, ValueError, OSError) as problem:
        raise UsageError(f"cannot join the Ray cluster at {options['address']}: {first_line(problem)}") from problem


@contextlib.contextmanager
def _without_native_lines() -> Iterator[None]:
    """Hide the lines that Ray's C++ part writes to stderr while it sets up its log, at any log level."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check_reachable(address: str) -> None:
    """Check the address first: Ray itself would try for a minute and then end the process."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise UsageError(
            f"the address of a Ray cluster is host:port, not {address!r}; from outside of the cluster, "
            "let `ray job submit` start prompttune on it"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as problem:
        reason = problem.strerror or first_line(problem)
        raise UsageError(f"cannot reach Ray at {address}: {reason}; `ray start --head` prints its address") from None


def alive_nodes() -> dict[str, dict[str, float]]:
    """Resources of each node that is alive."""
    return {one["NodeID"]: one["Resources"] for one in ray.nodes() if one["Alive"]}
