"""Threads that decode images, one image per thread."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def usable_cores() -> int:
    """Number of cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def single_threaded_pool(workers: int) -> ThreadPoolExecutor:
    """A pool of threads in which torch's operators stay single-threaded: one image per thread keeps the cores busy.

    The setting belongs to a thread, but changing it also sets what later threads of the process start with. All threads
    are therefore started here, and the process's own setting is restored.
    """
    threads = torch.get_num_threads()
    started = threading.Barrier(workers + 1)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode", initializer=hold_to_one_thread)
    waiting: list[Any] = [pool.submit(started.wait) for _ in range(workers)]
    started.wait()
    for one in waiting:
        one.result()
    torch.set_num_threads(threads)
    return pool


def hold_to_one_thread() -> None:
    """Keep torch's operators in this thread single-threaded."""
    torch.get_num_threads()  # without this call the first operator resets the number
    torch.set_num_threads(1)
