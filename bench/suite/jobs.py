"""Work for the CPU, done by other processes while the device is busy."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any

Key = tuple[str, ...]


class Jobs:
    """`start` hands a job to the next free process, `jobs[key]` waits for what it returns and raises what it raised, or
    TimeoutError when the clock (`time.monotonic`) shows `until`."""

    def __init__(self, until: float = float("inf")) -> None:
        workers = max(1, len(os.sched_getaffinity(0)) - 1)
        # Fresh processes: a fork would share the parent's CUDA state, which breaks.
        self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _alone)
        self._results: dict[Key, Future[Any]] = {}
        self._until = until
        self.waited = 0.0  # seconds spent for results

    def start(self, key: Key, job: Callable[..., Any], *arguments: Any) -> None:
        """Begin a job, unless one of this key has begun. `job` and its arguments are sent to another process."""
        if key not in self._results:
            self._results[key] = self._pool.submit(job, *arguments)

    def __getitem__(self, key: Key) -> Any:
        began = time.monotonic()
        try:
            return self._results[key].result(self._left())
        finally:
            self.waited += time.monotonic() - began

    def running(self) -> int:
        return sum(not result.done() for result in self._results.values())

    def settle(self) -> None:
        """Wait until no job is left, so that nothing runs beside what is timed next."""
        began = time.monotonic()
        wait(self._results.values(), self._left())
        self.waited += time.monotonic() - began

    def close(self) -> None:
        """End what still runs."""
        self._pool.shutdown(wait=not self.running(), cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()

    def _left(self) -> float | None:
        return None if self._until == float("inf") else max(0.0, self._until - time.monotonic())


def _alone() -> None:
    """A process of the pool sees no GPU and has one core."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(1)
