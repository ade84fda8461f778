"""Threads that decode images, one image each."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def single_threaded_pool(workers: int) -> ThreadPoolExecutor:
    """Threads in which torch's operators use no further threads: one image each keeps the cores busy.

    The number is a thread's own, but setting it also sets what later threads of the process start with. So all threads
    are started here, and what the process had is put back.
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
    """Let torch's operators in this thread use no further threads."""
    torch.get_num_threads()  # a thread that never asked would forget the number at its first operator
    torch.set_num_threads(1)
