"""Work for the CPU, done by other processes while the device is busy."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

Key = tuple[str, ...]


class Jobs:
    """`start` hands a job to the next free process, `jobs[key]` waits for what it returns and raises what it raised."""

    def __init__(self) -> None:
        workers = max(1, len(os.sched_getaffinity(0)) - 1)
        # Fresh processes: a fork would share the parent's CUDA state, which breaks.
        self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _alone)
        self._results: dict[Key, Future[Any]] = {}
        self.waited = 0.0  # seconds spent for results

    def start(self, key: Key, job: Callable[..., Any], *arguments: Any) -> None:
        """Begin a job, unless one of this key has begun. `job` and its arguments are sent to another process."""
        if key not in self._results:
            self._results[key] = self._pool.submit(job, *arguments)

    def __getitem__(self, key: Key) -> Any:
        began = time.monotonic()
        try:
            return self._results[key].result()
        finally:
            self.waited += time.monotonic() - began

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _alone() -> None:
    """A process of the pool sees no GPU and has one core."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(1)
